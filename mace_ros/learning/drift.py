# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Drift: learning gets more device time while the questions to the robot change.

Each answer has an outcome between 0 (not corrected) and 1 (corrected, by a text of probability
0). ADWIN (Bifet and Gavaldà 2007, by river) keeps the longest window of outcomes whose mean does
not change, and detects when it does. That drift sets the frequency of learning is MACE's idea
(arXiv 2510.03283); the signal and the rule are ours.
"""

from __future__ import annotations

from enum import IntEnum
import math

from river.drift import ADWIN

# False-alarm probability of the detector.
FALSE_ALARMS = 0.05
# Outcomes before the state is known; until then, learning may use its whole budget.
MIN_OUTCOMES = 5
# A rise ends when the mean has fallen to this share of its peak.
RECOVERY_SHARE = 0.5
# Maximum number of answers without an outcome; beyond it the oldest counts as right.
MAX_PENDING = 8


class DriftState(IntEnum):
    """The state of the detector; the values are those of ``Scheduler.msg``."""

    UNKNOWN = 0
    CALM = 1
    DRIFTING = 2


class Drift:
    """Detects drift from the outcomes of answers."""

    def __init__(self) -> None:
        """Begin without an outcome."""
        # The default tests every 32nd outcome only, and corrections are rarer.
        self._window = ADWIN(delta=FALSE_ALARMS, clock=1, grace_period=MIN_OUTCOMES)
        self._count = 0
        self._open: dict[str, None] = {}   # query ids without an outcome yet, oldest first
        self._peak: float | None = None    # mean surprise since the rise; None: calm

    def answered(self, query_id: str) -> None:
        """Note an answer; it counts as right unless corrected within :data:`MAX_PENDING` more."""
        self.corrected(query_id)        # the id may have been used before
        self._open[query_id] = None
        if len(self._open) > MAX_PENDING:
            del self._open[next(iter(self._open))]
            self.outcome(0.0)

    def corrected(self, query_id: str) -> None:
        """Note that the surprise of a correction will be the answer's outcome."""
        self._open.pop(query_id, None)

    def disliked(self, query_id: str) -> None:
        """Note an answer that was wrong, without a right one whose surprise could be measured."""
        if query_id in self._open:
            self.corrected(query_id)
            self.outcome(1.0)

    def outcome(self, surprise: float) -> None:
        """Note an outcome, from 0 (right) to 1 (entirely wrong)."""
        before = self._window.estimation
        self._window.update(min(max(surprise, 0.0), 1.0))
        self._count += 1
        mean = self._window.estimation
        if self._window.drift_detected and mean > before:
            self._peak = mean
        elif self._peak is not None and self._window.width >= 2 * MIN_OUTCOMES:
            # Not before: the mean of fewer outcomes is unreliable.
            self._peak = max(self._peak, mean)
            if mean < RECOVERY_SHARE * self._peak:
                self._peak = None

    @property
    def state(self) -> DriftState:
        """Whether the questions are changing."""
        if self._count < MIN_OUTCOMES:
            return DriftState.UNKNOWN
        return DriftState.CALM if self._peak is None else DriftState.DRIFTING

    @property
    def level(self) -> float:
        """Mean of the outcomes since the last change; 1 while it is unknown."""
        return float(self._window.estimation) if self._count >= MIN_OUTCOMES else 1.0

    def budget(self, least: float, most: float, *, backlog: bool = False) -> float:
        """
        Return the share of device time for learning, between ``least`` and ``most``.

        While drifting or unknown, and for a ``backlog`` of corrections that fills a job, it is
        ``most``. In calm it grows with the mean surprise; corrections gather meanwhile.
        """
        if self.state is not DriftState.CALM or backlog:
            return most
        return min(least + max(most - least, 0.0) * self.level, most)


def surprise(log_probability: float) -> float:
    """Return the surprise of a corrected text, 1 - p per token, from its mean log p."""
    return 1.0 - math.exp(min(log_probability, 0.0))
