# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Whether a correction is worth waiting for the next one.

Most of the device time of a job is the same for one correction as for four: what is replayed in
each step, and what the gate looks at. So while corrections keep coming, a few seconds' patience
saves more than half of it. Whoever corrects, waits for the new version and goes on gains nothing
from that: none comes while another is learned.
"""

from __future__ import annotations

from collections import deque

LATEST = 4      # jobs by which it is told how often corrections come


class Gathering:
    """Counts the corrections that come while others are learned."""

    def __init__(self) -> None:
        """Begin without a job."""
        self._jobs: deque[tuple[float, int]] = deque(maxlen=LATEST)     # seconds, corrections
        self._began: float | None = None
        self._came = 0

    def came(self) -> None:
        """Note a correction."""
        self._came += 1

    def begun(self, now: float) -> None:
        """Note that a job begins."""
        self._began, self._came = now, 0

    def ended(self, now: float) -> None:
        """Note that no job runs any more, if one did."""
        if self._began is not None:
            self._jobs.append((now - self._began, self._came))
            self._began = None

    def expected(self, seconds: float) -> float:
        """Return how many corrections come in so many seconds, by the latest jobs."""
        spent = sum(s for s, _ in self._jobs)
        return seconds * sum(n for _, n in self._jobs) / spent if spent > 0.0 else 0.0
