# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
What learning a correction does: how soon, how well, and what it does to other answers.

Three parts: ``one`` teaches idle robots one correction after the other, each to a live
answer, and each robot others; ``forty`` teaches many in a row (bench/forty.py); ``drift``
plays a trace of questions whose topics shift, under several policies (bench/drift.py).
Results: bench/results/learning.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
import json
from pathlib import Path
import statistics
import tempfile
import time
from typing import Any

from bench import drift, forty
from bench.report import summary
from bench.results import Check, check, Recorder, Reported, Result, Table
from bench.robot import Robot, says, settings_from

LESSONS = Path(__file__).with_name('lessons.json')
FACTS = 40
PARTS = ('one', 'forty', 'drift')
QUICK_SYSTEMS = ('mace', 'periodic')


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    result = argparse.ArgumentParser(prog='python -m bench.learning', description=__doc__.strip())
    add = result.add_argument
    add('--quick', action='store_true', help='a little of each: says that all runs, not how well')
    add('--only', nargs='+', choices=PARTS, default=list(PARTS),
        help='parts to run (default: all); what earlier runs found out about the others is kept')
    add('--corrections', type=int, help='of each robot of the part one (default: 10; quick: 2)')
    add('--robots', type=int, help='of the part one, all without a version at first (default: 4; '
        'quick: 1)')
    add('--many', type=int, help='corrections of the part forty (default: 40; quick: 3)')
    add('--questions', type=int, help='of the drift trace (default: 300; quick: 24)')
    add('--rate', type=float, help='questions a second of it (default: 0.16, which takes 32 '
        'minutes for each system; quick: 0.8)')
    add('--seed', default='drift', help='of it: what is asked, when, and what is true')
    add('--systems', nargs='+', choices=list(drift.SYSTEMS), help='policies that it is played to '
        '(default: all); with --only drift, what was found out about the others is kept if their '
        'trace, CPU and --set were the same, or if only one of the two is overloaded')
    add('--set', nargs='+', default=[], metavar='NAME=VALUE', help='parameters of the node')
    add('--results', type=Path, metavar='FOLDER', help='where to write the results')
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = parser().parse_args(arguments)
    args.corrections = args.corrections or (2 if args.quick else 10)
    args.robots = args.robots or (1 if args.quick else 4)
    args.many = args.many or (3 if args.quick else 40)
    args.questions = args.questions or (24 if args.quick else 300)
    args.rate = args.rate or (0.8 if args.quick else 0.16)
    args.systems = args.systems or list(QUICK_SYSTEMS if args.quick else drift.SYSTEMS)
    if 'drift' in args.only:
        drift.corpus()      # what comes before takes an hour
    recorder = Recorder(vars(args), quick=args.quick)
    samples = recorder.earlier('learning', args.results) if set(args.only) != set(PARTS) else {}
    lessons = json.loads(LESSONS.read_text())
    settings = settings_from(args.set)
    facts = 8 if args.quick else FACTS
    with tempfile.TemporaryDirectory(prefix='mace-bench-') as storage:
        if 'one' in args.only:
            samples |= measure(settings, lessons, Path(storage), robots=args.robots,
                               count=args.corrections, facts=facts)
        if 'forty' in args.only:
            samples |= forty.measure(
                settings, lessons, Path(storage) / 'forty', count=args.many, facts=facts)
        for system in args.systems if 'drift' in args.only else ():
            samples |= drift.measure(
                settings, Path(storage), samples, system=system, questions=args.questions,
                rate=args.rate, seed=args.seed, commit=recorder.commit,
                conditions={'cpu': recorder.cpu, 'set': args.set})
            # Each takes long: what is known is not to be lost with the next.
            recorder.write(result_of(samples), args.results)
    result = result_of(samples)
    path = recorder.write(result, args.results)
    if 'drift' in samples:
        drift.draw(samples, path.with_name('drift.svg'))
    print(summary(result))
    print(f'\n{path}')


def result_of(samples: Mapping[str, Any]) -> Result:
    """Return all that the samples say."""
    result = Result('learning', dict(samples))
    if 'corrections' in samples:
        result.checks += checks(samples)
        result.reported += reported(samples)
        result.tables.append(table(samples))
    if 'forty' in samples:
        result.checks += forty.checks(samples)
    if 'drift' in samples:
        result.checks += drift.checks(samples)
        result.reported += drift.reported(samples)
        result.tables.append(drift.table(samples))
    return result


def measure(settings: Any, lessons: Mapping[str, Any], folder: Path, *, robots: int, count: int,
            facts: int) -> dict[str, Any]:
    """Teach each robot ``count`` others of the lessons; return what was answered when."""
    taught: list[dict[str, Any]] = []
    known: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    steps = 0
    for number in range(robots):
        robot = Robot(settings, folder / f'one-{number}')
        known = known or robot.facts(lessons['facts'], facts)
        rows = [teach(robot, lesson)
                for lesson in lessons['corrections'][number * count:(number + 1) * count]]
        steps += robot.engine.scheduler.statistics(time.monotonic()).finetune_steps
        taught += [{'robot': number, **row, 'in_the_end': robot.ask(row['question']).text}
                   for row in rows]
        kept += [{'robot': number, **fact, 'after': robot.ask(fact['question']).text}
                 for fact in known]
        robot.engine.close()
    return {'corrections': taught, 'facts': kept, 'steps': steps}


def teach(robot: Robot, lesson: Mapping[str, str]) -> dict[str, Any]:
    """Correct a live answer; return how long it took, and what is answered then."""
    before = robot.ask(lesson['question'], no_learn=False)
    seconds, last = robot.teach(before.query_id, lesson['answer'])
    after, again = (robot.ask(lesson[x]).text for x in ('question', 'paraphrase'))
    print(f'{seconds:5.1f} s {last.state.name} {after!r} {again!r}', flush=True)
    return {**lesson, 'before': before.text, 'seconds': seconds, 'state': last.state.name,
            'after': after, 'after_paraphrase': again}


# -- what the samples say ----------------------------------------------------------------


def checks(samples: Mapping[str, Any]) -> list[Check]:
    """Return the checks."""
    taught, facts = samples['corrections'], samples['facts']
    known = len(facts) // len({r['robot'] for r in taught})
    exact = sum(r['after'].strip() == r['answer'] for r in taught) / len(taught)
    return [
        check('one correction, median s until the version that knows it',
              statistics.median(r['seconds'] for r in taught), '<= 30',
              f'{len(taught)} corrections, longest {max(r["seconds"] for r in taught):.3g} s'),
        check('corrected answer given, word for word', exact, '>= 0.9'),
        said('corrected answer given to a paraphrase', taught, 'after_paraphrase', '>= 0.7',
             'by its key phrase; never trained on'),
        said('facts still right after all corrections', facts, 'after', '>= 0.95',
             f'{known} facts, in no replay and no gate'),
        check('facts that the base model gets right', float(known), '>= 40')]


def said(name: str, rows: Sequence[Mapping[str, Any]], column: str, target: str,
         note: str) -> Check:
    """Return a check of how many answers have their key phrase, with a note on each robot."""
    by_robot: dict[int, list[bool]] = {}
    for row in rows:
        by_robot.setdefault(row['robot'], []).append(says(row[column], row['key']))
    right = [sum(each) for each in by_robot.values()]
    return check(name, sum(right) / len(rows), target,
                 f'{note}; {", ".join(map(str, right))} by robot')


def reported(samples: Mapping[str, Any]) -> list[Reported]:
    """Return the numbers that explain the others."""
    taught, facts = samples['corrections'], samples['facts']
    return [
        Reported('corrections still right in the end', sum(
            says(r['in_the_end'], r['key']) for r in taught) / len(taught)),
        Reported('fine-tune steps, of all corrections', samples.get('steps')),
        Reported('facts answered in the same words', sum(
            f['before'] == f['after'] for f in facts) / len(facts))]


def table(samples: Mapping[str, Any]) -> Table:
    """Return a row for each correction."""
    return Table('Corrections, one after the other',
                 ['question', 'before', 's', 'after', 'paraphrase', 'answer then'],
                 [[r['question'], r['before'], r['seconds'], r['after'], r['paraphrase'],
                   r['after_paraphrase']] for r in samples['corrections']])


if __name__ == '__main__':
    main()
