# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The regression check: whether the live version is worse than an earlier one.

The corrected texts are scored under both versions. For the live version, the scores recorded when
the corrections arrived count, because it may have learned them since.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from mace_ros.finetune.sample import SampleScore
from mace_ros.learning.outcomes import older_is_better, SuspectedRegression
from mace_ros.store.records import CorrectionRecord

MAX_SCORES = 1000           # first scores, and compared corrections, that are kept
MAX_COMPARISON_TRIES = 3    # of a comparison that the device or the disk fails


class RegressionCheck:
    """Keeps the current suspicion and the first scores of corrected texts."""

    def __init__(self) -> None:
        """Begin without a suspicion."""
        self.suspicion: SuspectedRegression | None = None
        self._tries = 0
        # Mean log p of corrected texts under the version that was live when they came, by id.
        self._first_scores: dict[str, float] = {}
        self._compared: deque[str] = deque(maxlen=MAX_SCORES)   # ids of corrections

    @property
    def compared(self) -> int:
        """Corrections by which versions were compared."""
        return len(self._compared)

    def scored(self, correction_id: str, log_probability: float) -> None:
        """Note the first score of a corrected text, in mean log p per token."""
        self._first_scores[correction_id] = log_probability
        if len(self._first_scores) > MAX_SCORES:
            del self._first_scores[next(iter(self._first_scores))]

    def suspect(self, suspicion: SuspectedRegression) -> None:
        """Request a comparison, unless most of the corrections have been compared already."""
        new = sum(r.id not in self._compared for r in suspicion.corrections)
        if 2 * new >= len(suspicion.corrections):
            self.suspicion, self._tries = suspicion, 0

    def forget(self, profile: str) -> None:
        """Drop the suspicion against a profile's version: it is being rolled back."""
        if self.suspicion is not None and self.suspicion.profile == profile:
            self.suspicion = None

    def begin(self, suspicion: SuspectedRegression) -> None:
        """Note that the comparison has begun."""
        self.suspicion, self._tries = None, self._tries + 1
        self._compared.extend(
            r.id for r in suspicion.corrections if r.id not in self._compared)

    def requeue(self, suspicion: SuspectedRegression) -> None:
        """Request the comparison again, a few times: the device or the disk has failed."""
        if self.suspicion is None and self._tries < MAX_COMPARISON_TRIES:
            self.suspicion = suspicion

    def unseen(self, suspicion: SuspectedRegression) -> list[CorrectionRecord]:
        """Return the corrections without a first score."""
        return [r for r in suspicion.corrections if r.id not in self._first_scores]

    def confirms_regression(
            self, suspicion: SuspectedRegression, better: Sequence[SampleScore],
            unseen: Sequence[tuple[CorrectionRecord, SampleScore]]) -> bool:
        """
        Return whether the earlier version would have done better.

        ``better`` are the scores of all corrections under it; ``unseen`` adds scores under the
        live version to the first ones.
        """
        live = self._first_scores | {r.id: s.log_probability for r, s in unseen}
        return older_is_better([s.log_probability - live[r.id]
                                for r, s in zip(suspicion.corrections, better, strict=True)])
