# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
What a benchmark finds: samples, and checks, numbers and tables computed from them.

:mod:`bench.common.recording` writes them to a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
import math
import statistics
from typing import Any


@dataclass(frozen=True)
class Check:
    """
    A measured value and the target that it must meet.

    ``target`` is ``<= x``, ``>= x`` or ``x to y``. A ``value`` of None was not measured and
    does not hold. ``note`` says how the value was obtained.
    """

    name: str
    value: float | None
    target: str
    holds: bool
    note: str = ''


@dataclass(frozen=True)
class Reported:
    """A number without a target; ``aim`` is the value that we would like, as text."""

    name: str
    value: float | None
    aim: str = ''
    note: str = ''


@dataclass(frozen=True)
class Table:
    """A table for the report; cells are text, numbers or None."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ''


@dataclass
class Result:
    """Everything that a benchmark found."""

    bench: str
    samples: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    reported: list[Reported] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check(name: str, value: float | None, target: str, note: str = '') -> Check:
    """Compare ``value`` with ``target``; raises ``ValueError`` if the target is malformed."""
    if value is not None and not math.isfinite(value):
        value = None
    words = target.split()
    match words:
        case ['<=', limit]:
            holds = value is not None and value <= float(limit)
        case ['>=', limit]:
            holds = value is not None and value >= float(limit)
        case [low, 'to', high]:
            holds = value is not None and float(low) <= value <= float(high)
        case _:
            raise ValueError(f'{name}: target {target!r} is not <= x, >= x or x to y')
    return Check(name, value, target, holds, note if value is not None else note or 'not measured')


def percentile(values: Iterable[float | None], percent: float) -> float:
    """Return a percentile, interpolated between ranks; None is left out, no values give NaN."""
    ordered = sorted(v for v in values if v is not None and not math.isnan(v))
    if not ordered:
        return math.nan
    position = (len(ordered) - 1) * percent / 100.0
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    # Without this case, two infinite neighbours would give NaN.
    if ordered[low] == ordered[high]:
        return ordered[low]
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True)
class Ratio:
    """The ratios of two systems, one per block that both of them ran."""

    blocks: tuple[float, ...]

    @property
    def median(self) -> float | None:
        """The median, which one noisy block hardly changes; None without blocks."""
        return statistics.median(self.blocks) if self.blocks else None

    @property
    def spread(self) -> str:
        """The number of blocks and the range of their ratios, as text."""
        if not self.blocks:
            return 'not measured'
        count = len(self.blocks)
        return (f'median of {count} paired block{"s" * (count != 1)}, '
                f'{min(self.blocks):.3g} to {max(self.blocks):.3g}')


def paired(above: Mapping[int, float], below: Mapping[int, float]) -> Ratio:
    """Return the ratio ``above / below`` of each block in which both were measured."""
    ratios = [above[b] / below[b] for b in sorted(above.keys() & below.keys()) if below[b]]
    return Ratio(tuple(r for r in ratios if math.isfinite(r)))
