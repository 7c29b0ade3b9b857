# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
How long learning rests after a job, so as to take no more than its share of time.

A job that has begun is not slowed down: its corrections would be learned later, and nothing
saved. While learning rests, corrections gather and are learned together, which costs less than
one by one: they share what each step replays and what the gate looks at.
"""

from __future__ import annotations

import math


class Resting:
    """Keeps account of the latest job's device time."""

    def __init__(self) -> None:
        """Begin without a job."""
        self._began, self._seconds = -math.inf, 0.0

    def begun(self, now: float) -> None:
        """Note that a job begins."""
        self._began, self._seconds = now, 0.0

    def spent(self, seconds: float) -> None:
        """Note device time of the job."""
        self._seconds += seconds

    def until(self, share: float) -> float:
        """Return when the job's device time is no more than a share of the time since it began."""
        if self._seconds == 0.0:
            return self._began
        return self._began + self._seconds / share if share > 0.0 else math.inf
