# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The duty cycle: how long learning rests after a job to stay within its share of device time.

A running job is not slowed down, which would delay its corrections and save nothing. Corrections
that gather while learning rests are learned together if they train the same adapter. Time that was
left unused before a job counts, so that a correction after a lull is learned at once.
"""

from __future__ import annotations

import math

LULL_S = 20.0   # maximum of the unused time that counts


class DutyCycle:
    """Accounts for the latest job's device time and the unused time before it."""

    def __init__(self) -> None:
        """Begin without a job."""
        self._since, self._seconds = -math.inf, 0.0

    def begun(self, now: float, share: float) -> None:
        """Note that a job begins; ``share`` is learning's share of the time, from 0 to 1."""
        self._since = min(max(self.until(share), now - LULL_S), now)
        self._seconds = 0.0

    def spent(self, seconds: float) -> None:
        """Note device time of the job, in seconds."""
        self._seconds += seconds

    def until(self, share: float) -> float:
        """Return when the share of the time that learning has used will be down to ``share``."""
        if self._seconds == 0.0:
            return self._since
        return self._since + self._seconds / share if share > 0.0 else math.inf
