# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
A job of learning: from the corrections of one profile to a published version.

:meth:`LearningJob.run` reads from top to bottom. Each yield names the event that the job waits
for; requests are served meanwhile. Closing the generator cancels the job.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
import math
from statistics import fmean
import time

from torch import Tensor

from mace_ros.api.events import CorrectionState, CorrectionStatus, VersionState
from mace_ros.api.settings import FinetuneSettings
from mace_ros.api.wording import counted
from mace_ros.finetune.sample import Sample, SampleScore
from mace_ros.finetune.step import FinetuneStep
from mace_ros.learning.correction_queue import PendingCorrection, texts
from mace_ros.learning.criteria import learned_well, RIGHT_MARGIN, StepScores
from mace_ros.learning.drift import surprise
from mace_ros.learning.gate import wrong
from mace_ros.learning.grouping import FRESH, Start, start_of
from mace_ros.learning.interpolation import interpolate
from mace_ros.learning.job import Job, JobKind, JobState
from mace_ros.learning.job_context import JobContext
from mace_ros.learning.job_inputs import Damaged, JobRecords, read_records, supersede, Unreadable
from mace_ros.learning.live_versions import Weights
from mace_ros.learning.samples import correction_sample, rejected_samples
from mace_ros.learning.selection import candidates, fitting, JOB_CORRECTIONS, ordered
from mace_ros.learning.step_plan import StepPlan
from mace_ros.learning.task import Task
from mace_ros.learning.training_set import TrainingSet
from mace_ros.store.records import CorrectionRecord, VersionRecord
from mace_ros.store.version_info import version_event

# Corrections may join a job until this share of finetune.max_steps is spent: the rest suffices.
JOIN_SHARE = 0.25


@dataclass(frozen=True)
class Trained:
    """
    Why no further step follows; neither is set if one does.

    ``scores`` are those of the forward after which training ends. The corrections that are
    ``joining`` are to be trained as well from now on.
    """

    scores: StepScores | None = None
    joining: Sequence[PendingCorrection] = ()


class LearningJob(Job):
    """Learns corrections of one profile together, or rehearses them."""

    def __init__(self, context: JobContext, number: int, profile: str,
                 corrections: Sequence[PendingCorrection], *, start: Start,
                 kind: JobKind = JobKind.LEARNING) -> None:
        """
        Nothing is read or computed before :meth:`run` is resumed.

        Only a job of the kind LEARNING reports states of its corrections: those of a rehearsal
        are LEARNED already.
        """
        super().__init__(kind, number, profile, corrections)
        self._context = context
        self._begun = context.clock()
        self._start, self.everywhere = start, start.everywhere
        self._parent = context.live.newest(profile)
        self._continues = start.continued_by(profile)
        # A profile that begins from the robot's version gets one of its own even if that one is
        # right already: the base model answers what a profile has learned without a version.
        self._needs_version = start.version.version != self._continues
        self._least_steps = (self._finetune.period_steps if kind is JobKind.REHEARSAL
                             else int(self._needs_version))
        self._score_before = math.nan       # of the corrections, live version

    def run(self) -> Task[VersionRecord | None]:
        """
        Learn the corrections; return the published version, None if there is none.

        Raises :class:`Unreadable`, and whatever the device raises.
        """
        context = self._context
        yield from self._supersede(self.corrections)
        records = yield from self._load_start()
        start = context.training.lora.copies()
        yield from self._choose()
        if not self.corrections:
            return None
        training_set = yield from self._build_training_set(records)
        while True:
            trained = yield from self._train(training_set)
            scores = trained.scores
            if scores is None:
                training_set = yield from self._join(trained.joining, start, records)
                continue
            yield from self._give_up_unlearned(scores, training_set)
            if not self.progress.steps:     # the live version answers the rest right
                yield from self._already_learned(self.corrections)
                return None
            if not self.corrections:
                return None
            score_after = yield from self._interpolate(start, scores, training_set)
            lost = yield from self._lost(training_set)
            if not lost:
                return (yield from self._publish(training_set, score_after))
            if self.progress.steps >= self._finetune.max_steps:
                reason = training_set.gate.reason(lost)
                context.publisher.reject(self._record(score_after), reason)
                yield from self._fail(self.corrections, reason + self._after_steps)
                return None
            self._train_on(training_set, lost)

    # -- before training -------------------------------------------------------------

    def _supersede(self, corrections: Sequence[PendingCorrection]) -> Task[None]:
        """Let corrections replace learned ones of the same questions in other words."""
        context = self._context
        for correction in corrections if self.kind is JobKind.LEARNING else ():
            while True:
                record = correction.record
                known = context.live.scope(self.profile).same_question(record)
                if known in ('', record.replaces):
                    break
                newer = replace(record, replaces=known)
                superseded = yield from supersede(context.disk, newer)
                if superseded:
                    yield CorrectionStatus(
                        known, CorrectionState.SUPERSEDED, f'by correction {newer.id}')
                if correction.record is record:     # otherwise an equal one has taken its place
                    correction.record = newer if superseded else record
                    break

    def _load_start(self) -> Task[JobRecords]:
        """Load the version to train on; return what it has learned, and answers to keep."""
        context, version = self._context, self._start.version
        weights, records = yield from self._read_start()
        if self.everywhere:
            self.state = JobState.PREPARING
            yield from context.anchors.prepare(context.training)
            context.baseline.begin((self.profile, version.profile, version.version))
        context.backoff.succeeded()
        context.training.load(weights, protecting=self.everywhere)
        return records

    def _read_start(self) -> Task[tuple[Weights | None, JobRecords]]:
        """Read the version to train on, what it has learned, and answers to keep."""
        context, version = self._context, self._start.version
        start = context.live.records(version.profile).get(version.version)
        if start is None and version.version != FRESH:
            raise Unreadable(f'version {version.version} is not live any more')
        try:
            return (yield from read_records(
                context.disk, context.store, self.profile, start,
                () if start is None else context.live.learned_by(version),
                () if self.everywhere else {c.record.replaces for c in self.corrections},
                self._finetune.replay_samples if self.everywhere else 0))
        except Damaged as error:
            damaged = context.live.drop(version)
            if damaged is not None:
                yield version_event(
                    damaged, context.store, VersionState.REJECTED, str(error.__cause__))
            raise

    def _choose(self) -> Task[None]:
        """
        Score corrections under the live version, and keep the most useful ones that fit.

        Corrections that it answers right already are LEARNED, the others wait again.
        """
        context, prefers = self._context, self._finetune.objective == 'dpo'
        if self.kind is JobKind.REHEARSAL or not (context.scores_first or prefers):
            return
        self.state = JobState.CHOOSING
        # Scores stay valid, except that a preference needs those of the live version.
        unscored = [c for c in self.corrections if prefers or not c.log_probabilities]
        scored = yield from context.training.score([
            s for c in unscored for s in (correction_sample(context.chat, c.record),
                                          *rejected_samples(context.chat, c.record))])
        right = self._note_scores(unscored, scored.scores)
        trained = [c for c in self.corrections if c.record.id in self.announced]
        wrong = [c for c in self.corrections if c not in right and c not in trained]
        if self._finetune.order == 'priority':
            wrong = ordered(
                wrong, context.queue.of(self.profile), now=context.clock(),
                freshness_s=context.settings.slo.freshness_s,
                step_s=lambda c: context.training.cost.step_s(
                    len(c.record.prompt_ids) + len(context.chat.answer(c.record.corrected))))
        chosen = self._fitting([*trained, *wrong])
        self.corrections = [*trained, *(c for c in wrong if c in chosen)]
        context.queue.put_back(c for c in wrong if c not in chosen)
        yield from self._already_learned(right)

    def _note_scores(self, corrections: Sequence[PendingCorrection],
                     scores: Sequence[SampleScore]) -> list[PendingCorrection]:
        """Note the scores of all texts; return the corrections that are right already."""
        remaining, right = iter(scores), []
        for correction in corrections:
            own = [next(remaining) for _ in texts(correction.record)]
            if not correction.log_probabilities:
                self._context.drift.outcome(surprise(own[0].log_probability))
                # The base model, from which a fresh adapter begins, may not have given the answer.
                if self._start.version.version != FRESH:
                    self._context.regression_check.scored(
                        correction.record.id, own[0].log_probability)
            correction.log_probabilities = tuple(s.log_probability for s in own)
            if len(own) > 1:
                correction.reference = (own[0].log_probability * own[0].tokens
                                        - own[1].log_probability * own[1].tokens)
            # A correction that joins is learned in any case: the live version may answer it
            # right, and the one in training no longer.
            if own[0].margin >= RIGHT_MARGIN and not self.announced and not self._needs_version:
                right.append(correction)
        return right

    def _build_training_set(self, records: JobRecords) -> Task[TrainingSet]:
        """Gather the samples, and score the guarded ones under the live version."""
        context = self._context
        if not self.everywhere:
            return context.scoped_builder.build(
                self.corrections, records, self._start.version, context.settings)
        self.state = JobState.SCORING
        training_set = context.builder.build(
            self.corrections, records, max_sample_tokens=self._finetune.max_sample_tokens,
            number=self.number)
        guarded = training_set.gate.samples
        unknown = [s for s in guarded if s not in context.baseline]
        # Replay of the robot's answers needs the live version's predictions.
        scored = yield from context.training.score([*unknown, *training_set.answers])
        context.baseline.add(unknown, scored.scores[:len(unknown)])
        training_set.add_baseline(
            context.baseline.of(guarded), scored.soft_targets[len(unknown):])
        return training_set

    # -- training --------------------------------------------------------------------

    def _train(self, training_set: TrainingSet) -> Task[Trained]:
        """Run optimizer steps until the corrections are learned, or until others can join."""
        while True:
            self.state = JobState.TRAINING
            trained = yield from self._optimizer_step(self._plan_step(training_set))
            if trained.scores is not None or trained.joining:
                return trained

    def _plan_step(self, training_set: TrainingSet) -> StepPlan:
        context, most = self._context, self._context.training.step_tokens
        if not self.everywhere:
            return context.scoped_builder.step(
                training_set, self.corrections, self._finetune, most=most,
                steps=self.progress.steps)
        return context.builder.step(
            training_set, self.corrections, self._finetune, most=most,
            steps=self.progress.steps)

    def _optimizer_step(self, plan: StepPlan) -> Task[Trained]:
        """Run a step, unless training ends with its scores or corrections can join before it."""
        scores: StepScores | None = None
        yield from self._context.training.prefixes.prepare(s for p in plan.parts for s in p)
        for part in self._context.training.steps(plan):
            yield from self._announce()
            joining = yield from self._run(part, until_scored=scores is None)
            if scores is None and not joining:
                scores = self._assess(part, plan)
                if self._ends_training(scores):
                    return Trained(scores)
                joining = yield from self._run(part)
            if joining:
                return Trained(joining=joining)
        self.progress.steps += 1
        return Trained(joining=self._joining())

    def _run(self, step: FinetuneStep, *, until_scored: bool = False,
             ) -> Task[list[PendingCorrection]]:
        """
        Run a part of a step to its end, or with ``until_scored`` until its samples are scored.

        Returns corrections that can join the job: the part is then abandoned. Within a part they
        can join only before the first update, and not while it piggybacks on inference.
        """
        while not step.done:
            joining = [] if self.progress.steps or step.holds_blocks else self._joining()
            if joining or (until_scored and step.scored):
                return joining
            yield step
        return []

    def _assess(self, step: FinetuneStep, plan: StepPlan) -> StepScores:
        scores = StepScores(
            step.samples[:plan.must_be_right], tuple(step.scores()[:plan.must_be_right]),
            len(self.corrections))
        if self.progress.steps == 0:
            self._score_before = scores.mean
        return scores

    def _ends_training(self, scores: StepScores) -> bool:
        return self.progress.steps >= self._finetune.max_steps or (
            self.progress.steps >= self._least_steps and scores.learned_well)

    def _joining(self) -> list[PendingCorrection]:
        """Return corrections that came since the job began and may be learned in it."""
        context, finetune, progress = self._context, self._finetune, self.progress
        if (not context.scores_first or self.kind is not JobKind.LEARNING
                or len(self.corrections) >= JOB_CORRECTIONS or progress.lost
                or progress.steps > JOIN_SHARE * finetune.max_steps):
            return []
        # Corrections that were scored before did not fit.
        came = [c for c in context.queue.of(self.profile)
                if c.arrived >= self._begun and not c.log_probabilities
                and self._may_learn(c.record) and c in self._fitting([*self.corrections, c])]
        return candidates(came, by_priority=finetune.order == 'priority')

    def _may_learn(self, record: CorrectionRecord) -> bool:
        """Return whether this job's version is the one that a correction is to be learned in."""
        context = self._context
        return (self.everywhere or self._continues != FRESH) and self._start == start_of(
            context.live, record, context.settings.adapter)

    def _join(self, joining: Sequence[PendingCorrection], start: dict[str, Tensor],
              records: JobRecords) -> Task[TrainingSet]:
        """Score more corrections under the live version; return the training set with them."""
        context = self._context
        context.queue.remove(joining)
        self.corrections = [*self.corrections, *joining]
        yield from self._supersede(joining)
        trained = context.training.swap_out(start) if self.progress.steps else None
        self.swapped_out = trained is not None
        yield from self._choose()
        training_set = yield from self._build_training_set(records)
        if trained is not None:
            context.training.swap_in(trained)
            self.swapped_out = False
            new = [c.log_probabilities[0] for c in self.corrections
                   if c.record.id not in self.announced]
            earlier = len(self.corrections) - len(new)
            self._score_before = (
                earlier * self._score_before + sum(new)) / len(self.corrections)
        return training_set

    def _give_up_unlearned(self, scores: StepScores,
                           training_set: TrainingSet) -> Task[None]:
        """Report the corrections that are not learned as FAILED, and go on without them."""
        learned = [c for c, right in zip(self.corrections, scores.right, strict=True) if right]
        yield from self._fail([c for c in self.corrections if c not in learned],
                              'not learned' + self._after_steps)
        training_set.corrected = [
            s for s, c in zip(training_set.corrected, self.corrections, strict=True)
            if c in learned]
        self.corrections = learned

    def _train_on(self, training_set: TrainingSet, lost: Sequence[Sample]) -> None:
        """
        Train on until the samples that a candidate has lost are right as well.

        Runs at least one step, in case its first part has no room for them.
        """
        training_set.add_lost(lost)
        self.progress.lost = len(training_set.lost)
        self._least_steps = self.progress.steps + 1

    # -- the candidate ---------------------------------------------------------------

    def _interpolate(self, start: dict[str, Tensor], trained: StepScores,
                     training_set: TrainingSet) -> Task[float]:
        """
        Interpolate towards the live version as far as everything in ``trained`` stays learned.

        Returns the corrections' mean log p per token.
        """
        count = len(self.corrections)
        # Interpolation would lose again what earlier candidates have lost, unless it scores that.
        # In the last round, there is no other chance for what it may lose.
        if not (self.everywhere and self._context.scores_first and trained.learned_well
                and all(s in trained.samples for s in training_set.lost)
                and self.progress.steps < self._finetune.max_steps):
            return trained.mean
        self.state = JobState.INTERPOLATING
        scores = yield from interpolate(
            self._context.training, start, trained.samples, lambda s: learned_well(s, count))
        return trained.mean if scores is None else fmean(
            s.log_probability for s in scores[:count])

    def _lost(self, training_set: TrainingSet) -> Task[list[Sample]]:
        """
        Return guarded samples that the candidate has lost.

        If it has lost some again that earlier candidates had lost, the others are not scored.
        """
        self.state = JobState.JUDGING
        before = training_set.lost
        for samples in before, [s for s in training_set.gate.samples if s not in before]:
            scored = yield from self._context.training.score(samples)
            lost = wrong(samples, scored.scores)
            if lost:
                return lost
        return []

    def _publish(self, training_set: TrainingSet, score_after: float) -> Task[VersionRecord]:
        context = self._context
        version = yield from context.publisher.publish(self, lambda: self._record(score_after))
        # The next job begins from this version.
        context.baseline.replace((self.profile, self.profile, version.version),
                                 training_set.gate.samples)
        return version

    # -- helpers ---------------------------------------------------------------------

    @property
    def _finetune(self) -> FinetuneSettings:
        return self._context.settings.finetune

    @property
    def _after_steps(self) -> str:
        return ' after ' + counted(
            self.progress.steps, 'step (finetune.max_steps)', 'steps (finetune.max_steps)')

    def _fitting(self, corrections: Sequence[PendingCorrection]) -> list[PendingCorrection]:
        if not self.everywhere and self._continues == FRESH:
            return list(corrections[:1])        # with an adapter of its own
        return fitting(corrections, self._context.chat, self._context.training.step_tokens)

    def _announce(self) -> list[CorrectionStatus]:
        """Report corrections as TRAINING, each one once."""
        if self.kind is not JobKind.LEARNING:
            return []
        return [self._context.disk.set_state(r, CorrectionState.TRAINING)
                for r in self.unannounced([c.record for c in self.corrections])]

    def _fail(self, corrections: Sequence[PendingCorrection],
              reason: str) -> list[CorrectionStatus]:
        """Report corrections as FAILED."""
        if self.kind is not JobKind.LEARNING:
            return []
        return [self._context.publisher.failed(c.record, reason) for c in corrections]

    def _already_learned(self, corrections: Sequence[PendingCorrection]) -> list[CorrectionStatus]:
        if self.kind is not JobKind.LEARNING:
            return []
        return [self._context.publisher.already_learned(c.record, self._continues)
                for c in corrections]

    def _record(self, score_after: float) -> VersionRecord:
        return VersionRecord(
            profile=self.profile, version=0, parent=self._parent, continues=self._continues,
            correction_ids=tuple(c.record.id for c in self.corrections),
            score_before=self._score_before, score_after=score_after,
            train_tokens=self.progress.train_tokens, train_seconds=self.progress.train_seconds,
            created=time.time(), everywhere=self.everywhere)
