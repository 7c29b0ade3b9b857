# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
How long learning rests after a job, so as to take no more than its share of time.

A job that has begun is not slowed down: its corrections would be learned later, and nothing
saved. While learning rests, corrections gather and are learned together, which costs less than
one by one: they share what each step replays and what the gate looks at. Time that was not
used before a job counts, so that what is corrected after a lull is not held up.
"""

from __future__ import annotations

import math

LULL_S = 20.0   # without learning, at most, that is made up for


class DutyCycle:
    """Keeps account of the latest job's device time, and of what was left unused before it."""

    def __init__(self) -> None:
        """Begin without a job."""
        self._since, self._seconds = -math.inf, 0.0

    def begun(self, now: float, share: float) -> None:
        """Note that a job begins, while learning may have a share of the time."""
        self._since = min(max(self.until(share), now - LULL_S), now)
        self._seconds = 0.0

    def spent(self, seconds: float) -> None:
        """Note device time of the job."""
        self._seconds += seconds

    def until(self, share: float) -> float:
        """Return when learning will have taken no more than a share of the time."""
        if self._seconds == 0.0:
            return self._since
        return self._since + self._seconds / share if share > 0.0 else math.inf
