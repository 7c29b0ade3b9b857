# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
What learning a correction does: how soon, how well, and what it does to other answers.

One correction after the other, each to a live answer of an idle robot: the time until the
version that knows it, the answer then, the answer to a paraphrase that was never trained,
and, after all, short facts that the base model gets right. Results:
bench/results/learning.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
import json
from pathlib import Path
import statistics
import tempfile
import time
from typing import Any

from bench.report import summary
from bench.results import Check, check, Recorder, Reported, Result, Table

LESSONS = Path(__file__).with_name('lessons.json')
FACTS = 40
MAX_TOKENS = 24
ENDS_AFTER_S = 300.0    # no answer and no correction takes so long


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    result = argparse.ArgumentParser(prog='python -m bench.learning', description=__doc__.strip())
    add = result.add_argument
    add('--quick', action='store_true', help='two corrections: says that all runs, not how well')
    add('--corrections', type=int, help='how many (default: 10; quick: 2)')
    add('--set', nargs='+', default=[], metavar='NAME=VALUE', help='parameters of the node')
    add('--results', type=Path, metavar='FOLDER', help='where to write the results')
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = parser().parse_args(arguments)
    args.corrections = args.corrections or (2 if args.quick else 10)
    recorder = Recorder(vars(args), quick=args.quick)
    with tempfile.TemporaryDirectory(prefix='mace-bench-') as folder:
        samples = measure(args, Path(folder))
    result = Result('learning', samples, checks(samples), reported(samples), [table(samples)], [])
    path = recorder.write(result, args.results)
    print(summary(result))
    print(f'\n{path}')


class Robot:
    """An engine, asked and corrected as by somebody who waits for each answer."""

    def __init__(self, settings: Any, storage: Path) -> None:
        """Load the model."""
        from mace_ros.engine import Engine

        self.engine = Engine(settings, storage=storage)
        self._count = 0

    def until(self, happened: Callable[[Any], bool]) -> Any:
        """Run iterations until an event fulfils the condition; return it."""
        end = time.monotonic() + ENDS_AFTER_S
        while time.monotonic() < end:
            iteration = self.engine.step()
            for event in iteration.events:
                if happened(event):
                    return event
            if iteration.wake_at is None:
                time.sleep(0.001)
        raise TimeoutError(f'nothing came within {ENDS_AFTER_S:g} s')

    def ask(self, text: str, *, no_learn: bool = True) -> Any:
        """Return the answer, greedily decoded."""
        from mace_ros.events import Finished, Query

        self._count += 1
        name = f'q{self._count}'
        self.engine.submit(Query(
            text, id=name, max_tokens=MAX_TOKENS, temperature=0.0, no_learn=no_learn))
        return self.until(lambda e: isinstance(e, Finished) and e.query_id == name)

    def teach(self, query_id: str, answer: str) -> tuple[float, Any]:
        """Correct an answer; return the seconds that it took, and its last status."""
        from mace_ros.events import Correction, CorrectionProgress, CorrectionState

        ends = (CorrectionState.LEARNED, CorrectionState.FAILED, CorrectionState.REJECTED)
        began = time.monotonic()
        self.engine.correct(Correction(answer, id=f'c-{query_id}', query_id=query_id))
        last = self.until(lambda e: isinstance(e, CorrectionProgress)
                          and e.id == f'c-{query_id}' and e.state in ends)
        return time.monotonic() - began, last


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Teach one correction after the other; return what was answered when."""
    from mace_ros.settings import PARAMETERS, Settings

    values = {}
    for name, _, value in (each.partition('=') for each in args.set):
        kind = type(PARAMETERS[name].default)
        values[name] = value == 'true' if kind is bool else kind(value)
    lessons = json.loads(LESSONS.read_text())
    robot = Robot(Settings().updated(values), folder)
    facts = []
    for question, key in lessons['facts']:
        answer = robot.ask(question).text
        if says(answer, key):
            facts.append({'question': question, 'key': key, 'before': answer})
        if len(facts) == FACTS:
            break
    print(f'{len(facts)} facts that the base model gets right', flush=True)
    taught = []
    for lesson in lessons['corrections'][:args.corrections]:
        before = robot.ask(lesson['question'], no_learn=False)
        seconds, last = robot.teach(before.query_id, lesson['answer'])
        after, again = (robot.ask(lesson[x]).text for x in ('question', 'paraphrase'))
        taught.append({
            **lesson, 'before': before.text, 'seconds': seconds, 'state': last.state.name,
            'after': after, 'after_paraphrase': again})
        print(f'{seconds:5.1f} s {last.state.name} {after!r} {again!r}', flush=True)
    for each in taught:
        each['in_the_end'] = robot.ask(each['question']).text
    for fact in facts:
        fact['after'] = robot.ask(fact['question']).text
    robot.engine.close()
    return {'corrections': taught, 'facts': facts}


def says(answer: str, key: str) -> bool:
    """Return whether an answer has its key phrase."""
    return key.lower() in answer.lower()


# -- what the samples say ----------------------------------------------------------------


def checks(samples: dict[str, Any]) -> list[Check]:
    """Return the checks of what issue 6 asks for."""
    taught, facts = samples['corrections'], samples['facts']

    def share(rows: Sequence[dict[str, Any]], column: str) -> float:
        return sum(says(r[column], r['key']) for r in rows) / len(rows)

    exact = sum(r['after'].strip() == r['answer'] for r in taught) / len(taught)
    return [
        check('one correction, median s until the version that knows it',
              statistics.median(r['seconds'] for r in taught), '<= 30',
              f'{len(taught)} corrections, longest {max(r["seconds"] for r in taught):.3g} s'),
        check('corrected answer given, word for word', exact, '>= 0.9'),
        check('corrected answer given to a paraphrase', share(taught, 'after_paraphrase'),
              '>= 0.7', 'by its key phrase; never trained on'),
        check('facts still right after all corrections', share(facts, 'after'), '>= 0.95',
              f'{len(facts)} facts, in no replay and no gate'),
        check('facts that the base model gets right', float(len(facts)), '>= 40')]


def reported(samples: dict[str, Any]) -> list[Reported]:
    """Return the numbers that explain the others."""
    taught, facts = samples['corrections'], samples['facts']
    return [
        Reported('corrections still right in the end', sum(
            says(r['in_the_end'], r['key']) for r in taught) / len(taught)),
        Reported('facts answered in the same words', sum(
            f['before'] == f['after'] for f in facts) / len(facts))]


def table(samples: dict[str, Any]) -> Table:
    """Return a row for each correction."""
    return Table('Corrections, one after the other',
                 ['question', 'before', 's', 'after', 'paraphrase', 'answer then'],
                 [[r['question'], r['before'], r['seconds'], r['after'], r['paraphrase'],
                   r['after_paraphrase']] for r in samples['corrections']])


if __name__ == '__main__':
    main()
