# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A curve of time against tokens, fitted as measurements come in, and its errors."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
import math
from typing import Any

import numpy as np

# 1, 2, 3, 4, 6, 8, 12, ... 65536: two knots an octave follow the steps that kernel
# selection makes, and are few enough for each to be measured again and again.
KNOTS = sorted({1 << k for k in range(17)} | {3 << k for k in range(15)})
_COUNT = len(KNOTS)


class Curve:
    """
    Seconds = piecewise linear in the tokens + a cost for each unit of some contexts.

    A Kalman filter over the knots' levels and the contexts' coefficients. Neighbouring
    knots are correlated at first, so that a few measurements shape the whole curve;
    a knot's own measurements then settle it. Every observed quantity is taken to drift
    a little, which is how old measurements are forgotten. What lies further off than
    the filter expects counts as an outlier: it moves the state by a bounded amount
    (Huber) and makes it no surer.
    """

    NOISE = 0.08          # spread of a measurement, of its value
    OUTLIER = 1.5         # in standard deviations
    SPREAD = 1.0          # how far a level may be from the first guess, of its value
    REACH = 4.0           # in knots: correlation of neighbouring levels at first
    DRIFT = 0.01          # of a level, with each measurement of it
    CONTEXT_SPREAD = 0.3  # a pass of one token may so far grow by 1000 units of context
    CONTEXT_DRIFT = 0.003
    SURE = 0.5            # most variance of a sure prediction, of a measurement's variance
    SKIPPED = 3           # so many of four measurements as expected, where it is sure

    def __init__(self, contexts: int = 0) -> None:
        """Begin without a measurement, for measurements with so many ``contexts``."""
        self._contexts = contexts
        # Levels are held relative to ``_guess``, coefficients to ``_unit``.
        self._guess = np.zeros(_COUNT)
        self._unit = 0.0
        self._state = np.concatenate([np.ones(_COUNT), np.zeros(contexts)])
        self._covariance = np.zeros((_COUNT + contexts, _COUNT + contexts))
        self._skips: dict[int, int] = {}    # how many more of this size
        self._levels = [0.0] * _COUNT
        self.coefficients = [0.0] * contexts

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured."""
        return self._unit == 0.0

    def at(self, tokens: int) -> float:
        """Return the seconds for ``tokens`` >= 1 without context; 0 if empty."""
        index = min(bisect_right(KNOTS, tokens), _COUNT - 1) - 1
        below = self._levels[index]
        start = KNOTS[index]
        return below + (self._levels[index + 1] - below) * (
            (tokens - start) / (KNOTS[index + 1] - start))

    def observe(self, tokens: int, contexts: tuple[int, ...], seconds: float) -> bool:
        """
        Learn that ``tokens`` with ``contexts`` took ``seconds``, which is > 0.

        Return whether the curve was sure already of what it had to say about it.
        """
        if self.is_empty:
            self._start(tokens, seconds)
        elif self._is_as_expected(tokens, contexts, seconds):
            return True
        state, covariance = self._state, self._covariance
        index = min(bisect_right(KNOTS, tokens), _COUNT - 1) - 1
        share = (tokens - KNOTS[index]) / (KNOTS[index + 1] - KNOTS[index])
        # The row of the measurement matrix is zero but for these.
        row = [(index, (1.0 - share) * float(self._guess[index])),
               (index + 1, share * float(self._guess[index + 1]))]
        row += [(_COUNT + i, context * self._unit) for i, context in enumerate(contexts)]
        predicted = sum(weight * float(state[i]) for i, weight in row)
        spread = row[0][1] * covariance[row[0][0]]
        for i, weight in row[1:]:
            spread = spread + weight * covariance[i]
        unsure = sum(weight * float(spread[i]) for i, weight in row)
        noise = (self.NOISE * max(predicted, 0.3 * seconds)) ** 2
        off = (seconds - predicted) / math.sqrt(unsure + noise)
        bounded = min(max(off, -self.OUTLIER), self.OUTLIER)
        state += spread * (bounded / math.sqrt(unsure + noise))
        np.maximum(state[:_COUNT], 0.02, out=state[:_COUNT])
        np.maximum(state[_COUNT:], 0.0, out=state[_COUNT:])
        if bounded == off:
            covariance -= np.outer(spread, spread / (unsure + noise))
        for i, weight in row:
            if weight:
                drift, most = ((self.DRIFT * float(state[i]), self.SPREAD) if i < _COUNT
                               else (self.CONTEXT_DRIFT, self.CONTEXT_SPREAD))
                covariance[i, i] = min(covariance[i, i] + drift ** 2, most ** 2)
        self._publish()
        sure = unsure < self.SURE * noise
        self._skips[tokens] = self.SKIPPED if sure else 0
        return sure

    def _is_as_expected(self, tokens: int, contexts: tuple[int, ...], seconds: float) -> bool:
        """Return whether a measurement can be left out, which saves most of the filter's time."""
        left = self._skips.get(tokens, 0)
        if not left:
            return False
        expected = self.at(tokens)
        for coefficient, context in zip(self.coefficients, contexts, strict=True):
            expected += coefficient * context
        if abs(seconds - expected) > 0.5 * self.NOISE * expected:
            return False
        self._skips[tokens] = left - 1
        return True

    def _start(self, tokens: int, seconds: float) -> None:
        """Guess the curve from one measurement: flat up to some tens of tokens, then linear."""
        shape = 1.0 + np.array(KNOTS) / 64.0
        self._guess = seconds * shape / (1.0 + tokens / 64.0)
        self._unit = float(self._guess[0]) / 1000.0
        distance = np.abs(np.subtract.outer(np.arange(_COUNT), np.arange(_COUNT)))
        self._covariance[:_COUNT, :_COUNT] = self.SPREAD ** 2 * np.exp(-distance / self.REACH)
        for i in range(_COUNT, len(self._state)):
            self._covariance[i, i] = self.CONTEXT_SPREAD ** 2

    def _publish(self) -> None:
        """Lay the state out for :meth:`at`, which is called far more often."""
        self._levels = (self._state[:_COUNT] * self._guess).tolist()
        self.coefficients = (self._state[_COUNT:] * self._unit).tolist()

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain data; ``seconds`` are the levels at the knots."""
        return {
            'tokens': KNOTS, 'seconds': self._levels, 'coefficients': self.coefficients,
            'guess': self._guess.tolist(), 'unit': self._unit,
            'state': self._state.tolist(), 'covariance': self._covariance.tolist(),
            'skips': [[tokens, left] for tokens, left in self._skips.items()]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Curve:
        """Return the curve that :meth:`to_dict` described."""
        curve = cls(len(data['coefficients']))
        curve._guess, curve._unit = np.array(data['guess']), data['unit']
        curve._state = np.array(data['state'])
        curve._covariance = np.array(data['covariance'])
        curve._skips = dict(data['skips'])
        curve._publish()
        return curve


class Ratios:
    """The latest ratios of measured to predicted time; ``upper`` is their 0.9 quantile."""

    KEPT = 64
    QUANTILE = 0.9
    # Until a few ratios are known: as for a machine that is a little noisy.
    UNKNOWN, FEWEST = 1.2, 8

    def __init__(self, ratios: Iterable[float] = ()) -> None:
        """Begin with these, oldest first."""
        self._latest: deque[float] = deque()
        self._sorted: list[float] = []
        self.upper = self.UNKNOWN
        for ratio in ratios:
            self.add(ratio)

    def __iter__(self) -> Iterator[float]:
        """Iterate from the oldest to the newest."""
        return iter(self._latest)

    def add(self, ratio: float) -> None:
        """Note that a prediction was to be multiplied by ``ratio``."""
        if len(self._latest) == self.KEPT:
            del self._sorted[bisect_left(self._sorted, self._latest.popleft())]
        self._latest.append(ratio)
        insort(self._sorted, ratio)
        if len(self._sorted) >= self.FEWEST:
            rank = math.ceil(self.QUANTILE * len(self._sorted)) - 1
            # An upper bound below the prediction itself would be nonsense.
            self.upper = max(self._sorted[rank], 1.0)
