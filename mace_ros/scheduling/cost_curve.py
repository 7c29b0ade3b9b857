# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A curve of time against tokens that is fitted online, and the spread around it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

# 1, 2, 3, 4, 6, 8, 12, ... 65536: two knots per octave follow the steps of kernel selection, and
# are few enough for each one to be measured often.
KNOTS = sorted({1 << k for k in range(17)} | {3 << k for k in range(15)})
_COUNT = len(KNOTS)

Vector: TypeAlias = NDArray[np.float64]


@dataclass
class FilterState:
    """
    State of a curve's Kalman filter.

    Levels are relative to ``guess`` (seconds at each knot), coefficients of extra terms to ``unit``
    (seconds); ``unit`` is 0 until the first measurement.
    """

    mean: Vector            # levels of the knots, then coefficients of the extra terms
    covariance: Vector
    guess: Vector
    unit: float = 0.0
    skips: dict[int, int] = field(default_factory=dict)    # measurements to skip, by tokens

    @classmethod
    def empty(cls, terms: int) -> FilterState:
        """Return the state before any measurement."""
        size = _COUNT + terms
        return cls(np.concatenate([np.ones(_COUNT), np.zeros(terms)]),
                   np.zeros((size, size)), np.zeros(_COUNT))


class Curve:
    """
    Seconds as a piecewise linear function of tokens, plus extra terms.

    An extra term is a coefficient, at least 0, times a number that is given with the tokens, such
    as the tokens that they attend to. A Kalman filter over the levels at the knots and the
    coefficients of the terms.
    Neighbouring knots are correlated at first, so that a few measurements shape the whole curve;
    each knot's own measurements then settle it. Every observed quantity is assumed to drift a
    little, so that old measurements are forgotten. A measurement further off than the filter
    expects is an outlier: it moves the mean by a bounded amount (Huber) and leaves the
    covariance.
    """

    NOISE = 0.08          # standard deviation of a measurement, relative to its value
    OUTLIER = 1.5         # in standard deviations
    SPREAD = 1.0          # initial standard deviation of a level, relative to the first guess
    REACH = 4.0           # correlation length of neighbouring levels at first, in knots
    DRIFT = 0.01          # of a level, with each measurement of it
    LEAST = 0.02          # smallest level, relative to the first guess
    TERM_DRIFT = 0.01     # of a coefficient, relative to its spread
    SURE = 0.5            # largest variance of a sure prediction, relative to a measurement's
    SKIPPED = 3           # of four measurements of a sure size that are as expected

    def __init__(self, spreads: Sequence[float] = (), state: FilterState | None = None) -> None:
        """
        Start from ``state``, or without measurements.

        ``spreads`` are the initial standard deviations of the extra terms: of a one-token pass's
        time, for a number of 1000. Raises ``ValueError`` if ``state`` has another number of them.
        """
        self.state = state if state is not None else FilterState.empty(len(spreads))
        if len(self.state.mean) != _COUNT + len(spreads):
            raise ValueError(f'not the state of a curve with {len(spreads)} extra terms')
        self._spreads = spreads
        self._lowest = np.repeat([self.LEAST, 0.0], [_COUNT, len(spreads)])
        self.coefficients: list[float] = []
        self._levels: list[float] = []
        self._cache_levels()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured."""
        return self.state.unit == 0.0

    @property
    def levels(self) -> list[float]:
        """Seconds at each knot, without extra terms."""
        return self._levels

    def at(self, tokens: int) -> float:
        """Return the seconds for ``tokens`` >= 1 without extra terms; 0 if empty."""
        index = bisect_right(KNOTS, tokens, 0, _COUNT - 1) - 1
        below = self._levels[index]
        start = KNOTS[index]
        return below + (self._levels[index + 1] - below) * (
            (tokens - start) / (KNOTS[index + 1] - start))

    def observe(self, tokens: int, terms: tuple[int, ...], seconds: float) -> bool:
        """
        Learn that ``tokens`` with the numbers of the extra ``terms`` took ``seconds`` > 0.

        Returns whether the curve was already sure of its prediction.
        """
        state = self.state
        if self.is_empty:
            self._start(tokens, seconds)
        elif self._is_as_expected(tokens, terms, seconds):
            return True
        mean, covariance = state.mean, state.covariance
        index = bisect_right(KNOTS, tokens, 0, _COUNT - 1) - 1
        share = (tokens - KNOTS[index]) / (KNOTS[index + 1] - KNOTS[index])
        # The nonzero entries of the measurement matrix's row.
        row = [(i, weight) for i, weight in (
            (index, (1.0 - share) * float(state.guess[index])),
            (index + 1, share * float(state.guess[index + 1])),
            *((_COUNT + i, number * state.unit) for i, number in enumerate(terms))) if weight]
        predicted = sum([weight * float(mean[i]) for i, weight in row])
        gain = row[0][1] * covariance[row[0][0]]
        for i, weight in row[1:]:
            gain += weight * covariance[i]
        variance = sum([weight * float(gain[i]) for i, weight in row])
        noise = (self.NOISE * max(predicted, 0.3 * seconds)) ** 2
        deviation = (seconds - predicted) / math.sqrt(variance + noise)
        bounded = min(max(deviation, -self.OUTLIER), self.OUTLIER)
        mean += gain * (bounded / math.sqrt(variance + noise))
        np.maximum(mean, self._lowest, out=mean)
        if bounded == deviation:
            covariance -= gain[:, None] * (gain / (variance + noise))
        for i, _ in row:
            limit = self.SPREAD if i < _COUNT else self._spreads[i - _COUNT]
            drift = self.DRIFT * float(mean[i]) if i < _COUNT else self.TERM_DRIFT * limit
            covariance[i, i] = min(covariance[i, i] + drift ** 2, limit ** 2)
        self._cache_levels()
        sure = variance < self.SURE * noise
        state.skips[tokens] = self.SKIPPED if sure else 0
        return sure

    def _is_as_expected(self, tokens: int, terms: tuple[int, ...], seconds: float) -> bool:
        """Return whether to skip a measurement, which saves most of the filter's time."""
        left = self.state.skips.get(tokens, 0)
        if not left:
            return False
        expected = self.at(tokens)
        for coefficient, number in zip(self.coefficients, terms, strict=True):
            expected += coefficient * number
        if abs(seconds - expected) > self.NOISE * expected:
            return False
        self.state.skips[tokens] = left - 1
        return True

    def _start(self, tokens: int, seconds: float) -> None:
        """Guess the curve from one measurement: flat up to some tens of tokens, then linear."""
        shape = 1.0 + np.array(KNOTS) / 64.0
        self.state.guess = seconds * shape / (1.0 + tokens / 64.0)
        self.state.unit = float(self.state.guess[0]) / 1000.0
        covariance = self.state.covariance
        distance = np.abs(np.subtract.outer(np.arange(_COUNT), np.arange(_COUNT)))
        covariance[:_COUNT, :_COUNT] = self.SPREAD ** 2 * np.exp(-distance / self.REACH)
        for i, spread in enumerate(self._spreads, start=_COUNT):
            covariance[i, i] = spread ** 2

    def _cache_levels(self) -> None:
        """Convert the filter's mean for :meth:`at`, which is called far more often."""
        self._levels = (self.state.mean[:_COUNT] * self.state.guess).tolist()
        self.coefficients = (self.state.mean[_COUNT:] * self.state.unit).tolist()


class Ratios:
    """The latest ratios of measured to predicted time; ``upper`` is their 0.9 quantile."""

    KEPT = 64
    QUANTILE = 0.9
    # Upper ratio until FEWEST ratios are known: that of a slightly noisy machine.
    UNKNOWN, FEWEST = 1.2, 8

    def __init__(self, ratios: Iterable[float] = ()) -> None:
        """Start with ``ratios``, oldest first."""
        self._latest: deque[float] = deque()
        self._sorted: list[float] = []
        self.upper = self.UNKNOWN
        for ratio in ratios:
            self.add(ratio)

    def __iter__(self) -> Iterator[float]:
        """Iterate from the oldest to the newest."""
        return iter(self._latest)

    def add(self, ratio: float) -> None:
        """Add the ratio of a new measurement to its prediction."""
        if len(self._latest) == self.KEPT:
            del self._sorted[bisect_left(self._sorted, self._latest.popleft())]
        self._latest.append(ratio)
        insort(self._sorted, ratio)
        if len(self._sorted) >= self.FEWEST:
            rank = math.ceil(self.QUANTILE * len(self._sorted)) - 1
            # Never below 1: an upper bound is not below the prediction itself.
            self.upper = max(self._sorted[rank], 1.0)
