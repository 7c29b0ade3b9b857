# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Rehearsal under the policy ``continuous``: train learned corrections again and again.

That baseline never rests, so it needs something to train when no correction waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from mace_ros.learning.correction_queue import PendingCorrection
from mace_ros.learning.samples import rotate
from mace_ros.learning.selection import JOB_CANDIDATES, JOB_CORRECTIONS
from mace_ros.store.records import CorrectionRecord


class Rehearsal:
    """Keeps the corrections that were learned last."""

    def __init__(self) -> None:
        """Begin without a correction."""
        self._recent: deque[CorrectionRecord] = deque(maxlen=JOB_CANDIDATES)

    @property
    def profile(self) -> str | None:
        """The profile that learned last; None if there is nothing to rehearse."""
        return self._recent[-1].profile if self._recent else None

    def learned(self, records: Iterable[CorrectionRecord]) -> None:
        """Rehearse these corrections from now on, instead of those that they replace."""
        for record in records:
            self.supersede(record)
            self._recent.append(record)

    def supersede(self, record: CorrectionRecord) -> None:
        """Drop the correction that a new one supersedes."""
        self._keep(r for r in self._recent
                   if (r.profile, r.prompt_ids) != (record.profile, record.prompt_ids)
                   and r.id != record.replaces)

    def forget(self, profile: str) -> None:
        """Drop a profile's corrections: its version is being rolled back."""
        self._keep(r for r in self._recent if r.profile != profile)

    def corrections(self, number: int, now: float) -> list[PendingCorrection]:
        """Return the corrections of the profile for one job, in rotation by its number."""
        again = rotate([r for r in self._recent if r.profile == self.profile],
                       min(JOB_CORRECTIONS, len(self._recent)), number)
        return [PendingCorrection(r, now) for r in {r.id: r for r in again}.values()]

    def _keep(self, records: Iterable[CorrectionRecord]) -> None:
        self._recent = deque(records, JOB_CANDIDATES)
