# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A snapshot of learning, in plain values."""

from __future__ import annotations

from dataclasses import dataclass

from mace_ros.learning.correction_queue import PendingCorrection
from mace_ros.learning.drift import DriftState
from mace_ros.learning.job import Job, JobKind, JobState


@dataclass(frozen=True)
class TrackedCorrection:
    """
    A correction that is not learned yet.

    ``score`` is the mean log p per token of the corrected text under the live version, None
    before it is known.
    """

    id: str
    tries: int
    score: float | None


@dataclass(frozen=True)
class JobStatus:
    """The running job; ``lost`` counts samples that its candidates have lost."""

    number: int
    kind: JobKind
    state: JobState
    profile: str
    corrections: tuple[TrackedCorrection, ...]
    announced: int              # corrections that were reported as TRAINING
    steps: int                  # optimizer steps
    lost: int
    swapped_out: bool           # corrections that join are being scored

    @property
    def correction_ids(self) -> tuple[str, ...]:
        """The ids of the corrections in the job."""
        return tuple(c.id for c in self.corrections)


@dataclass(frozen=True)
class LearningStatus:
    """
    The state of learning.

    ``waiting`` counts corrections that are not learned, those in the job included, and
    ``oldest_at`` is the arrival of the oldest one on the engine's clock, infinity if there is
    none. ``last_error`` says why the job to be retried failed: the device or the disk.
    """

    waiting: int
    oldest_at: float
    queue: tuple[TrackedCorrection, ...]
    job: JobStatus | None
    drift_state: DriftState
    drift_level: float
    budget: float               # share of device time
    compared: int               # corrections by which versions were compared
    last_error: str


def tracked(correction: PendingCorrection) -> TrackedCorrection:
    """Return the status of a correction."""
    scores = correction.log_probabilities
    return TrackedCorrection(
        correction.record.id, correction.tries, scores[0] if scores else None)


def job_status(job: Job) -> JobStatus:
    """Return the status of a job."""
    return JobStatus(
        number=job.number, kind=job.kind, state=job.state, profile=job.profile,
        corrections=tuple(map(tracked, job.corrections)), announced=len(job.announced),
        steps=job.progress.steps, lost=job.progress.lost, swapped_out=job.swapped_out)
