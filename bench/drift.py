# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
A trace of questions whose topics shift and whose answers change, under several policies.

Pairs of questions and answers come from the topics of chatterbot-corpus. Whoever asks
corrects each answer that is not, word for word, the one that is true at that moment. The
same questions come at the same times to each policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
import random
import threading
import time
from typing import Any

from bench.load import poisson
from bench.results import Check, check, percentile, Reported, Table
from bench.robot import MAX_TOKENS, Robot

TOPICS = ('botprofile', 'ai', 'food', 'literature', 'science', 'psychology', 'movies', 'sports',
          'emotion', 'trivia')
PAIRS = 100
# The topics of each phase, by number: five shifts, and some topics come back.
FOCUS_ON = ((0, 1), (2, 3), (4, 5), (6, 0), (7, 2), (8, 9))
PHASES = len(FOCUS_ON)
FOCUS = 0.8             # share of a phase's questions that are of its topics
LONGEST_ANSWER = 16     # tokens
WINDOW = 25             # questions over which the alignment of a moment is taken

OVERLOAD = 3.0          # times the rate: more is corrected than can be learned
LASTING = 2             # times the questions: nothing is learned while it begins


@dataclass(frozen=True)
class System:
    """What a system sets, beside the node's defaults, and how it is asked."""

    values: Mapping[str, Any] = field(default_factory=dict)
    overloaded: bool = False


# What comes first matters only while more waits than one job takes: hence the overload.
SYSTEMS: Mapping[str, System] = {
    'mace': System(),
    'continuous': System({'scheduler.policy': 'continuous'}),
    'periodic': System({'scheduler.policy': 'periodic'}),
    'mace, no drift': System({'drift.min_budget': 1.0}),
    'mace, overloaded': System(overloaded=True),
    'mace, overloaded, no priority': System({'finetune.order': 'arrival'}, overloaded=True),
    'mace, no priority': System({'finetune.order': 'arrival'}),
}


@dataclass(frozen=True)
class Question:
    """What is asked ``at`` seconds after the start, and what is right then."""

    at: float
    phase: int
    text: str
    truth: str


def corpus() -> Path:
    """Return the folder of the topics; raises ``SystemExit`` without chatterbot-corpus."""
    try:
        import chatterbot_corpus
        import yaml  # noqa: F401
    except ImportError as error:
        raise SystemExit("the drift trace needs chatterbot-corpus: pip install 'mace-ros[bench]'"
                         ) from error
    return Path(chatterbot_corpus.__file__).parent / 'data' / 'english'


def pairs(tokens: Any) -> dict[str, list[tuple[str, list[str]]]]:
    """
    Return for each topic its questions with their answers: short ones, one or two each.

    ``tokens`` counts the tokens of a text. Raises ``SystemExit`` as :func:`corpus`.
    """
    folder = corpus()
    import yaml

    asked: set[str] = set()
    result: dict[str, list[tuple[str, list[str]]]] = {}
    for topic in TOPICS:
        found: dict[str, list[str]] = {}
        for conversation in yaml.safe_load((folder / f'{topic}.yml').read_text())['conversations']:
            if len(conversation) < 2:
                continue
            question, answer = (' '.join(str(x).split()) for x in conversation[:2])
            if 1 < len(question.split()) < 16 and len(answer) > 2 and (
                    tokens(answer) < LONGEST_ANSWER):
                found.setdefault(question.strip().casefold(), []).append(answer)
        result[topic] = [
            (q, list(dict.fromkeys(a))[:2]) for q, a in found.items() if q not in asked]
        asked |= found.keys()
    return result


def trace(tokens: Any, *, questions: int, rate: float, seed: str) -> list[Question]:
    """Return the questions: their topics shift, and every other answer changes half-way."""
    dice = random.Random(seed)
    topics = pairs(tokens)
    per_topic = PAIRS // len(TOPICS)
    chosen = {t: dice.sample(found, min(per_topic, len(found))) for t, found in topics.items()}
    names = list(chosen)
    dice.shuffle(names)
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
        topic = dice.choice(focus[phase] if dice.random() < FOCUS else seen)
        text, answers = dice.choice(chosen[topic])
        result.append(Question(at, phase, text, changes.get(text, answers[0])))
    return result


def measure(settings: Any, folder: Path, earlier: Mapping[str, Any], *, system: str,
            questions: int, rate: float, seed: str, commit: str | None,
            conditions: Mapping[str, Any]) -> dict[str, Any]:
    """
    Run the trace under a system; return what that one and the others did.

    What ``earlier`` runs say of other systems is kept if the trace and all other ``conditions``
    were the same, or if nobody compares them with this one.
    """
    its = SYSTEMS[system]
    same = {'trace': {'questions': questions, 'rate': rate, 'seed': seed}, **conditions}
    runs = [r for r in earlier.get('drift_runs', ()) if r['system'] != system and (
        SYSTEMS[r['system']].overloaded != its.overloaded
        or all(r.get(name) == value for name, value in same.items()))]
    kept = {r['system'] for r in runs}
    rows = [r for r in earlier.get('drift', ()) if r['system'] in kept]
    robot = Robot(settings.updated(its.values), folder / system.replace(' ', '_'))
    chat = robot.engine.chat
    many, fast = (LASTING, OVERLOAD) if its.overloaded else (1, 1.0)
    load = trace(lambda text: len(chat.answer(text)), questions=questions * many,
                 rate=rate * fast, seed=seed)
    asked, run = play(robot, load)
    robot.engine.close()
    right = sum(r['right'] for r in asked) / run['asked']
    print(f'{system}: alignment {right:.3f}, fine-tune {run["learning_s"]:.1f} s', flush=True)
    return {'drift': [*rows, *({'system': system, **row} for row in asked)],
            'drift_runs': [*runs, {'system': system, 'commit': commit, **same, **run}]}


def play(robot: Robot, load: Sequence[Question]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Ask at the times of the trace, and correct what is wrong; return rows and totals."""
    from mace_ros.api.events import AdapterVersion, Correction, Query, Response, VersionState

    engine = robot.engine
    robot.ask('Hello.')     # what is only slow once
    before = engine.scheduler.statistics(time.monotonic())
    begun = time.monotonic()

    def ask() -> None:
        for i, question in enumerate(load):
            time.sleep(max(begun + question.at - time.monotonic(), 0.0))
            engine.submit(Query(question.text, id=f't{i}', max_tokens=MAX_TOKENS, temperature=0.0))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    rows: list[dict[str, Any]] = []
    versions = rejected = drifting = samples = 0
    end = begun + load[-1].at + 120.0
    while len(rows) < len(load) and time.monotonic() < end:
        iteration = engine.step()
        for event in iteration.events:
            if isinstance(event, AdapterVersion):
                versions += event.state is VersionState.PUBLISHED
                rejected += event.state is VersionState.REJECTED
            if not isinstance(event, Response) or not event.query_id.startswith('t'):
                continue
            question = load[int(event.query_id[1:])]
            right = event.text.strip() == question.truth
            rows.append({
                'at': question.at, 'phase': question.phase, 'question': question.text,
                'truth': question.truth, 'answer': event.text, 'right': right,
                'ttft_ms': event.ttft_ms, 'tpot_ms': event.tpot_ms,
                'version': event.adapter_version})
            samples += 1
            drifting += engine.status().drift_state == 2
            if not right:
                engine.correct(Correction(question.truth, query_id=event.query_id))
        if iteration.wake_at is None or (not iteration.events
                                         and iteration.wake_at > time.monotonic()):
            time.sleep(0.001)
    asking.join()
    after = engine.scheduler.statistics(time.monotonic())
    return rows, {
        'asked': len(load),
        'learning_s': after.learning_s - before.learning_s,
        'serving_s': after.serving_s - before.serving_s,
        'seconds': time.monotonic() - begun, 'versions': versions, 'rejected': rejected,
        'steps': after.finetune_steps - before.finetune_steps,
        'drifting': drifting / max(samples, 1), 'unlearned': engine.status().corrections_waiting}


# -- what the samples say ----------------------------------------------------------------


def alignment(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of answers that were right at the moment they were asked."""
    return sum(r['right'] for r in rows) / len(rows)


def curve(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Return over time the share of right answers among the latest :data:`WINDOW`."""
    ordered = sorted(rows, key=lambda r: r['at'])
    return [(row['at'], alignment(ordered[max(i + 1 - WINDOW, 0):i + 1]))
            for i, row in enumerate(ordered)]


def area(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean height of the curve over time."""
    points = curve(rows)
    total = sum((points[i + 1][0] - at) * (points[i + 1][1] + height) / 2.0
                for i, (at, height) in enumerate(points[:-1]))
    return total / max(points[-1][0] - points[0][0], 1e-9)


def by_system(samples: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return for each system that ran its numbers."""
    result = {}
    order = list(SYSTEMS)
    for run in sorted(samples['drift_runs'], key=lambda r: order.index(r['system'])):
        rows = [r for r in samples['drift'] if r['system'] == run['system']]
        # What was never answered was not answered right.
        answered = len(rows) / run['asked']
        result[run['system']] = {
            **run, 'alignment': alignment(rows) * answered, 'area': area(rows) * answered,
            'answers': len(rows),
            'ttft_p95_ms': percentile([r['ttft_ms'] for r in rows], 95),
            'tpot_p95_ms': percentile([r['tpot_ms'] for r in rows], 95)}
    return result


def checks(samples: Mapping[str, Any]) -> list[Check]:
    """Return the checks."""
    numbers = by_system(samples)
    return [
        check('alignment of mace over that of continuous',
              _ratio(numbers, 'alignment', 'mace', 'continuous'), '>= 1'),
        check('fine-tune device time of mace over that of continuous',
              _ratio(numbers, 'learning_s', 'mace', 'continuous'), '<= 0.6'),
        check('alignment of mace over that of periodic',
              _ratio(numbers, 'alignment', 'mace', 'periodic'), '>= 1.2'),
        check('area of the alignment of mace over that of continuous',
              _ratio(numbers, 'area', 'mace', 'continuous'), '>= 1'),
        check('area of the alignment of mace over that of periodic',
              _ratio(numbers, 'area', 'mace', 'periodic'), '>= 1.2'),
        check('alignment per fine-tune second of mace over that without drift',
              _per_second(numbers, 'mace', 'mace, no drift'), '>= 1'),
        check('alignment per fine-tune second of mace over that without priority, overloaded',
              _per_second(numbers, 'mace, overloaded', 'mace, overloaded, no priority'), '>= 1')]


def reported(samples: Mapping[str, Any]) -> list[Reported]:
    """Return the numbers that explain the others."""
    numbers = by_system(samples)
    found = [
        # Hardly anything waits then that one job does not take.
        ('alignment per fine-tune second of mace over that without priority',
         _per_second(numbers, 'mace', 'mace, no priority')),
        ('alignment of mace over that without drift',
         _ratio(numbers, 'alignment', 'mace', 'mace, no drift')),
        ('alignment of mace over that without priority, overloaded',
         _ratio(numbers, 'alignment', 'mace, overloaded', 'mace, overloaded, no priority')),
        ('the most that a policy could reach, of answers right when asked',
         _bound(samples))]
    return [Reported(name, value) for name, value in found if value is not None]


def _ratio(numbers: Mapping[str, Mapping[str, Any]], column: str, above: str,
           below: str) -> float | None:
    if above not in numbers or below not in numbers or not numbers[below][column]:
        return None
    return float(numbers[above][column] / numbers[below][column])


def _per_second(numbers: Mapping[str, Mapping[str, Any]], above: str,
                below: str) -> float | None:
    right, seconds = (_ratio(numbers, c, above, below) for c in ('alignment', 'learning_s'))
    return right / seconds if right is not None and seconds else None


def _bound(samples: Mapping[str, Any]) -> float:
    """Return the share of questions that were asked before, and had the same answer."""
    rows = _usual(samples)
    return 1.0 - len({(r['question'], r['truth']) for r in rows}) / len(rows)


def _usual(samples: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what one system did, one that was not overloaded if there is one."""
    ran = sorted(by_system(samples), key=lambda name: SYSTEMS[name].overloaded)
    return [r for r in samples['drift'] if r['system'] == ran[0]]


def table(samples: Mapping[str, Any]) -> Table:
    """Return alignment and latency of each system in one table."""
    columns = ['alignment', 'area', 'learning_s', 'ttft_p95_ms', 'tpot_p95_ms', 'versions',
               'rejected', 'steps', 'drifting', 'unlearned', 'asked', 'seconds', 'commit', 'cpu']
    return Table(
        'Drift trace', ['system', *columns, 'set'],
        [[name, *(row[c] for c in columns), ' '.join(row['set'])]
         for name, row in by_system(samples).items()],
        'alignment: share of answers right when asked; area: the same over time; learning_s: '
        'device seconds of fine-tuning, scoring and gate included')


def draw(samples: Mapping[str, Any], path: Path) -> bool:
    """Draw alignment over time; return whether that was possible."""
    from importlib.util import find_spec

    if find_spec('matplotlib') is None:
        return False
    import matplotlib

    matplotlib.use('svg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4), layout='constrained')
    for system in by_system(samples):
        if SYSTEMS[system].overloaded:
            continue    # its shifts are at other times
        rows = [r for r in samples['drift'] if r['system'] == system]
        times, values = zip(*curve(rows), strict=True)
        axes.plot(times, values, label=system, linewidth=2.2 if system == 'mace' else 1.2)
    some = _usual(samples)
    for phase in range(1, PHASES):
        axes.axvline(min(r['at'] for r in some if r['phase'] == phase), color='0.8', zorder=0)
    axes.set(xlabel='seconds; the topics shift at each line', ylim=(0, 1),
             ylabel=f'share right of the latest {WINDOW}')
    axes.legend(fontsize=7)
    figure.savefig(path, metadata={'Date': None})
    pyplot.close(figure)
    return True
