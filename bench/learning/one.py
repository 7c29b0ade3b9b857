# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Corrections one after the other, on several robots that start without a version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
import statistics
import time
from typing import Any, TYPE_CHECKING

from bench.common.results import Check, check, Reported, Table
from bench.common.text import contains_phrase
from bench.learning.aims import Aims

if TYPE_CHECKING:
    from bench.systems.interactive import InteractiveEngine


def measure(settings: Any, lessons: Mapping[str, Any], folder: Path, *, robots: int, count: int,
            facts: int) -> dict[str, Any]:
    """Teach each robot ``count`` different lessons; return all answers and times."""
    from bench.systems.interactive import InteractiveEngine

    taught: list[dict[str, Any]] = []
    known: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    steps = 0
    for number in range(robots):
        robot = InteractiveEngine(settings, folder / f'one-{number}')
        known = known or robot.known_facts(lessons['facts'], facts)
        rows = [teach(robot, lesson)
                for lesson in lessons['corrections'][number * count:(number + 1) * count]]
        steps += robot.engine.scheduler.statistics(time.monotonic()).finetune_steps
        taught += [{'robot': number, **row, 'in_the_end': robot.ask(row['question']).text}
                   for row in rows]
        kept += [{'robot': number, **fact, 'after': robot.ask(fact['question']).text}
                 for fact in known]
        robot.close()
    return {'corrections': taught, 'facts': kept, 'steps': steps}


def teach(robot: InteractiveEngine, lesson: Mapping[str, str]) -> dict[str, Any]:
    """Correct a live answer; return the time and the answers before and after."""
    before = robot.ask(lesson['question'], no_learn=False)
    seconds, last = robot.teach(before.query_id, lesson['answer'])
    after, paraphrased = (robot.ask(lesson[x]).text for x in ('question', 'paraphrase'))
    print(f'{seconds:5.1f} s {last.state.name} {after!r} {paraphrased!r}', flush=True)
    return {**lesson, 'before': before.text, 'seconds': seconds, 'state': last.state.name,
            'after': after, 'after_paraphrase': paraphrased}


def checks(samples: Mapping[str, Any], aims: Aims) -> list[Check]:
    """Return the checks."""
    taught, facts = samples['corrections'], samples['facts']
    known = len(facts) // len({r['robot'] for r in taught})
    exact = sum(r['after'].strip() == r['answer'] for r in taught) / len(taught)
    return [
        check('one correction, median s until the version that knows it',
              statistics.median(r['seconds'] for r in taught), aims.seconds,
              f'{len(taught)} corrections, longest {max(r["seconds"] for r in taught):.3g} s'),
        check('corrected answer given, word for word', exact, '>= 0.9'),
        _phrase_check('corrected answer given to a paraphrase', taught, 'after_paraphrase',
                      aims.paraphrases, 'by its key phrase; never trained on'),
        _phrase_check('facts still right after all corrections', facts, 'after', aims.facts,
                      f'{known} facts, in no replay and no gate'),
        *same_words('facts answered in the same words', facts, aims),
        check('facts that the base model gets right', float(known), '>= 40')]


def same_words(name: str, facts: Sequence[Mapping[str, Any]], aims: Aims) -> list[Check]:
    """Return a check of the share of facts whose answer did not change, if that is an aim."""
    same = sum(f['before'] == f['after'] for f in facts)
    return [check(name, same / len(facts), aims.same_words, f'{same} of {len(facts)}')
            ] if aims.same_words else []


def _phrase_check(name: str, rows: Sequence[Mapping[str, Any]], column: str, target: str,
                  note: str) -> Check:
    """Return a check of the share of answers with their key phrase; the note counts by robot."""
    by_robot: dict[int, list[bool]] = {}
    for row in rows:
        by_robot.setdefault(row['robot'], []).append(contains_phrase(row[column], row['key']))
    right = [sum(each) for each in by_robot.values()]
    return check(name, sum(right) / len(rows), target,
                 f'{note}; {", ".join(map(str, right))} by robot')


def reported(samples: Mapping[str, Any]) -> list[Reported]:
    """Return numbers without a target that explain the checks."""
    taught = samples['corrections']
    return [
        Reported('corrections still right in the end', sum(
            contains_phrase(r['in_the_end'], r['key']) for r in taught) / len(taught)),
        Reported('fine-tune steps, of all corrections', samples.get('steps'))]


def table(samples: Mapping[str, Any]) -> Table:
    """Return the table with a row for each correction."""
    return Table('Corrections, one after the other',
                 ['question', 'before', 's', 'after', 'paraphrase', 'answer then'],
                 [[r['question'], r['before'], r['seconds'], r['after'], r['paraphrase'],
                   r['after_paraphrase']] for r in samples['corrections']])
