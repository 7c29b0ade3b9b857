# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Verification: whether a version still knows what earlier versions have learned.

A correction goes live once its neighbourhood is checked. The other corrections are checked when
no correction waits, and what was lost is learned again.
"""

from __future__ import annotations

from collections.abc import Iterable

from mace_ros.learning.correction_queue import PendingCorrection
from mace_ros.learning.job import Job, JobKind, JobState
from mace_ros.learning.job_context import JobContext
from mace_ros.learning.job_inputs import read_inputs
from mace_ros.learning.samples import sample
from mace_ros.learning.selection import JOB_CORRECTIONS
from mace_ros.learning.task import Task
from mace_ros.store.records import CorrectionRecord

MAX_ROUNDS = 3      # of checking everything again after a repair
BATCH = 8           # corrections that are scored before the next look at the queue


class Verification:
    """What remains to be checked and to be repaired, by profile."""

    def __init__(self) -> None:
        """Begin with nothing to check: a version that was restored was checked when it was made."""
        self._unchecked: dict[str, dict[str, None]] = {}
        self._lost: dict[str, dict[str, CorrectionRecord]] = {}
        # Repaired since the profile learned something new, and how often.
        self._repaired: dict[str, dict[str, CorrectionRecord]] = {}
        self._rounds: dict[str, int] = {}

    def published(self, profile: str, learned: Iterable[str], checked: Iterable[str], *,
                  repaired: bool) -> None:
        """Check all that a new version has learned but what its job has checked."""
        rounds = self._rounds[profile] = self._rounds.get(profile, 0) + 1 if repaired else 0
        done = set(checked)
        self._unchecked[profile] = dict.fromkeys(
            i for i in learned if i not in done) if rounds < MAX_ROUNDS else {}
        for correction_id in done:
            self._lost.get(profile, {}).pop(correction_id, None)
        if not repaired:
            self._repaired.pop(profile, None)

    def forget(self, profile: str) -> None:
        """Check and repair nothing: the profile's version is being rolled back."""
        self._unchecked.pop(profile, None)
        self._lost.pop(profile, None)
        self._repaired.pop(profile, None)

    def checked(self, profile: str, record: CorrectionRecord, *, right: bool) -> None:
        """Note the outcome for a correction."""
        self._unchecked.get(profile, {}).pop(record.id, None)
        if not right:
            self._lost.setdefault(profile, {})[record.id] = record

    def keep(self, profile: str, ids: Iterable[str]) -> None:
        """Check no corrections but these."""
        self._unchecked[profile] = dict.fromkeys(ids)

    def unchecked(self, profile: str) -> set[str]:
        """Return the ids of the corrections that remain to be checked."""
        return set(self._unchecked.get(profile, ()))

    def next_check(self, held: str | None) -> str | None:
        """Return a profile that has something to check, other than ``held``."""
        return next((p for p, ids in self._unchecked.items() if ids and p != held), None)

    def next_repair(self, held: str | None, now: float) -> tuple[str, list[PendingCorrection]]:
        """
        Take lost corrections of a profile, to learn them again in one job.

        What was repaired before is learned together with what that repair has lost: one by one,
        each would destroy the other. Returns '' and [] if nothing is lost. If the job fails, the
        corrections are checked again under the next version.
        """
        for profile, lost in self._lost.items():
            if lost and profile != held:
                taken = {i: lost.pop(i) for i in list(lost)[:JOB_CORRECTIONS]}
                together = self._repaired[profile] = taken | self._repaired.get(profile, {})
                return profile, [PendingCorrection(r, now) for r
                                 in list(together.values())[:JOB_CORRECTIONS]]
        return '', []


class VerificationJob(Job):
    """Scores a live version's corrections, as long as no correction waits."""

    def __init__(self, context: JobContext, number: int, profile: str,
                 verification: Verification) -> None:
        """Nothing is read or computed before :meth:`run` is resumed."""
        super().__init__(JobKind.VERIFICATION, number, profile, ())
        self._context, self._verification = context, verification

    def run(self) -> Task[None]:
        """Check what remains to be checked; raises :class:`Unreadable`."""
        context = self._context
        inputs = yield from read_inputs(context.disk, context.store, self.profile, 0)
        context.backoff.succeeded()
        self.state = JobState.SCORING
        context.training.load(inputs.tensors)
        unchecked = self._verification.unchecked(self.profile)
        records = [r for r in inputs.learned if r.id in unchecked]
        # Corrections that were deleted or superseded meanwhile need no check.
        self._verification.keep(self.profile, [r.id for r in records])
        while records and not context.queue:
            batch, records = records[:BATCH], records[BATCH:]
            scored = yield from context.training.score([
                sample(context.chat, r.prompt_ids, context.chat.answer(r.corrected))
                for r in batch])
            for record, score in zip(batch, scored.scores, strict=True):
                self._verification.checked(self.profile, record, right=score.exact)
