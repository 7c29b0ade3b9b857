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
from dataclasses import dataclass

from torch import Tensor

from mace_ros.finetune.sample import Sample, SampleScore
from mace_ros.learning.backoff import Backoff
from mace_ros.learning.disk import Disk
from mace_ros.learning.job import Job, JobKind, JobState
from mace_ros.learning.job_inputs import Unreadable
from mace_ros.learning.outcomes import older_is_better, SuspectedRegression
from mace_ros.learning.rollback import rollback_lineage, RollbackRefused
from mace_ros.learning.samples import corrected
from mace_ros.learning.task import on_disk, Task
from mace_ros.learning.training import Training
from mace_ros.model.chat import ChatTokenizer
from mace_ros.store.adapter_store import AdapterStore
from mace_ros.store.journal import Journal
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


@dataclass
class _Versions:
    """Weights of two versions; None is the base model."""

    live: dict[str, Tensor] | None
    better: dict[str, Tensor] | None


class ComparisonJob(Job):
    """Compares the live version with the one that may be better."""

    def __init__(self, suspicion: SuspectedRegression, number: int, *, check: RegressionCheck,
                 training: Training, chat: ChatTokenizer, disk: Disk, store: AdapterStore,
                 backoff: Backoff) -> None:
        """``backoff`` ends once both versions are read."""
        super().__init__(JobKind.COMPARISON, number, suspicion.profile, ())
        self.suspicion = suspicion
        self._check, self._training, self._chat = check, training, chat
        self._disk, self._store, self._backoff = disk, store, backoff

    def run(self) -> Task[SuspectedRegression | None]:
        """Return the suspicion if it proves right; raises :class:`Unreadable`."""
        check, training, suspicion = self._check, self._training, self.suspicion
        reading = self._disk.submit(self._read)
        try:
            versions = yield from on_disk(reading)
        except RollbackRefused:
            return None
        except Exception as error:
            raise Unreadable(f'the versions to compare could not be read: {error}') from error
        del reading     # and with it, the tensors as soon as they are loaded
        self._backoff.succeeded()
        self.state = JobState.COMPARING
        training.load(versions.better)
        versions.better = None
        better = yield from training.score(self._samples(suspicion.corrections))
        training.load(versions.live)
        versions.live = None
        unseen = check.unseen(suspicion)
        live = yield from training.score(self._samples(unseen))
        confirmed = check.confirms_regression(
            suspicion, better.scores, list(zip(unseen, live.scores, strict=True)))
        return suspicion if confirmed else None

    def _read(self, journal: Journal) -> _Versions:
        """
        Read both versions, in the journal's thread.

        Raises :class:`RollbackRefused` if there is no way back any more.
        """
        suspicion, profile = self.suspicion, self.suspicion.profile
        lineage = journal.live_lineage(profile)
        live = next((r for r in lineage.live if r.version == suspicion.version), None)
        if live is None or suspicion.better not in {0, *lineage.numbers}:
            raise RollbackRefused(f'version {suspicion.version} is not live any more')
        rollback_lineage(journal, profile, suspicion.better)
        older = next((r for r in lineage.versions if r.version == suspicion.continues), None)
        if profile and older is None:   # a profile without a version would be served the robot's
            older = journal.newest('')
        return _Versions(*(
            self._store.load(r.path, r.sha256) if r else None for r in (live, older)))

    def _samples(self, records: Sequence[CorrectionRecord]) -> list[Sample]:
        return [corrected(self._chat, record) for record in records]
