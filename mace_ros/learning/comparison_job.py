# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A job that compares two versions: whether a suspected regression is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mace_ros.finetune.sample import Sample
from mace_ros.learning.job import Job, JobKind, JobState
from mace_ros.learning.job_context import JobContext
from mace_ros.learning.job_inputs import Unreadable
from mace_ros.learning.outcomes import SuspectedRegression
from mace_ros.learning.rollback import rollback_lineage, RollbackRefused
from mace_ros.learning.samples import correction_sample
from mace_ros.learning.task import on_disk, Task
from mace_ros.store.journal import Journal
from mace_ros.store.lineage import VersionLink
from mace_ros.store.records import CorrectionRecord, VersionRecord


@dataclass
class _Versions:
    """Weights of two versions; None is the base model."""

    live: dict[str, Tensor] | None
    better: dict[str, Tensor] | None


class ComparisonJob(Job):
    """Compares the live version with the one that may be better."""

    def __init__(self, context: JobContext, number: int, suspicion: SuspectedRegression) -> None:
        """Nothing is read or computed before :meth:`run` is resumed."""
        super().__init__(JobKind.COMPARISON, number, suspicion.profile, ())
        self._context, self.suspicion = context, suspicion

    def run(self) -> Task[SuspectedRegression | None]:
        """Return the suspicion if it proves right; raises :class:`Unreadable`."""
        context, suspicion = self._context, self.suspicion
        check, training = context.regression_check, context.training
        reading = context.disk.submit(self._read)
        try:
            versions = yield from on_disk(reading)
        except RollbackRefused:
            return None
        except Exception as error:
            raise Unreadable(f'the versions to compare could not be read: {error}') from error
        del reading     # and with it, the tensors as soon as they are loaded
        context.backoff.succeeded()
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
        older: VersionLink | VersionRecord | None = next(
            (r for r in lineage.versions if r.version == suspicion.continues), None)
        if profile and older is None:   # a profile without a version would be served the robot's
            older = journal.newest('')
        return _Versions(*(
            self._context.store.load(r.path, r.sha256) if r else None for r in (live, older)))

    def _samples(self, records: Sequence[CorrectionRecord]) -> list[Sample]:
        return [correction_sample(self._context.chat, record) for record in records]
