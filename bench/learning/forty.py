# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Many corrections in a row: whether the first ones, and everything else, stay right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.common.results import Check, check
from bench.common.text import contains_phrase
from bench.learning.aims import Aims
from bench.learning.one import same_words


def measure(settings: Any, lessons: Mapping[str, Any], folder: Path, *, count: int,
            facts: int) -> dict[str, Any]:
    """Teach ``count`` corrections, each to a live answer; return the answers after the last."""
    from bench.systems.interactive import InteractiveEngine

    robot = InteractiveEngine(settings, folder)
    base = robot.perplexity(live=False)
    known = robot.known_facts(lessons['facts'], facts)
    taught = []
    for lesson in lessons['corrections'][:count]:
        wrong = robot.ask(lesson['question'], no_learn=False)
        if wrong.text.strip() == lesson['answer']:
            seconds, state = 0.0, 'KNOWN'
        else:
            seconds, last = robot.teach(wrong.query_id, lesson['answer'])
            state = last.state.name
        taught.append({'question': lesson['question'], 'answer': lesson['answer'],
                       'key': lesson['key'], 'seconds': seconds, 'state': state})
        print(f'{len(taught)}: {seconds:5.1f} s {state}', flush=True)
    for each in taught:
        each['in_the_end'] = robot.ask(each['question']).text
    for fact in known:
        fact['after'] = robot.ask(fact['question']).text
    perplexity = robot.perplexity(live=True)
    robot.close()
    return {'forty': taught, 'forty_facts': known,
            'perplexity': [{'adapter': 'base', 'value': base},
                           {'adapter': 'live', 'value': perplexity}]}


def checks(samples: Mapping[str, Any], aims: Aims) -> list[Check]:
    """Return the checks."""
    taught: Sequence[Mapping[str, Any]] = samples['forty']
    facts: Sequence[Mapping[str, Any]] = samples['forty_facts']
    base, live = (row['value'] for row in samples['perplexity'])
    exact = sum(r['in_the_end'].strip() == r['answer'] for r in taught) / len(taught)
    return [
        check(f'of {len(taught)} corrections in a row, right in the end', exact, aims.in_a_row,
              'word for word'),
        check('facts still right after them',
              sum(contains_phrase(f['after'], f['key']) for f in facts) / len(facts),
              aims.facts_after, f'{len(facts)} facts, in no replay and no gate'),
        *same_words('facts answered in the same words after them', facts, aims),
        check('perplexity on chat text after them, over that of the base model', live / base,
              '<= 1.10', f'{base:.3g} before, {live:.3g} after')]
