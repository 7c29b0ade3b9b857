# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What is asked, and when: the same for every system that is compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
import math
from pathlib import Path
import random
from typing import Any

CHAT = Path(__file__).with_name('chat.txt')

# Text in, ids of the prompt (chat template and all) out.
Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Arrival:
    """A question that comes ``at`` seconds after the start of its block."""

    at: float
    text: str
    ids: tuple[int, ...]    # of the whole prompt
    max_tokens: int = 0     # of its answer; 0: as all of the block


@dataclass(frozen=True)
class Slo:
    """What counts as in time, in milliseconds."""

    ttft_ms: float
    tpot_ms: float


@dataclass(frozen=True)
class Answered:
    """When a question arrived, was begun, and its tokens reached whoever asked, in seconds."""

    arrival: float
    started: float
    first: float
    last: float
    tokens: int


def poisson(seed: str, count: int, seconds: float) -> list[float]:
    """
    Return ``count`` arrivals of a Poisson process in so many seconds.

    Given how many they are, they lie independently of each other: so each block has the
    same load, and only its bursts differ.
    """
    dice = random.Random(seed)
    return sorted(dice.uniform(0.0, seconds) for _ in range(count))


def conversations(path: Path = CHAT) -> list[list[dict[str, str]]]:
    """Return the conversations of a chat text, as messages with role and content."""
    found: list[list[dict[str, str]]] = []
    for part in path.read_text().split('\n\n'):
        lines = [line.partition(': ') for line in part.splitlines() if not line.startswith('#')]
        if lines:
            found.append([{'role': role, 'content': said} for role, _, said in lines])
    return found


def prose(path: Path = CHAT) -> str:
    """Return all that is said in a chat text, in one piece."""
    return ' '.join(m['content'] for c in conversations(path) for m in c)


def prompts(encode: Encode, seed: str, count: int, tokens: int) -> list[tuple[str, Sequence[int]]]:
    """
    Return texts, and the ids of their prompts, that are exactly ``tokens`` long.

    They are cut out of the chat text at random places. Raises ``ValueError`` if the chat
    template alone is too long.
    """
    words, dice = prose().split(), random.Random(seed)
    found: list[tuple[str, Sequence[int]]] = []
    if len(encode(words[0])) > tokens:
        raise ValueError(f'prompts of {tokens} tokens: the chat template takes more')
    while len(found) < count:
        start = dice.randrange(len(words))
        for end in range(start + 1, start + 1 + tokens):
            text = ' '.join(words[start:end])
            ids = encode(text)
            if len(ids) >= tokens:
                if len(ids) == tokens:    # else the last word had too many tokens: elsewhere
                    found.append((text, ids))
                break
    return found


def arrivals(encode: Encode, seed: str, *, count: int, seconds: float,
             tokens: int) -> list[Arrival]:
    """Return the questions of a block."""
    times = poisson(seed, count, seconds)
    return [Arrival(at, text, tuple(ids)) for at, (text, ids) in zip(
        times, prompts(encode, seed, count, tokens), strict=True)]


def samples(ids: Sequence[int], tokens: int) -> list[tuple[int, ...]]:
    """Cut ``ids`` into sequences of exactly ``tokens`` to learn from; the rest is left out."""
    return [tuple(ids[i:i + tokens]) for i in range(0, len(ids) - tokens + 1, tokens)]


def request_row(system: str, block: int, begun: float, answer: Answered,
                slo: Slo) -> dict[str, Any]:
    """Return the row of one request; ``begun`` is when its block began."""
    ttft = (answer.first - answer.arrival) * 1e3
    tpot = math.nan
    if answer.tokens > 1:
        tpot = (answer.last - answer.first) / (answer.tokens - 1) * 1e3
    return {
        'system': system, 'block': block, 'arrival_s': answer.arrival - begun,
        'queue_ms': (answer.started - answer.arrival) * 1e3, 'ttft_ms': ttft, 'tpot_ms': tpot,
        'output_tokens': answer.tokens,
        'slo_met': ttft <= slo.ttft_ms and not tpot > slo.tpot_ms}


def block_row(system: str, block: int, *, wall_s: float, busy_s: float, finetune_tokens: int = 0,
              finetune_steps: int = 0) -> dict[str, Any]:
    """Return the row of one system in one block."""
    return {
        'system': system, 'block': block, 'wall_s': wall_s, 'busy_s': busy_s,
        'finetune_tokens': finetune_tokens, 'finetune_steps': finetune_steps}
