# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
A trace of questions whose topics shift and whose true answers change.

Questions and answers come from the topics of chatterbot-corpus.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
import random

from bench.common.load import poisson

TOPICS = ('botprofile', 'ai', 'food', 'literature', 'science', 'psychology', 'movies', 'sports',
          'emotion', 'trivia')
PAIRS = 100             # questions of all topics
# The topics of each phase, by number: five shifts, and some topics return.
FOCUS_ON = ((0, 1), (2, 3), (4, 5), (6, 0), (7, 2), (8, 9))
PHASES = len(FOCUS_ON)
FOCUS = 0.8             # share of a phase's questions that are about its topics
MAX_ANSWER_TOKENS = 16

Pairs = dict[str, list[tuple[str, list[str]]]]


@dataclass(frozen=True)
class Question:
    """A question ``at`` seconds after the start, and its true answer at that time."""

    at: float
    phase: int
    text: str
    truth: str


def require_corpus() -> Path:
    """Return the folder of the topics; ends the program if chatterbot-corpus is missing."""
    try:
        import chatterbot_corpus
        import yaml  # noqa: F401
    except ImportError as error:
        raise SystemExit("the drift trace needs chatterbot-corpus: pip install 'mace-ros[bench]'"
                         ) from error
    return Path(chatterbot_corpus.__file__).parent / 'data' / 'english'


def question_pairs(count_tokens: Callable[[str], int]) -> Pairs:
    """
    Return the short questions of each topic, each with one or two short answers.

    ``count_tokens`` counts the tokens of a text. Raises ``SystemExit`` as
    :func:`require_corpus` does.
    """
    folder = require_corpus()
    import yaml

    seen: set[str] = set()
    result: Pairs = {}
    for topic in TOPICS:
        found: dict[str, list[str]] = {}
        for conversation in yaml.safe_load((folder / f'{topic}.yml').read_text())['conversations']:
            if len(conversation) < 2:
                continue
            question, answer = (' '.join(str(x).split()) for x in conversation[:2])
            if 1 < len(question.split()) < 16 and len(answer) > 2 and (
                    count_tokens(answer) < MAX_ANSWER_TOKENS):
                found.setdefault(question.strip().casefold(), []).append(answer)
        result[topic] = [
            (q, list(dict.fromkeys(a))[:2]) for q, a in found.items() if q not in seen]
        seen |= found.keys()
    return result


def make_trace(count_tokens: Callable[[str], int], *, questions: int, rate: float,
               seed: str) -> list[Question]:
    """Return the questions; half-way through, the true answer of every other one changes."""
    rng = random.Random(seed)
    topics = question_pairs(count_tokens)
    per_topic = PAIRS // len(TOPICS)
    chosen = {t: rng.sample(found, min(per_topic, len(found))) for t, found in topics.items()}
    names = list(chosen)
    rng.shuffle(names)
    focus = [[names[i] for i in numbers] for numbers in FOCUS_ON]
    result = []
    changes: dict[str, str] = {}
    for i, at in enumerate(poisson(seed, questions, questions / rate)):
        phase = i * PHASES // questions
        if phase >= PHASES // 2 and not changes:
            for found in chosen.values():
                for (text, answers), (_, others) in zip(found[::2], found[1::2], strict=False):
                    changes[text] = answers[1] if len(answers) > 1 else others[0]
        seen = sorted({t for f in focus[:phase + 1] for t in f})
        topic = rng.choice(focus[phase] if rng.random() < FOCUS else seen)
        text, answers = rng.choice(chosen[topic])
        result.append(Question(at, phase, text, changes.get(text, answers[0])))
    return result
