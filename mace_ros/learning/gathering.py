# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Whether a correction is worth waiting for the next one.

Most of the device time of a job is the same for one correction as for four: what is replayed in
each step, and what the gate looks at. So while corrections keep coming, a few seconds' patience
saves some of it. Whoever corrects, waits for the new version and goes on gains nothing from
that: none comes while another is learned.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import NamedTuple

LATEST = 4              # jobs by which it is told how often corrections come ...
FORGOTTEN_S = 120.0     # ... unless they are over for so long


class _Job(NamedTuple):
    ended: float
    seconds: float
    came: Counter[str]      # of each profile


class Gathering:
    """Counts the corrections that come while others are learned."""

    def __init__(self) -> None:
        """Begin without a job."""
        self._jobs: deque[_Job] = deque(maxlen=LATEST)
        self._began: float | None = None
        self._came: Counter[str] = Counter()

    def came(self, profile: str) -> None:
        """Note a correction of a question that waits for none."""
        self._came[profile] += 1

    def begun(self, now: float) -> None:
        """Note that a job begins."""
        self._began, self._came = now, Counter()

    def ended(self, now: float) -> None:
        """Note that no job runs any more, if one did."""
        if self._began is not None:
            self._jobs.append(_Job(now, now - self._began, self._came))
            self._began, self._came = None, Counter()

    def expected(self, profile: str, seconds: float, now: float) -> float:
        """Return how many corrections of a profile come in so many seconds, by the latest jobs."""
        jobs = [job for job in self._jobs if now - job.ended < FORGOTTEN_S]
        spent = sum(job.seconds for job in jobs)
        return seconds * sum(job.came[profile] for job in jobs) / spent if spent > 0.0 else 0.0
