# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Learning as the engine sees it: corrections in, fine-tune steps and events out.

One job runs at a time, as a generator that :meth:`Learner.poll` resumes. All methods but
:meth:`Learner.versions`, which any thread may call, run in the device's thread. None blocks except
:meth:`Learner.restore`: disk work goes to the journal's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
import math

from mace_ros.api.events import (
    AdapterVersion,
    CorrectionState,
    CorrectionStatus,
    Event,
)
from mace_ros.api.settings import Settings
from mace_ros.finetune.step import FinetuneStep
from mace_ros.learning.acceptance import Accepted
from mace_ros.learning.anchor_replay import AnchorReplay
from mace_ros.learning.backoff import Backoff
from mace_ros.learning.baseline import BaselineScores
from mace_ros.learning.comparison_job import ComparisonJob
from mace_ros.learning.correction_queue import CorrectionQueue, PendingCorrection
from mace_ros.learning.disk import Disk
from mace_ros.learning.drift import Drift
from mace_ros.learning.job import Job, JobKind, JobState
from mace_ros.learning.job_context import JobContext
from mace_ros.learning.job_inputs import Unreadable
from mace_ros.learning.job_planner import JobPlanner
from mace_ros.learning.learning_job import LearningJob
from mace_ros.learning.live_versions import LiveVersions
from mace_ros.learning.outcomes import suspected_regression, SuspectedRegression
from mace_ros.learning.publishing import Publisher
from mace_ros.learning.regression_check import RegressionCheck
from mace_ros.learning.rehearsal import Rehearsal
from mace_ros.learning.rollback import RolledBack
from mace_ros.learning.rollback_queue import RollbackQueue
from mace_ros.learning.scoped_training_set import ScopedTrainingSetBuilder
from mace_ros.learning.status import job_status, LearningStatus, tracked
from mace_ros.learning.task import Pause, RetryNotice, Task, Until, Wait
from mace_ros.learning.training import StepCost, Training
from mace_ros.learning.training_set import TrainingSetBuilder
from mace_ros.model.chat import ChatTokenizer
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.prefix_kv import PrefixKV
from mace_ros.scheduling.plan import Segment, SegmentKind
from mace_ros.store.adapter_store import AdapterStore
from mace_ros.store.journal import Journal
from mace_ros.store.journal_file import JournalError
from mace_ros.store.journal_writer import JournalWriter
from mace_ros.store.records import VersionRecord

MAX_JOB_TRIES = 3       # of a job that the device or the disk fails


class Learner:
    """Chooses what to train and publish; the engine runs the steps that it offers."""

    def __init__(self, *, model: PackedModel, model_name: str, lora: LoRAManager,
                 chat: ChatTokenizer, live: LiveVersions, journal: JournalWriter,
                 store: AdapterStore, cost: StepCost, settings: Settings,
                 wake: Callable[[], None], clock: Callable[[], float]) -> None:
        """``wake``, called from any thread, requests a :meth:`poll`."""
        self._live, self._wake = live, wake
        self._disk = Disk(journal, wake)
        self._queue = CorrectionQueue()
        self._publisher = Publisher(
            model_name=model_name, lora=lora, live=live, disk=self._disk, store=store,
            min_free_mb=settings.storage.min_free_mb, clock=clock)
        self._rollbacks = RollbackQueue(
            lora=lora, live=live, disk=self._disk, store=store, cancel_job=self._cancel_job,
            wake=wake)
        anchors = AnchorReplay(chat)
        self._context = JobContext(
            settings=settings, chat=chat,
            training=Training(
                model, lora, cost, settings.finetune, lambda: self.oldest_unlearned_at),
            anchors=anchors, builder=TrainingSetBuilder(chat, anchors),
            scoped_builder=ScopedTrainingSetBuilder(chat, live), live=live,
            baseline=BaselineScores(), queue=self._queue, disk=self._disk, store=store,
            publisher=self._publisher, drift=Drift(), regression_check=RegressionCheck(),
            backoff=Backoff(), clock=clock)
        self._rehearsal = Rehearsal()
        self._planner = JobPlanner(self._context, self._rehearsal)
        self._job: Job | None = None
        self._running: Task[object] | None = None   # the job's generator
        self._waits_for: Wait | None = None
        self._suspicions: list[Future[SuspectedRegression | None]] = []
        self._events: list[Event] = []      # not returned yet
        self._last_error = ''      # the device or disk error that ended the last job

    def restore(self) -> list[Event]:
        """
        Serve the live versions and queue the journal's pending corrections; blocks.

        Returns the events of the versions. Raises ``OtherAdapter``.
        """
        events = self._publisher.restore()
        pending = self._disk.submit(lambda journal: journal.pending()).result()
        for record in pending:
            self._queue.add(record, self._context.clock())
        return events

    # -- input ---------------------------------------------------------------------

    def accepted(self, accepted: Accepted) -> list[Event]:
        """Take a correction that is in the journal; return the events that this causes."""
        record = accepted.record
        if accepted.new:
            self._live.delete(accepted.deleted)
            if record.query_id and self._context.settings.gate.auto_rollback:
                self._test_for_regression(record.query_id)
        if not accepted.to_learn:
            if accepted.new and record.state is CorrectionState.RECORDED:
                self._context.drift.disliked(record.query_id)
            return [accepted.status]
        self._context.drift.corrected(record.query_id)
        renewed = None if self._job is None else self._job.renew(record)
        if renewed is None:
            if self._job is not None and self._job.trains(accepted.superseded):
                self._cancel_job(self._job.profile)
            self._rehearsal.supersede(record)
            self._queue.add(record, accepted.arrived)
        proposal = CorrectionStatus(
            record.id, CorrectionState.PROPOSED, corrected=record.corrected)
        return [
            *([proposal] if accepted.proposed else ()),
            CorrectionStatus(record.id, CorrectionState.ACCEPTED),
            *(CorrectionStatus(i, CorrectionState.SUPERSEDED, f'by correction {record.id}')
              for i in accepted.superseded),
            *(self._disk.set_state(r, CorrectionState.TRAINING) for r in renewed or ())]

    def answered(self, query_id: str) -> None:
        """Note an answer; drift is the rate of corrected answers."""
        self._context.drift.answered(query_id)

    def suspect(self, suspicion: SuspectedRegression) -> None:
        """Compare a version with an earlier one before the next job."""
        if self._context.scores_first:      # the baseline policies never do
            self._context.regression_check.suspect(suspicion)

    def give_anchors(self, anchors: Iterable[tuple[list[int], list[int]]]) -> None:
        """Take the base model's answers to the anchors, as (prompt, output) ids."""
        self._context.anchors.give(anchors)

    @property
    def wants_anchors(self) -> bool:
        """Whether the job waits for the base model's answers; see :meth:`give_anchors`."""
        return self._waits_for is Pause.ANCHORS and self._context.anchors.is_missing

    @property
    def wants_prefix(self) -> tuple[int, ...] | None:
        """The prefix that the job waits for; see :meth:`give_prefix`."""
        return self._context.training.prefixes.wanted

    def give_prefix(self, ids: tuple[int, ...], prefix: PrefixKV) -> None:
        """Take the base model's keys and values for a prefix of samples."""
        self._context.training.prefixes.give(ids, prefix)

    def versions(self, profile: str) -> Future[list[AdapterVersion]]:
        """Read all versions of a profile from the journal, oldest first."""
        return self._publisher.versions(profile)

    def rollback(self, profile: str, version: int, reason: str,
                 done: Future[RolledBack]) -> None:
        """Queue a rollback; see :meth:`RollbackQueue.add`."""
        self._rollbacks.add(profile, version, reason, done)

    def update(self, settings: Settings) -> None:
        """Use other settings from now on."""
        self._context.settings = settings
        self._context.training.update(settings.finetune)
        self._publisher.min_free_mb = settings.storage.min_free_mb

    # -- jobs as the engine sees them ----------------------------------------------

    def poll(self) -> list[Event]:
        """
        Proceed as far as possible without waiting: rollbacks first, then the job.

        Returns the events. An error of the device propagates; :meth:`fail` must be called then.
        """
        self._take_suspicions()
        self._events += self._rollbacks.poll()
        self._events += self._publisher.rejected()
        if self._job is None:
            self._begin()
        if self._job is not None:
            self._resume(self._job)
        return self._take_events()

    @property
    def step(self) -> FinetuneStep | None:
        """The fine-tune step that can run now."""
        return self._waits_for if isinstance(self._waits_for, FinetuneStep) else None

    def commit(self, segments: Sequence[tuple[Segment, float]]) -> None:
        """Account for segments of the step that ran, with their device seconds."""
        job = self._job
        if job is None:
            return
        for segment, seconds in segments:
            # The optimizer's segment counts the tokens of the whole step.
            if segment.kind is SegmentKind.OPTIMIZER:
                job.progress.train_tokens += segment.tokens
            job.progress.train_seconds += seconds
            self._planner.spent(seconds)

    def fail(self, reason: str) -> list[Event]:
        """Give up the job because the device or the disk failed; try it again a few times."""
        job = self._job
        self._last_error = reason
        # Saving needs no device, and the version may be in the journal already.
        if job is None or (self._running is not None and job.state is JobState.SAVING):
            return self._take_events()
        failed: list[PendingCorrection] = []
        if job.kind is JobKind.LEARNING:
            failed = [c for c in job.on_trial if c.tries >= MAX_JOB_TRIES]
            self._queue.put_back(
                replace(c, tries=c.tries + 1) if c in job.on_trial else c
                for c in job.corrections if c not in failed)
        else:
            self._try_later(job)
        self._end_job()
        self._events += [self._publisher.failed(c.record, reason) for c in failed]
        return self._take_events()

    @property
    def busy(self) -> bool:
        """Whether a job runs or a correction waits."""
        return self._job is not None or bool(self._queue)

    @property
    def wake_at(self) -> float | None:
        """When :meth:`poll` can proceed by itself, if it waits for nothing but a time."""
        if self._job is None:
            return self._planner.wake_at
        waits_for = self._waits_for
        return waits_for.time if isinstance(waits_for, Until) else None

    @property
    def oldest_unlearned_at(self) -> float:
        """Arrival of the oldest correction that is not learned, infinity if there is none."""
        return min((c.waits_since for c in self._unlearned()), default=math.inf)

    def status(self) -> LearningStatus:
        """Return a snapshot."""
        drift = self._context.drift
        return LearningStatus(
            waiting=len(self._unlearned()), oldest_at=self.oldest_unlearned_at,
            queue=tuple(map(tracked, self._queue)),
            job=None if self._job is None else job_status(self._job),
            drift_state=drift.state, drift_level=drift.level, budget=self._planner.budget,
            compared=self._context.regression_check.compared,
            last_error=self._last_error if self.busy else '')

    def close(self, reason: str) -> None:
        """Refuse waiting rollbacks and cancel the job; its corrections stay in the journal."""
        self._rollbacks.close(reason)
        self._put_back()

    # -- beginning and ending a job ------------------------------------------------

    def _begin(self) -> None:
        """Begin the next job, if one may begin now."""
        context = self._context
        if not self._planner.may_begin():
            return
        held, suspicion = self._rollbacks.profile, context.regression_check.suspicion
        if suspicion is not None and suspicion.profile != held:
            context.regression_check.begin(suspicion)
            self._start(ComparisonJob(context, self._planner.jobs, suspicion))
            return
        job = self._planner.next(held)
        if job is None:
            return
        self._start(LearningJob(
            context, self._planner.begun(), job.profile, job.corrections,
            start=job.start, kind=job.kind))

    def _start(self, job: Job) -> None:
        self._job, self._running = job, job.run()

    def _resume(self, job: Job) -> None:
        """Run the job's generator until it waits for something or ends."""
        assert self._running is not None
        self._waits_for = None
        try:
            while self._waits_for is None:
                item = next(self._running)
                if isinstance(item, RetryNotice):
                    self._last_error = item.reason
                elif isinstance(item, (CorrectionStatus, AdapterVersion)):
                    self._events.append(item)
                else:
                    self._waits_for = item
        except StopIteration as end:
            self._finish(job, end.value)
        except Unreadable as error:
            self._last_error = str(error)
            self._try_later(job)
            self._put_back()
        except BaseException:
            self._running = None
            raise
        if self._waits_for is Pause.NEXT_POLL:
            self._wake()

    def _finish(self, job: Job, result: object) -> None:
        """End a job that has returned its result."""
        self._end_job()
        if isinstance(result, SuspectedRegression):
            self._rollbacks.add(result.profile, result.suspect, result.reason, Future(),
                                withdraw=True)
        elif isinstance(result, VersionRecord):
            self._last_error = ''
            if job.kind is JobKind.LEARNING:
                superseded = {c.record.prompt_ids for c in self._queue.of(job.profile)}
                self._rehearsal.learned(c.record for c in job.corrections
                                        if c.record.prompt_ids not in superseded)

    def _end_job(self) -> None:
        """
        Close the job's generator, which frees its tensors.

        The next poll begins the next job, after a rollback that this one may have asked for.
        """
        if self._running is not None:
            self._running.close()
        self._job = self._running = self._waits_for = None
        self._wake()

    def _put_back(self) -> None:
        """End the job, if there is one, and let its corrections wait again."""
        job = self._job
        if job is None:
            return
        self._end_job()
        if job.kind is JobKind.LEARNING:
            self._queue.put_back(job.corrections)

    def _cancel_job(self, profile: str) -> bool:
        """
        Cancel a job that trains a profile's version or may begin from it; it begins anew later.

        Jobs of all profiles may begin from the robot's version (profile ''). Returns False, and
        keeps the job, while it saves a version.
        """
        # The corrections of a version that is rolled back must not be rehearsed.
        self._rehearsal.forget(profile)
        self._context.regression_check.forget(profile)
        job = self._job
        if job is None or profile not in (job.profile, ''):
            return True
        if job.state is JobState.SAVING:
            return False
        self._put_back()
        return True

    def _try_later(self, job: Job) -> None:
        """Begin no job for a while; a comparison that broke off is requested again."""
        self._context.backoff.failed(self._context.clock())
        if isinstance(job, ComparisonJob):
            self._context.regression_check.requeue(job.suspicion)

    # -- helpers -------------------------------------------------------------------

    def _test_for_regression(self, query_id: str) -> None:
        """Test in the journal whether answers got worse with a version, after a correction."""
        def test(journal: Journal) -> SuspectedRegression | None:
            answer = journal.answer(query_id)
            return None if answer is None else suspected_regression(journal, answer.lineage)

        # submit() raises if the journal is closed; a later correction repeats the test.
        with suppress(JournalError):
            self._suspicions.append(self._disk.submit(test))

    def _take_suspicions(self) -> None:
        """Take the results of the tests that are done; one that failed suspects nothing."""
        while self._suspicions and self._suspicions[0].done():
            test = self._suspicions.pop(0)
            suspicion = None if test.exception() is not None else test.result()
            if suspicion is not None:
                self.suspect(suspicion)

    def _unlearned(self) -> list[PendingCorrection]:
        return [*(self._job.corrections if self._job is not None else ()), *self._queue]

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events
