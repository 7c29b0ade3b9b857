# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
How much to learn: more while what is asked of the robot changes, little while it is calm.

Each answer has an outcome between 0 (nobody objected) and 1 (corrected, and the corrected
text was a full surprise). ADWIN (Bifet and Gavaldà 2007, by river) keeps a window of them
without a change in their mean, and tells when that mean has moved. That drift decides about
the frequency of learning is MACE's idea (arXiv 2510.03283); the signal and the rule are ours.
"""

from __future__ import annotations

from enum import IntEnum
import math

from river.drift import ADWIN

# A change that is not there is seen once in so many windows.
FALSE_ALARMS = 0.05
# Before so many outcomes nothing is known, and the robot learns as much as it may.
ENOUGH = 5
# A rise counts until the mean has halved.
OVER = 0.5
# After so many more answers it counts that nobody objected to one.
OPEN = 8


class DriftState(IntEnum):
    """What is known about drift; the values are those of ``Scheduler.msg``."""

    UNKNOWN = 0
    CALM = 1
    DRIFTING = 2


class Drift:
    """Watches the outcomes of answers."""

    def __init__(self) -> None:
        """Begin without an outcome."""
        # The library's default looks at every 32nd value only: corrections are rarer.
        self._window = ADWIN(delta=FALSE_ALARMS, clock=1, grace_period=ENOUGH)
        self._count = 0
        self._open: dict[str, None] = {}   # queries whose answers have no outcome yet, oldest first
        self._peak: float | None = None    # mean surprise since the rise; None: calm
        self.rises = 0

    def answered(self, query_id: str) -> None:
        """Note an answer: a good one, unless it is corrected before :data:`OPEN` more."""
        self.corrected(query_id)        # an id that is used again
        self._open[query_id] = None
        if len(self._open) > OPEN:
            del self._open[next(iter(self._open))]
            self.outcome(0.0)

    def corrected(self, query_id: str) -> None:
        """Note that an answer's outcome will be the surprise of its correction."""
        self._open.pop(query_id, None)

    def outcome(self, surprise: float) -> None:
        """Note how an answer turned out; 0 is fine, 1 as wrong as can be."""
        before = self._window.estimation
        self._window.update(min(max(surprise, 0.0), 1.0))
        self._count += 1
        mean = self._window.estimation
        if self._window.drift_detected and mean > before:
            self.rises += 1
            self._peak = mean
        elif self._peak is not None and self._window.width >= 2 * ENOUGH:
            # The mean of fewer outcomes says little.
            self._peak = max(self._peak, mean)
            if mean < OVER * self._peak:
                self._peak = None

    @property
    def state(self) -> DriftState:
        """Whether what is asked is changing."""
        if self._count < ENOUGH:
            return DriftState.UNKNOWN
        return DriftState.CALM if self._peak is None else DriftState.DRIFTING

    @property
    def level(self) -> float:
        """Mean surprise of the outcomes since the last change; 1 while it is unknown."""
        return float(self._window.estimation) if self._count >= ENOUGH else 1.0

    def budget(self, least: float, most: float, *, backlog: bool = False) -> float:
        """
        Return the share of device time for learning, between ``least`` and ``most``.

        All of it while drifting or unknown. In calm it goes with the mean surprise, and
        corrections gather meanwhile, unless enough to be learned together wait already.
        """
        if self.state is not DriftState.CALM or backlog:
            return most
        return min(least + max(most - least, 0.0) * self.level, most)


def surprise(log_probability: float) -> float:
    """Return the surprise of a corrected text: 1 - p per token, by its mean log p."""
    return 1.0 - math.exp(min(log_probability, 0.0))
