# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Checks, numbers and the table of the durability benchmark."""

from __future__ import annotations

from collections import Counter
from typing import Any

from bench.common.results import Check, check, Reported, Table
from bench.durability.kills import ROUNDS

# Phases that must have been interrupted by some kills.
PHASES = ('intake', 'training', 'saving', 'recording', 'publishing')


def checks(samples: dict[str, Any]) -> list[Check]:
    """Return the checks."""
    kills = samples['kills']

    def total(column: str) -> tuple[float, str]:
        found = [x for kill in kills for x in kill[column]]
        return float(len(found)), '; '.join(map(str, found[:3]))

    hits = Counter(phase for kill in kills for phase in kill['phases'])
    acknowledged = kills[-1]['acknowledged']
    rows = [
        ('acknowledged corrections lost', 'lost', f'of {acknowledged}'),
        ('versions on disk or on record that do not load', 'damaged', ''),
        ('versions that were announced, and older ones live', 'older', ''),
        ('starts on another version than the live one, or beside a half-written one',
         'started_on', f'of {len(kills)}'),
        ('answers from a version that is not on record', 'unknown', '')]
    return [
        check('kills', float(len(kills)), f'>= {ROUNDS}'),
        *(check(name, total(column)[0], '<= 0', total(column)[1] or note)
          for name, column, note in rows),
        check('kills that fell into each phase, fewest', float(min(hits[p] for p in PHASES)),
              '>= 3', ', '.join(f'{phase} {hits[phase]}' for phase in hits)),
        check('errors in the log', float(sum(samples['log'].values())), '<= 0')]


def reported(samples: dict[str, Any]) -> list[Reported]:
    """Return numbers without a target that explain the checks."""
    last = samples['kills'][-1]
    return [
        Reported('corrections acknowledged', float(last['acknowledged'])),
        Reported('versions published', float(last['published']))]


def table(samples: dict[str, Any]) -> Table:
    """Return the table with a row for each kill."""
    return Table('Kills', ['aim', 'under way', 'lived, s', 'acknowledged', 'live'],
                 [[k['aim'], ', '.join(k['phases']), k['lived_s'], k['acknowledged'],
                   ', '.join(f'{p} {v}' for p, v in k['live'].items())]
                  for k in samples['kills']],
                 'Under way: phases that the kill interrupted, by their traces on disk and in '
                 'the messages.')
