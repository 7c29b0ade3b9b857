# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The interface of jobs: their kinds, their states, and their progress."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from mace_ros.learning.correction_queue import PendingCorrection
from mace_ros.learning.task import Task
from mace_ros.store.records import CorrectionRecord


class JobKind(Enum):
    """The purpose of a job."""

    LEARNING = 'learning'           # corrections
    REHEARSAL = 'rehearsal'         # of corrections that are learned already
    COMPARISON = 'comparison'       # of two versions: the regression check


class JobState(Enum):
    """The phase of a job."""

    READING = 'reading'             # the live version, from disk
    PREPARING = 'preparing'         # replay of the base model's answers
    CHOOSING = 'choosing'           # scores corrections under the live version
    SCORING = 'scoring'             # the guarded samples under the live version
    TRAINING = 'training'
    INTERPOLATING = 'interpolating'
    JUDGING = 'judging'             # the gate scores the candidate
    PUBLISHING = 'publishing'       # waits to try the disk again
    SAVING = 'saving'               # cannot be cancelled: the journal may have the version
    COMPARING = 'comparing'


@dataclass
class Progress:
    """What a job has done so far."""

    steps: int = 0              # optimizer steps
    lost: int = 0               # samples that candidates have lost
    train_tokens: int = 0
    train_seconds: float = 0.0


class Job:
    """
    A piece of work for the learner: a generator, and its visible progress.

    Nothing in a job may refer to its generator: closing that frees the job's tensors at once.
    """

    def __init__(self, kind: JobKind, number: int, profile: str,
                 corrections: Sequence[PendingCorrection]) -> None:
        """Begin with these corrections; ``number`` counts the jobs of the learner."""
        self.kind, self.number, self.profile = kind, number, profile
        self.corrections = list(corrections)
        self.state = JobState.READING
        self.announced: set[str] = set()    # corrections that were reported as TRAINING
        # The trained weights are swapped out while corrections that join are scored.
        self.swapped_out = False
        self.progress = Progress()

    def run(self) -> Task[Any]:
        """Do the work; closing the generator cancels it."""
        raise NotImplementedError

    def trains(self, correction_ids: Collection[str]) -> bool:
        """Return whether one of these corrections is in the job."""
        return any(c.record.id in correction_ids for c in self.corrections)

    def renew(self, record: CorrectionRecord) -> list[CorrectionRecord] | None:
        """
        Let a new correction replace an equal one in the job, which continues.

        Returns the corrections to report as TRAINING; None, changing nothing, if the job
        trains no equal correction or has saved its version under the older one's id.
        """
        if self.kind is not JobKind.LEARNING or self.state is JobState.SAVING:
            return None
        for older in self.corrections:
            if _is_same(older.record, record):
                announced = older.record.id in self.announced
                # The scores, known or on their way, are those of the older rejected text.
                older.record = replace(record, rejected=older.record.rejected)
                older.repeats += 1
                return self.unannounced([record]) if announced else []
        return None

    def unannounced(self, records: Sequence[CorrectionRecord]) -> list[CorrectionRecord]:
        """Return those of these corrections that are to be reported as TRAINING now."""
        new = [r for r in records if r.id not in self.announced]
        self.announced.update(r.id for r in new)
        return new

    @property
    def on_trial(self) -> list[PendingCorrection]:
        """The corrections that a failure of the device may be due to."""
        return [c for c in self.corrections
                if not self.swapped_out or c.record.id not in self.announced]


def _is_same(one: CorrectionRecord, other: CorrectionRecord) -> bool:
    return ((one.profile, one.prompt_ids, one.corrected, one.weight)
            == (other.profile, other.prompt_ids, other.corrected, other.weight))
