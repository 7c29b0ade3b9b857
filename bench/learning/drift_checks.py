# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Checks, numbers, table and curve of the drift trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.common.results import Check, check, percentile, Reported, Table
from bench.learning.drift_systems import SYSTEMS

WINDOW = 25             # questions of the moving average


def alignment(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of answers that were right when they were asked."""
    return sum(r['right'] for r in rows) / len(rows)


def curve(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Return times with the share of right answers among the last :data:`WINDOW`."""
    ordered = sorted(rows, key=lambda r: r['at'])
    return [(row['at'], alignment(ordered[max(i + 1 - WINDOW, 0):i + 1]))
            for i, row in enumerate(ordered)]


def area(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean of :func:`curve` over time."""
    points = curve(rows)
    total = sum((points[i + 1][0] - at) * (points[i + 1][1] + height) / 2.0
                for i, (at, height) in enumerate(points[:-1]))
    return total / max(points[-1][0] - points[0][0], 1e-9)


def by_system(samples: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the totals of each system that ran."""
    result = {}
    order = list(SYSTEMS)
    for run in sorted(samples['drift_runs'], key=lambda r: order.index(r['system'])):
        rows = [r for r in samples['drift'] if r['system'] == run['system']]
        # A question without an answer counts as wrong.
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
        check('alignment of mace over the most that a policy could reach',
              numbers['mace']['alignment'] / _bound(samples) if 'mace' in numbers else None,
              '>= 0.95'),
        check('alignment of mace over that of continuous',
              _ratio(numbers, 'alignment', 'mace', 'continuous'), '>= 1'),
        check('alignment of mace over that of continuous, overloaded',
              _ratio(numbers, 'alignment', 'mace, overloaded', 'continuous, overloaded'), '>= 1'),
        check('fine-tune device time of mace over that of continuous',
              _ratio(numbers, 'learning_s', 'mace', 'continuous'), '<= 0.35'),
        check('alignment of mace over that of periodic',
              _ratio(numbers, 'alignment', 'mace', 'periodic'), '>= 1.2'),
        check('area of the alignment of mace over that of continuous',
              _ratio(numbers, 'area', 'mace', 'continuous'), '>= 1'),
        check('area of the alignment of mace over that of periodic',
              _ratio(numbers, 'area', 'mace', 'periodic'), '>= 1.2'),
        check('alignment of mace over that without rests',
              _ratio(numbers, 'alignment', 'mace', 'mace, no drift'), '>= 0.95'),
        # Not seconds: the machine's speed can change between two runs of the same steps.
        check('fine-tune steps of mace over those without rests',
              _ratio(numbers, 'steps', 'mace', 'mace, no drift'), '<= 1'),
        check('alignment per fine-tune second of mace over that without priority, overloaded',
              _per_second(numbers, 'mace, overloaded', 'mace, overloaded, no priority'), '>= 1')]


def reported(samples: Mapping[str, Any]) -> list[Reported]:
    """Return numbers without a target that explain the checks."""
    numbers = by_system(samples)
    found = [
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
    """Return the share of questions that were asked before with the same true answer."""
    rows = _usual(samples)
    return 1.0 - len({(r['question'], r['truth']) for r in rows}) / len(rows)


def _usual(samples: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the answers of one system, if possible one that was not overloaded."""
    ran = sorted(by_system(samples), key=lambda name: SYSTEMS[name].overloaded)
    return [r for r in samples['drift'] if r['system'] == ran[0]]


def table(samples: Mapping[str, Any]) -> Table:
    """Return the table with a row for each system."""
    columns = ['alignment', 'area', 'learning_s', 'ttft_p95_ms', 'tpot_p95_ms', 'versions',
               'rejected', 'steps', 'drifting', 'unlearned', 'asked', 'seconds', 'commit', 'cpu']
    return Table(
        'Drift trace', ['system', *columns, 'set'],
        [[name, *(row[c] for c in columns), ' '.join(row['set'])]
         for name, row in by_system(samples).items()],
        'alignment: share of answers right when asked; area: the same over time; learning_s: '
        'device seconds of fine-tuning, scoring and gate included')
