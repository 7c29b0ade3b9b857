# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
From accepted corrections to a published adapter version, one job at a time.

A job chooses among the corrections that wait for one profile, trains them together with
replayed answers, and ends as soon as every corrected answer leads clearly and the gate finds
nothing lost. Everything here runs in the device thread and never blocks:
disk work goes to the journal's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
import math
from statistics import fmean
from typing import Any

from mace_ros.api.events import CorrectionState, CorrectionStatus, Event
from mace_ros.api.settings import Settings
from mace_ros.finetune.null_space import InputSubspace
from mace_ros.finetune.sample import Sample, SampleScore, shared_tokens
from mace_ros.finetune.step import FinetuneStep
from mace_ros.learning.backoff import Backoff
from mace_ros.learning.correction_queue import CorrectionQueue, JOB_CORRECTIONS
from mace_ros.learning.drift import Drift, surprise
from mace_ros.learning.duty_cycle import DutyCycle
from mace_ros.learning.gate import Verdict
from mace_ros.learning.job import Job, JobInputs, PendingCorrection
from mace_ros.learning.outcomes import suspected_regression, SuspectedRegression
from mace_ros.learning.publishing import Publisher
from mace_ros.learning.regression_check import RegressionCheck
from mace_ros.learning.rollback import RollbackRefused
from mace_ros.learning.rollback_queue import RollbackQueue
from mace_ros.learning.samples import first_within, interleaved, sample, turn
from mace_ros.learning.selection import candidates, JOB_CANDIDATES, ordered
from mace_ros.learning.training import Training
from mace_ros.learning.training_set import texts, TrainingSetBuilder
from mace_ros.memory.adapter_slots import AdapterSlots, NO_SLOT
from mace_ros.model.chat import ChatTokenizer
from mace_ros.model.lora import LoRAManager
from mace_ros.model.packed_model import PackedModel
from mace_ros.scheduling.plan import SegmentKind
from mace_ros.store.adapter_store import AdapterStore
from mace_ros.store.journal import CorrectionRecord, Journal
from mace_ros.store.journal_file import JournalError
from mace_ros.store.journal_writer import JournalWriter

MAX_TRIES = 3           # of a job that the device or the disk fails
REMEMBERED = 1000       # scores under the version that a job begins from
MORE_STEPS = 4          # at least, after a candidate was rejected
# What comes may join a job until so much of finetune.max_steps is spent: the rest is enough for it.
JOINED_WITHIN = 0.25
# A right token must lead by this much (in logits) to stay right: a different order of additions
# in another batch does not change the answer then.
RIGHT_MARGIN = 0.5
# What is taught is trained on until it leads by more: then it is right in other words, too.
LEARNED_MARGIN = 1.0


def learned_well(scores: Sequence[SampleScore], count: int) -> bool:
    """Return whether all that must be right leads, the first ``count``, as taught, by more."""
    return (all(s.margin >= LEARNED_MARGIN for s in scores[:count])
            and all(s.margin >= RIGHT_MARGIN for s in scores[count:]))


@dataclass(frozen=True)
class LearningStatus:
    waiting: int
    oldest_at: float
    drift_state: Any
    drift_level: float
    budget: float
    trouble: str


class Learner:
    """Decides what is trained and published; the engine runs the steps that it asks for."""

    def __init__(self, *, model: PackedModel, model_name: str, lora: LoRAManager,
                 chat: ChatTokenizer, slots: AdapterSlots, journal: JournalWriter,
                 store: AdapterStore, cost: Any, settings: Settings,
                 wake: Callable[[], None], clock: Callable[[], float]) -> None:
        """``wake`` is called from another thread when :meth:`advance` can go on."""
        bank = lora
        self._chat, self._slots = chat, slots
        self._journal, self._store, self._wake = journal, store, wake
        self.publisher = Publisher(
            model_name=model_name, bank=bank, slots=slots, journal=journal, store=store, wake=wake)
        self._queue = CorrectionQueue()
        self._job: Job | None = None
        self.training = Training(model, bank, lambda: min(self.unlearned, default=math.inf))
        self._lessons = TrainingSetBuilder(chat)
        # Scores under a profile's version that its gate has found out.
        self._known: dict[tuple[int, ...], SampleScore] = {}
        self._known_of: tuple[str, str, int] | None = None
        self._recent: deque[CorrectionRecord] = deque(maxlen=JOB_CANDIDATES)
        self.comparing = RegressionCheck(store)
        self.condemn: Callable[[SuspectedRegression], None] = lambda suspicion: None
        self._jobs = 0
        self.drift = Drift()
        self._resting = DutyCycle()
        self._rests_until: float | None = None
        self._backoff = Backoff()       # after what failed through no correction's fault
        self._settings = settings
        self.clock: Callable[[], float] = clock
        self.held: str | None = None    # a profile for which nothing may be begun
        self.wants_anchors = False
        self._trouble = ''      # why a job broke off that is tried again
        # Device seconds of a step over so many tokens.
        self.step_s: Callable[[int], float] = cost.step_s
        self.training.tokens_within = cost.tokens_within
        self.condemn = self._condemn_shim
        self.rollbacks = RollbackQueue(
            bank=bank, slots=slots, journal=journal, store=store, wake=wake)
        self._looks = []

    # SHIM -----------------------------------------------------------------
    def restore(self):
        events = self.publisher.restore()
        for record in self._journal.submit(lambda j: j.pending()).result():
            self.add(record, self.clock())
        return events

    def _condemn_shim(self, s):
        self.rollbacks.add(s.profile, s.better, s.reason, Future())

    def update(self, settings):
        self._settings = settings

    def accepted(self, accepted):
        record = accepted.record
        if not accepted.new:
            return [CorrectionStatus(record.id, record.state, record.reason, record.adapter_version)]
        self.drift.corrected(record.query_id)
        renewed = self.renew(record)
        if renewed is None:
            training = self.trains(accepted.superseded)
            if training is not None:
                self.stop(training)
            self.add(record, accepted.arrived)
        if record.query_id and self._settings.gate.auto_rollback:
            def look(journal):
                answer = journal.answer(record.query_id)
                return None if answer is None else suspected_regression(journal, answer.lineage)
            with suppress(JournalError):
                self._looks.append(self.publisher.submit(look))
        return [CorrectionStatus(record.id, CorrectionState.ACCEPTED), *(
            CorrectionStatus(i, CorrectionState.SUPERSEDED, f'by correction {record.id}')
            for i in accepted.superseded), *(renewed or ())]

    def answered(self, query_id):
        self.drift.answered(query_id)

    def versions(self, profile):
        return self.publisher.versions(profile)

    def rollback(self, profile, version, reason, done):
        self.rollbacks.add(profile, version, reason, done)

    def poll(self):
        for look in [x for x in self._looks if x.done()]:
            self._looks.remove(look)
            if look.exception() is None and look.result() is not None:
                self.suspect(look.result())
        events = self.rollbacks.advance(may_begin=self.stop)
        self.held = self.rollbacks.profile
        return events + self.advance(self._settings)

    def commit(self, segments):
        for segment, spent in segments:
            self.ran(segment.tokens * (segment.kind is SegmentKind.OPTIMIZER), spent)

    def fail(self, reason):
        return self.drop(reason)

    @property
    def oldest_unlearned_at(self):
        return min(self.unlearned, default=math.inf)

    def status(self):
        u = self.unlearned
        return LearningStatus(len(u), min(u, default=math.inf), self.drift.state, self.drift.level, self.budget(self._settings), self.trouble)

    def close(self, reason):
        self.rollbacks.close(reason)
    # SHIM END -------------------------------------------------------------

    # -- what comes in ---------------------------------------------------------------

    def add(self, record: CorrectionRecord, arrived: float) -> None:
        """Queue a correction that is in the journal, in the place of what it supersedes."""
        # Which is not to be rehearsed any more.
        self._recent = deque((r for r in self._recent if (r.profile, r.prompt_ids) != (
            record.profile, record.prompt_ids)), JOB_CANDIDATES)
        self._queue.add(record, arrived)

    def renew(self, record: CorrectionRecord) -> list[Event] | None:
        """
        Let a correction take the place of the same one that is trained now, which goes on.

        Returns what there is to tell; None, changing nothing, if the job trains nothing that
        says the same or its version is on its way to the disk under the older one's id.
        """
        job = self._job
        if job is None or job.saving is not None or job.rehearses:
            return None
        for older in job.corrections:
            if all(getattr(older.record, name) == getattr(record, name)
                   for name in ('profile', 'prompt_ids', 'corrected', 'weight')):
                was_told = older.record.id in job.told
                # What was scored, or is about to be, is what the older one rejected.
                older.record = replace(record, rejected=older.record.rejected)
                older.repeats += 1
                return self._tell_training(job, [record]) if was_told else []
        return None

    def trains(self, correction_ids: Collection[str]) -> str | None:
        """Return the profile whose job trains one of these, if there is one."""
        job = self._job
        if job is None or not any(w.record.id in correction_ids for w in job.corrections):
            return None
        return job.profile

    def suspect(self, suspicion: SuspectedRegression) -> None:
        """Compare a version with the one that may be better, before the next job."""
        if self._decides:       # the baselines never do
            self.comparing.suspect(suspicion)

    def give_anchors(self, anchors: list[tuple[list[int], list[int]]]) -> None:
        """Take the base model's answers to :data:`ANCHORS`, as (prompt, output) ids."""
        self._lessons.anchors = anchors
        self.wants_anchors = False

    @property
    def trouble(self) -> str:
        """Why device or disk broke off what is being tried again; empty if they did not."""
        return self._trouble if self.busy else ''

    # -- what the engine runs --------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether anything waits to be learned."""
        return self._job is not None or bool(self._queue)

    @property
    def wake_at(self) -> float | None:
        """When :meth:`advance` can go on by itself, if it waits for nothing but a time."""
        job = self._job
        if job is None:
            return self._rests_until
        # Later than that it waits for a slot, of which the engine tells.
        again = job.publication.until
        return again if again > self.clock() else None

    def budget(self, settings: Settings) -> float:
        """Return the share of device time for learning, by drift and what waits."""
        if settings.scheduler.policy != 'mace':     # the baselines know no drift
            return settings.finetune.budget
        return self.drift.budget(settings.drift.min_budget, settings.finetune.budget,
                                 backlog=len(self._queue) >= JOB_CORRECTIONS)

    @property
    def unlearned(self) -> list[float]:
        """When each correction arrived, on the engine's clock, that is not yet learned."""
        job = self._job
        return [w.waits_since for w in [*(job.corrections if job else []), *self._queue]]

    @property
    def step(self) -> FinetuneStep | None:
        """The fine-tune step that can run now."""
        job = self._job
        if job is None:
            return None
        if job.scoring is not None:
            return job.scoring.step
        return job.step if job.score_after is None else None

    @property
    def wants_to_judge(self) -> bool:
        """Whether a step's scores are known that nobody has looked at."""
        job = self._job
        return (job is not None and job.scoring is None and job.step is not None
                and job.step.scored and not job.judged)

    def ran(self, tokens: int, seconds: float) -> None:
        """Note device time spent on the current step, and fine-tune tokens of whole steps."""
        job = self._job
        if job is not None:
            job.train_tokens += tokens if job.scoring is None else 0
            job.train_seconds += seconds
            self._resting.spent(seconds)

    def advance(self, settings: Settings) -> list[Event]:
        """Go on as far as possible without waiting; return what happened."""
        self._settings, self.training.settings = settings, settings.finetune
        rejected = self.publisher.rejected()
        if rejected:
            return rejected
        if self._job is None:
            return self._start()
        job = self._job
        if job.scoring is not None:
            return self.training.go_on_scoring(job, job.scoring)
        if job.sparing is not None:
            return self._go_on_sparing(job, job.sparing)
        if job.saving is not None:
            return self._publish(job) if job.saving.done() else []
        if job.step is not None and (joining := self._joining(job)) and self._can_look(job):
            return self._join(job, joining)
        if job.score_after is not None:
            return self._save(job)
        if job.step is None:
            if not job.fetched.done() or (self._lessons.anchors is None and not job.suspicion):
                return []
            return self._prepare(job)
        if job.step.done and job.parts:
            self.training.next_part(job)
        elif job.step.done:
            job.steps += 1
            self._next_step(job)
        elif job.step.scored and not job.judged:
            return self._judge(job)
        return []

    def drop(self, reason: str) -> list[Event]:
        """Give up the current job, because device or disk failed; try it again a few times."""
        job = self._job
        self._trouble = reason
        # What is on its way to the disk needs nothing of what failed, and may be on record.
        if job is None or job.saving is not None:
            return []
        self._job = None
        job.scoring = None      # it refers to the job, whose tensors would wait for the collector
        if job.slot is not None:
            self._slots.give_back(job.slot)
        self._wake()
        if job.rehearses:
            self._try_later(job)
            return []
        # While something is about to join, what is trained already is not to blame.
        tried = [w for w in job.corrections if job.trained is None or w.record.id not in job.told]
        failed = [w for w in tried if w.tries >= MAX_TRIES]
        self._queue.put_back(
            replace(w, tries=w.tries + 1) if w in tried else w
            for w in job.corrections if w not in failed)
        return [self._set_state(w.record, CorrectionState.FAILED, reason) for w in failed]

    def stop(self, profile: str) -> bool:
        """
        Let go of what is trained into a profile, or from its live version, to begin anew later.

        Returns False, changing nothing, while a version of it is on its way to the disk.
        """
        # What it was taught is not to be trained again and again.
        self._recent = deque((r for r in self._recent if r.profile != profile), JOB_CANDIDATES)
        self.comparing.forget(profile)
        job = self._job
        if job is None or profile not in (
                job.profile, self._slots.live(job.profile).profile):
            return True
        if job.saving is not None:
            return False
        if job.slot is not None:
            self._slots.give_back(job.slot)
        self._job, job.scoring = None, None
        if not job.rehearses:
            self._queue.put_back(job.corrections)
        return True

    # -- a job's life ----------------------------------------------------------------

    def _start(self) -> list[Event]:
        settings, self._rests_until = self._settings, None
        if settings.finetune.budget == 0:
            return []
        if self.clock() < self._backoff.until:
            self._rests_until = self._backoff.until
            return []
        suspicion = self.comparing.suspicion
        if suspicion is not None and suspicion.profile != self.held:
            self._compare(suspicion)
            return []
        ready = [w for w in self._queue if w.record.profile != self.held]
        if not ready:
            return self._rehearse()
        if self._decides:
            # Nothing grows older than it should for that.
            until = min(self._resting.until(self.budget(settings)),
                        min(w.waits_since for w in ready) + settings.slo.freshness_s)
            if self.clock() < until:
                self._rests_until = until
                return []
        profile = self._queue.next_profile(ready, self._jobs + 1)
        chosen = [w for w in ready if w.record.profile == profile]
        if not self._decides:
            chosen = self._fitting(chosen)
        else:
            chosen = candidates(chosen, by_priority=settings.finetune.order == 'priority')
        self._queue.remove(chosen)
        if not self._slots.has_room(profile):
            return [self._set_state(w.record, CorrectionState.FAILED, NO_SLOT) for w in chosen]
        self._begin(profile, chosen)
        return []

    def _rehearse(self) -> list[Event]:
        """Under the policy ``continuous``, which never rests, train again what was learned."""
        if self._settings.scheduler.policy == 'continuous' and self._recent:
            profile = self._recent[-1].profile
            if profile == self.held:
                return []
            again = turn([r for r in self._recent if r.profile == profile],
                         min(JOB_CORRECTIONS, len(self._recent)), self._jobs)
            now = self.clock()
            job = self._begin(profile, [
                PendingCorrection(r, now) for r in {r.id: r for r in again}.values()])
            job.rehearses, job.least_steps = True, self._settings.finetune.period_steps
        return []

    def _begin(self, profile: str, chosen: list[PendingCorrection]) -> Job:
        count = self._settings.finetune.replay_samples

        def fetch(journal: Journal) -> JobInputs:
            # Of one that has no version of its own yet, the robot's at its first correction.
            live = journal.next_parent(profile)
            return JobInputs(
                live, journal.replay_candidates(profile, count), journal.held_by(live),
                self._store.load(live.path, live.sha256) if live else None)

        now = self.clock()
        self._job = Job(profile, chosen, self.publisher.submit(fetch), begun=now)
        self._resting.begun(now, self.budget(self._settings))
        self._jobs += 1
        self.wants_anchors = self._lessons.anchors is None
        return self._job

    @property
    def _decides(self) -> bool:
        """Whether corrections are scored before it is decided what to learn."""
        return self._settings.scheduler.policy == 'mace'

    def _fitting(self, waiting: Sequence[PendingCorrection]) -> list[PendingCorrection]:
        """Return the first corrections that may be learned together; at least one."""
        most = self.training.step_tokens
        chosen = list(waiting[:JOB_CORRECTIONS])
        samples = self._corrected([w.record for w in chosen])
        shared = shared_tokens(samples)
        together = first_within(samples, most - shared, at_least=1, shared=shared)
        return chosen[:len(together)]

    def _prepare(self, job: Job) -> list[Event]:
        """Let the base model teach its answers, once."""
        error = job.fetched.exception()
        if error is not None:
            return self._put_off(job, error)
        self._backoff.succeeded()
        if job.suspicion is not None:
            return self._score_better(job, job.suspicion)
        if self._lessons.teachers is not None:
            return self._load(job)
        self.training.take_up(job, None)
        bank = self.training.bank
        directions = InputSubspace(bank.spared) if bank.spared_nbytes else None
        return self.training.score(
            job, self._lessons.replayed_anchors,
            partial(self._take_teachers, job, directions), directions)

    def _put_off(self, job: Job, error: BaseException) -> list[Event]:
        """Begin a job anew later: that nothing can be read is no fault of what it learns."""
        self._job = None
        if isinstance(error, RollbackRefused):      # a comparison that is of no use any more
            self._wake()
            return []
        self._trouble = f'the live version could not be read: {error}'
        self._try_later(job)
        if not job.rehearses:
            self._queue.put_back(job.corrections)
        return []

    def _try_later(self, job: Job) -> None:
        """Begin nothing for a while; then compare again what was compared."""
        self._backoff.failed(self.clock())
        self._rests_until = self._backoff.until
        if job.suspicion is not None:
            self.comparing.broke_off(job.suspicion)

    def _take_teachers(self, job: Job, directions: InputSubspace | None, scores: list[SampleScore],
                       taught: list[Sample]) -> list[Event]:
        job.sparing = self._spare(directions, taught)
        return self._go_on_sparing(job, job.sparing)

    def _spare(self, directions: InputSubspace | None, taught: list[Sample]) -> Iterator[None]:
        """Spare what was found, one group of layers after the other; then it is all known."""
        for group, found in directions.found() if directions is not None else ():
            self.training.bank.spare(group, found)
            yield
        self._lessons.teachers = taught

    def _go_on_sparing(self, job: Job, sparing: Iterator[None]) -> list[Event]:
        for _ in sparing:
            self._wake()    # again at once, but for those who ask meanwhile
            return []
        job.sparing = None
        return self._load(job)

    def _load(self, job: Job) -> list[Event]:
        """Go on from the live version; look first how it does on the candidates."""
        fetched = job.fetched.result()
        live = fetched.live
        if live is not None and live.profile == job.profile:
            job.parent = live.version
        source = job.profile, *(('', 0) if live is None else (live.profile, live.version))
        if self._known_of != source:
            self._known, self._known_of = {}, source
        self.training.take_up(job, fetched.take())
        job.began_with = self.training.bank.copies()
        return self._look(job)

    def _look(self, job: Job) -> list[Event]:
        prefers = self._settings.finetune.objective == 'dpo'
        if job.rehearses or not (self._decides or prefers):
            return self._guard(job)
        # What was scored stays so, but for what preferring needs of the version that is live now.
        unknown = [w for w in job.corrections if prefers or not w.leads]
        both = [sample(w.record.prompt_ids, self._chat.answer(text))
                for w in unknown for text in texts(w.record)]
        return self.training.score(job, both, partial(self._choose, job, unknown))

    def _choose(self, job: Job, unknown: Sequence[PendingCorrection], scores: list[SampleScore],
                taught: list[Sample]) -> list[Event]:
        """Let go what the live version answers right, and learn first what gains most."""
        left = iter(scores)
        right: list[PendingCorrection] = []
        for waiting in unknown:
            of = [next(left) for _ in texts(waiting.record)]
            if not waiting.leads:
                self.drift.outcome(surprise(of[0].log_probability))
                self.comparing.scored(waiting.record.id, of[0].log_probability)
            waiting.leads = tuple(s.log_probability for s in of)
            if len(of) > 1:
                waiting.reference = (of[0].log_probability * of[0].tokens
                                     - of[1].log_probability * of[1].tokens)
            # What joins has to be right in the next version, whatever the live one answers.
            if of[0].margin >= RIGHT_MARGIN and not job.told:
                right.append(waiting)
        trained = [w for w in job.corrections if w.record.id in job.told]
        wrong = [w for w in job.corrections if w not in right and w not in trained]
        if self._settings.finetune.order == 'priority':
            wrong = ordered(
                wrong, self._queue.of(job.profile), now=self.clock(),
                freshness_s=self._settings.slo.freshness_s,
                step_s=lambda w: self.step_s(self._length(w.record)))
        fitting = self._fitting([*trained, *wrong])
        job.corrections = [*trained, *(w for w in wrong if w in fitting)]
        self._queue.put_back(w for w in wrong if w not in fitting)
        events: list[Event] = [self._set_state(
            w.record, CorrectionState.LEARNED, 'the live version already answers so', job.parent)
            for w in right]
        if not job.corrections:
            self._job = None
            return events
        return events + self._guard(job)

    def _joining(self, job: Job) -> list[PendingCorrection]:
        """Return what came since a job began and may be learned in it: it has no candidate yet."""
        finetune = self._settings.finetune
        if (not self._decides or job.rehearses or len(job.corrections) >= JOB_CORRECTIONS
                or job.score_after is not None or job.repaired or job.rejections
                or (job.has_changed_weights
                    and job.steps + 1 > JOINED_WITHIN * finetune.max_steps)):
            return []
        # Those that were looked at did not fit.
        came = [w for w in self._queue.of(job.profile)
                if w.arrived >= job.begun and not w.leads
                and w in self._fitting([*job.corrections, w])]
        return candidates(came, by_priority=finetune.order == 'priority')

    def _can_look(self, job: Job) -> bool:
        """
        Return whether what joins can be scored now, under the version that the job began from.

        Once the job has changed the weights, that is done between two steps.
        """
        assert job.step is not None
        if job.has_changed_weights:
            return job.step.done and not job.parts
        # A step that rides in passes is not given up.
        return not job.step.holds_blocks

    def _join(self, job: Job, joining: list[PendingCorrection]) -> list[Event]:
        self._queue.remove(joining)
        job.corrections = [*job.corrections, *joining]
        if job.has_changed_weights:
            job.steps += 1
            self.training.swap_out(job)
        return self._look(job)

    def _guard(self, job: Job) -> list[Event]:
        """Gather what is to be learned, and score what is guarded under the live version."""
        own = self._lessons.gather(job, self._settings.finetune, self._jobs)
        assert job.gate is not None
        # What is replayed of this robot's answers needs the live version as its teacher.
        unknown = [s for s in job.gate.samples if s.tokens not in self._known or s in own]
        return self.training.score(job, unknown, partial(self._begin_training, job, unknown, own))

    def _begin_training(self, job: Job, unknown: list[Sample], own: list[Sample],
                        scores: list[SampleScore], taught: list[Sample]) -> list[Event]:
        assert job.gate is not None
        self._known.update({s.tokens: score for s, score in zip(unknown, scores, strict=True)})
        job.before = [self._known[s.tokens] for s in job.gate.samples]
        for tokens in list(self._known)[:-REMEMBERED]:
            del self._known[tokens]
        job.forgotten = job.gate.wrong(job.before)
        job.replayed = interleaved(job.replayed, [t for t in taught if t in own])
        if job.trained is not None:
            self.training.go_on(job)
            new = [w.leads[0] for w in job.corrections if w.record.id not in job.told]
            earlier = len(job.corrections) - len(new)
            job.score_before = (earlier * job.score_before + sum(new)) / len(job.corrections)
        self._next_step(job)
        return [] if job.rehearses else self._tell_training(
            job, [w.record for w in job.corrections])

    def _tell_training(self, job: Job, records: Sequence[CorrectionRecord]) -> list[Event]:
        new = [r for r in records if r.id not in job.told]
        job.told.update(r.id for r in new)
        return [self._set_state(r, CorrectionState.TRAINING) for r in new]

    def _next_step(self, job: Job) -> None:
        self.training.begin_step(job, *self._lessons.step(
            job, self._settings.finetune, self.training.step_tokens))

    def _still_learned(self, job: Job, scores: Sequence[SampleScore]) -> bool:
        count = len(job.corrections)
        if not learned_well(scores, count):
            return False
        job.score_after = fmean(s.log_probability for s in scores[:count])
        return True

    def _propose(self, job: Job) -> list[Event]:
        """Score the candidate."""
        assert job.gate is not None
        return self.training.score(job, job.gate.exact, partial(self._weigh_exact, job))

    def _weigh_exact(self, job: Job, scores: list[SampleScore], taught: list[Sample],
                     ) -> list[Event]:
        """Look first for what a candidate lost of what must be right: mostly that comes back."""
        assert job.gate is not None
        before = {s.tokens: score for s, score in zip(job.gate.samples, job.before, strict=True)}
        exact = job.gate.exact
        lost = [s for s, score in zip(exact, scores, strict=True)
                if before[s.tokens].exact and not score.exact]
        if lost and not job.repaired and job.steps < self._settings.finetune.max_steps:
            job.repaired = True
            return self._go_on(job, lost)
        job.after = {s.tokens: score for s, score in zip(exact, scores, strict=True)}
        others = [s for s in job.gate.samples if s.tokens not in job.after]
        return self.training.score(job, others, partial(self._weigh, job, others))

    def _weigh(self, job: Job, others: list[Sample], scores: list[SampleScore],
               taught: list[Sample]) -> list[Event]:
        """Ask the gate about a candidate."""
        assert job.gate is not None
        job.after |= {s.tokens: score for s, score in zip(others, scores, strict=True)}
        verdict = job.gate.judge(
            job.before, [job.after[s.tokens] for s in job.gate.samples],
            self._settings.gate.tolerance)
        return self._reject(job, verdict) if verdict.reason else self._save(job)

    def _reject(self, job: Job, verdict: Verdict) -> list[Event]:
        """Don't publish; go on with what was lost among what must be right, if that may help."""
        self.publisher.reject(job, verdict.reason)
        if job.steps < self._settings.finetune.max_steps:
            job.rejections += 1
            job.least_steps = job.steps + MORE_STEPS
            return self._go_on(job, verdict.lost)
        self._job = None
        return self._fail(
            job, job.corrections,
            f'{verdict.reason} after {job.steps} steps (finetune.max_steps)')

    def _go_on(self, job: Job, lost: Sequence[Sample]) -> list[Event]:
        """Train on, until what a candidate lost is right as well."""
        job.lost += [s for s in lost if s not in job.lost]
        job.score_after = None
        self._next_step(job)
        return []

    def _judge(self, job: Job) -> list[Event]:
        """Decide, with the scores of a step's forward, whether its backward is still needed."""
        assert job.step is not None
        most = self._settings.finetune.max_steps
        job.judged = True
        count = len(job.corrections)
        scores = job.step.scores()[:job.must_be_right]
        right = [s.margin >= RIGHT_MARGIN for s in scores]
        well = learned_well(scores, count)
        score = fmean(s.log_probability for s in scores[:count])
        if job.steps == 0:
            job.score_before = score
        if job.steps < most and (job.steps < job.least_steps or not well):
            return []
        keeps = all(right[count:])
        learned = [w for w, ok in zip(job.corrections, right, strict=False) if ok and keeps]
        reason = ('not learned' if keeps else 'not learned without losing what was right before')
        events = self._fail(job, [w for w in job.corrections if w not in learned],
                            f'{reason} after {job.steps} steps (finetune.max_steps)')
        if learned and job.steps:
            job.samples = [s for s, w in zip(job.samples, job.corrections, strict=True)
                           if w in learned]
            job.corrections, job.score_after = learned, score
            # After a rejection, it would lead to what was rejected. Baselines know nothing of it.
            if not well or job.rejections or not self._decides:
                return events + self._propose(job)
            return events + self.training.pull_back(
                job, job.step.samples[:job.must_be_right], partial(self._still_learned, job),
                partial(self._propose, job))
        self._job = None
        self._wake()    # a rehearsal says nothing of its end
        return events + [
            self._set_state(w.record, CorrectionState.LEARNED,
                            'the live version already answers so', job.parent) for w in learned]

    def _fail(self, job: Job, corrections: Sequence[PendingCorrection], reason: str) -> list[Event]:
        return [] if job.rehearses else [
            self._set_state(w.record, CorrectionState.FAILED, reason) for w in corrections]

    def _save(self, job: Job) -> list[Event]:
        if not self._slots.has_room(job.profile):       # a rollback has taken it meanwhile
            self._job = None
            return self._fail(job, job.corrections, NO_SLOT)
        if self.clock() >= job.publication.until:
            self.publisher.save(job)
        return []

    def _publish(self, job: Job) -> list[Event]:
        assert job.saving is not None
        if self.clock() < job.publication.until:
            return []
        error = job.saving.exception()
        if error is not None:
            self._trouble = f'the new version could not be saved: {error}'
            self.publisher.save_later(job, self.clock())
            return []
        try:
            record, events = self.publisher.publish(job)
        except Exception as broken:     # of the device; on record the version is live
            self._trouble = f'the new version could not be put into its slot: {broken}'
            job.publication.failed(self.clock())
            return []
        self._known, self._known_of = job.after, (job.profile, job.profile, record.version)
        if not job.rehearses:
            superseded = {w.record.prompt_ids for w in self._queue.of(job.profile)}
            self._recent.extend(w.record for w in job.corrections
                                if w.record.prompt_ids not in superseded)
        self._job, self._trouble = None, ''
        return events

    # -- whether the live version is to blame ------------------------------------------

    def _compare(self, suspicion: SuspectedRegression) -> None:
        self.comparing.begin(suspicion)
        fetched = self.publisher.submit(lambda j: self.comparing.fetch(j, suspicion))
        # No correction is its own, so it is the rehearsal of none.
        self._job = Job(suspicion.profile, [], fetched, rehearses=True, suspicion=suspicion)

    def _score_better(self, job: Job, suspicion: SuspectedRegression) -> list[Event]:
        """Score what was corrected under the version that may be better, ..."""
        self.training.take_up(job, job.fetched.result().take_better())
        return self.training.score(
            job, self._corrected(suspicion.corrections),
            partial(self._score_live, job, suspicion))

    def _score_live(self, job: Job, suspicion: SuspectedRegression, better: list[SampleScore],
                    taught: list[Sample]) -> list[Event]:
        """... and under the live one what was not when it came."""
        self.training.take_up(job, job.fetched.result().take())
        unseen = self.comparing.unseen(suspicion)
        return self.training.score(
            job, self._corrected(unseen), partial(self._decide, suspicion, better, unseen))

    def _decide(self, suspicion: SuspectedRegression, better: list[SampleScore],
                unseen: list[CorrectionRecord], scores: list[SampleScore],
                taught: list[Sample]) -> list[Event]:
        self._job = None
        self._wake()
        if self.comparing.blames(suspicion, better, list(zip(unseen, scores, strict=True))):
            self.condemn(suspicion)
        return []

    # -- helpers ---------------------------------------------------------------------

    def _corrected(self, records: Sequence[CorrectionRecord]) -> list[Sample]:
        return [sample(r.prompt_ids, self._chat.answer(r.corrected)) for r in records]

    def _set_state(self, record: CorrectionRecord, state: CorrectionState, reason: str = '',
                   version: int = 0) -> CorrectionStatus:
        # One that was superseded meanwhile stays so.
        self._journal.submit(lambda j: j.set_correction(
            record.id, state, reason, version, if_pending=True))
        return CorrectionStatus(record.id, state, reason, version)

    def _length(self, record: CorrectionRecord) -> int:
        return len(record.prompt_ids) + len(self._chat.answer(record.corrected))
