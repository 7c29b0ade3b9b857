# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
From accepted corrections to a published adapter version, one job at a time.

A job trains the corrections that wait for one profile, together with replayed answers,
and ends as soon as greedy decoding would give every corrected answer. Everything here
runs in the device thread and never blocks: disk work goes to the journal's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from itertools import zip_longest
import math
from statistics import fmean
import time
from typing import Any

from mace_ros.events import CorrectionProgress, CorrectionState, Event, VersionEvent, VersionState
from mace_ros.execution.finetune import FinetuneStep, Trainer
from mace_ros.execution.hybrid import HybridModel
from mace_ros.execution.lora import AdapterBank
from mace_ros.execution.text import ChatText
from mace_ros.learning.describing import peft_config, version_event
from mace_ros.learning.gate import Gate, Verdict
from mace_ros.learning.job import Fetched, Job, Scoring, Waiting
from mace_ros.learning.journal import CorrectionRecord, Journal, VersionRecord
from mace_ros.learning.journal_writer import JournalWriter
from mace_ros.learning.samples import first_within, sample, turn
from mace_ros.learning.versions import CorruptVersion, VersionStore
from mace_ros.memory.adapter_slots import AdapterSlots
from mace_ros.settings import Settings

MAX_TRIES = 3           # of a job that the device or the disk fails
JOB_CORRECTIONS = 4     # corrections learned together at most
# A right token must lead by this much (in logits) before it counts as learned, so that a
# different order of additions in another batch does not change the answer.
LEARNED_MARGIN = 0.5


class Learner:
    """Owns the training adapter; the engine runs the steps that it asks for."""

    def __init__(self, *, model: HybridModel, model_name: str, bank: AdapterBank, chat: ChatText,
                 slots: AdapterSlots, journal: JournalWriter, store: VersionStore,
                 wake: Callable[[], None]) -> None:
        """``wake`` is called from another thread when :meth:`advance` can go on."""
        self._model, self._model_name = model, model_name
        self._bank, self._chat, self._slots = bank, chat, slots
        self._journal, self._store, self._wake = journal, store, wake
        self._waiting: list[Waiting] = []
        self._job: Job | None = None
        self._anchors: list[tuple[list[int], list[int]]] | None = None    # prompt, output
        self._rejections: deque[Future[VersionRecord]] = deque()
        self.wants_anchors = False
        # How many tokens a step may have whose pieces end within so many seconds.
        self.tokens_within: Callable[[float], int] = lambda seconds: 512

    # -- what comes in ---------------------------------------------------------------

    def restore(self) -> list[VersionEvent]:
        """
        Load the live versions from disk; return an event for each (the base model's, if none).

        A version that can't be read is passed over for the base model, and its event
        says so. Blocks; for configuration only.
        """
        events = []
        for record in self._journal.submit(lambda j: j.lives()).result():
            slot = self._slots.reserve() if self._slots.has_room(record.profile) else None
            if slot is None:
                events.append(version_event(
                    record, self._store, VersionState.REJECTED,
                    'no adapter slot is left; raise adapter.slots'))
                continue
            try:
                self._bank.load(self._store.load(record.path, record.sha256))
            except (CorruptVersion, ValueError) as error:
                self._slots.give_back(slot)
                events.append(version_event(
                    record, self._store, VersionState.REJECTED, str(error)))
                continue
            self._bank.write_slot(slot)
            self._slots.publish(record.profile, record.version, slot)
            events.append(version_event(record, self._store))
        if not any(e.profile == '' and e.state is VersionState.PUBLISHED for e in events):
            events.append(VersionEvent('', 0, 0, VersionState.PUBLISHED))
        return events

    def add(self, record: CorrectionRecord, arrived: float) -> list[Event]:
        """Queue a correction that is in the journal."""
        events: list[Event] = []
        for other in [w for w in self._waiting if w.record.prompt_ids == record.prompt_ids
                      and w.record.profile == record.profile]:
            self._waiting.remove(other)
            events.append(self._set_state(
                other.record, CorrectionState.SUPERSEDED, f'by correction {record.id}'))
        self._waiting.append(Waiting(record, arrived))
        return events

    def give_anchors(self, anchors: list[tuple[list[int], list[int]]]) -> None:
        """Take the base model's answers to :data:`ANCHORS`, as (prompt, output) ids."""
        self._anchors = anchors
        self.wants_anchors = False

    # -- what the engine runs --------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether anything waits to be learned."""
        return self._job is not None or bool(self._waiting)

    @property
    def unlearned(self) -> list[float]:
        """When each correction arrived, on the engine's clock, that is not yet learned."""
        job = self._job
        return [w.arrived for w in [*(job.corrections if job else []), *self._waiting]]

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

    def advance(self, settings: Settings) -> list[Event]:
        """Go on as far as possible without waiting; return what happened."""
        while self._rejections and self._rejections[0].done():
            written = self._rejections.popleft()
            if written.exception() is None:     # else it is not on record; nothing else is lost
                return [version_event(written.result(), self._store)]
        if self._job is None:
            return self._start(settings)
        job = self._job
        if job.scoring is not None:
            return self._go_on_scoring(job, job.scoring, settings)
        if job.saving is not None:
            return self._publish(job) if job.saving.done() else []
        if job.score_after is not None:
            return self._save(job)
        if job.step is None:
            if not job.fetched.done() or self._anchors is None:
                return []
            return self._prepare(job, settings)
        if job.step.done:
            job.steps += 1
            self._next_step(job, settings)
        elif job.step.scored and not job.judged:
            return self._judge(job, settings)
        return []

    def drop(self, reason: str) -> list[Event]:
        """Give up the current job, because device or disk failed; try it again a few times."""
        job, self._job = self._job, None
        if job is None:
            return []
        if job.slot is not None:
            self._slots.give_back(job.slot)
        failed = [w for w in job.corrections if w.tries >= MAX_TRIES]
        self._waiting = [replace(w, tries=w.tries + 1) for w in job.corrections
                         if w not in failed] + self._waiting
        return [self._set_state(w.record, CorrectionState.FAILED, reason) for w in failed]

    def versions(self, profile: str) -> Future[list[VersionEvent]]:
        """Read all versions of a profile from the journal, oldest first."""
        return self._journal.submit(lambda journal: [
            version_event(record, self._store) for record in journal.versions(profile)])

    # -- a job's life ----------------------------------------------------------------

    def _start(self, settings: Settings) -> list[Event]:
        if not self._waiting or settings.finetune.budget == 0:
            return []
        profile = self._waiting[0].record.profile
        chosen = [w for w in self._waiting if w.record.profile == profile][:JOB_CORRECTIONS]
        most = self.tokens_within(settings.finetune.max_blocking_ms / 1e3)
        while len(chosen) > 1 and sum(self._length(w.record) for w in chosen) > most:
            chosen.pop()
        self._waiting = [w for w in self._waiting if w not in chosen]
        if not self._slots.has_room(profile):
            return [self._set_state(
                w.record, CorrectionState.FAILED,
                'every adapter slot has the live version of a profile; raise adapter.slots')
                for w in chosen]
        count = settings.finetune.replay_samples
        live = self._slots.live(profile)

        def fetch(journal: Journal) -> Fetched:
            record = journal.live(live.profile) if live.version else None
            return Fetched(
                journal.replay_candidates(profile, count), journal.learned(live.profile),
                self._store.load(record.path, record.sha256) if record else None)

        parent = live.version if live.profile == profile else 0
        self._job = Job(profile, chosen, parent, self._submit(fetch))
        self.wants_anchors = self._anchors is None
        return [self._set_state(w.record, CorrectionState.TRAINING) for w in chosen]

    def _prepare(self, job: Job, settings: Settings) -> list[Event]:
        assert self._anchors is not None
        error = job.fetched.exception()
        if error is not None:
            return self.drop(f'the live version could not be read: {error}')
        fetched = job.fetched.result()
        if fetched.tensors is None:
            self._bank.reset()
        else:
            self._bank.load(fetched.tensors)
        job.trainer = Trainer(self._bank, settings.finetune.learning_rate)
        job.samples = [sample(w.record.prompt_ids, self._chat.answer(w.record.corrected),
                               w.record.weight)
                       for w in job.corrections]
        prompts = {tuple(w.record.prompt_ids) for w in job.corrections}
        # The newest correction of a question is the one to keep.
        newest = {r.prompt_ids: r for r in fetched.learned if r.prompt_ids not in prompts}
        job.kept = [sample(r.prompt_ids, self._chat.answer(r.corrected))
                    for r in newest.values()]
        prompts |= newest.keys()
        earlier = [sample(a.prompt_ids, a.output_ids) for a in fetched.answers
                   if a.prompt_ids not in prompts and a.output_ids
                   and len(a.prompt_ids) + len(a.output_ids) <= settings.finetune.max_sample_tokens]
        anchors = [sample(p, o) for p, o in self._anchors if tuple(p) not in prompts]
        # Interleaved, so that a few of each kind come in every step.
        job.replayed = [s for pair in zip_longest(anchors, earlier) for s in pair if s is not None]
        job.gate = Gate({'earlier corrections': job.kept, 'other answers': job.replayed})
        return self._score(job, settings)    # under the live version, before it changes

    def _next_step(self, job: Job, settings: Settings) -> None:
        assert job.trainer is not None
        count = settings.finetune.replay_samples
        job.judged = False
        # Up to half of what is replayed are earlier corrections; all in their turn.
        kept = turn(job.kept, min((count + 1) // 2, len(job.kept)), job.steps)
        must_be_right = [*job.samples, *job.lost, *(s for s in kept if s not in job.lost)]
        replayed = turn(job.replayed, count - len(kept), job.steps)
        # A piece of learning is a layer of all tokens: with more it would take too long.
        most = self.tokens_within(settings.finetune.max_blocking_ms / 1e3)
        must_be_right = first_within(must_be_right, most, at_least=len(job.samples))
        replayed = first_within(replayed, most - sum(len(s.tokens) for s in must_be_right))
        job.must_be_right = len(must_be_right)
        job.trainer.set_learning_rate(settings.finetune.learning_rate)
        job.step = FinetuneStep(
            self._model, job.trainer, must_be_right + replayed,
            keep_graphs=settings.finetune.recompute != 'always',
            may_ride=settings.finetune.recompute != 'never',
            oldest_correction_at=job.oldest)

    def _score(self, job: Job, settings: Settings) -> list[Event]:
        """Begin to score what the gate guards."""
        assert job.gate is not None
        job.step, job.scoring = None, Scoring(job.gate.batches())
        return self._go_on_scoring(job, job.scoring, settings)

    def _go_on_scoring(self, job: Job, scoring: Scoring, settings: Settings) -> list[Event]:
        if scoring.step is not None:
            if not scoring.step.done:
                return []
            scoring.scores += scoring.step.scores()
            scoring.taught += scoring.step.taught()
        batch = next(scoring.batches, None)
        if batch is not None:
            assert job.trainer is not None
            scoring.step = FinetuneStep(
                self._model, job.trainer, batch, learns=False, oldest_correction_at=job.oldest)
            return []
        job.scoring = None
        if job.before is None:
            job.before = scoring.scores
            # What is replayed is to be predicted as before, not only to be said again.
            job.replayed = scoring.taught[len(job.kept):]
            self._next_step(job, settings)
            return []
        assert job.gate is not None
        verdict = job.gate.judge(job.before, scoring.scores, settings.gate.tolerance)
        return self._reject(job, verdict, settings) if verdict.reason else self._save(job)

    def _reject(self, job: Job, verdict: Verdict, settings: Settings) -> list[Event]:
        """Don't publish; go on with what was lost among what must be right, if that may help."""
        record = VersionRecord(
            profile=job.profile, version=0, parent=job.parent, state=VersionState.REJECTED,
            reason=verdict.reason, correction_ids=tuple(w.record.id for w in job.corrections),
            score_before=job.score_before, score_after=job.score_after or math.nan,
            train_tokens=job.train_tokens, train_seconds=job.train_seconds, created=time.time())

        def write(journal: Journal) -> VersionRecord:
            numbered = replace(record, version=journal.next_version(job.profile))
            journal.record_version(numbered)
            return numbered

        self._rejections.append(self._submit(write))
        if job.steps < settings.finetune.max_steps:
            job.lost += [s for s in verdict.lost if s not in job.lost]
            job.score_after = None
            self._next_step(job, settings)
            return []
        self._job = None
        reason = f'{verdict.reason} after {job.steps} steps (finetune.max_steps)'
        return [self._set_state(w.record, CorrectionState.FAILED, reason) for w in job.corrections]

    def _judge(self, job: Job, settings: Settings) -> list[Event]:
        """Decide, with the scores of a step's forward, whether its backward is still needed."""
        assert job.step is not None
        job.judged = True
        count = len(job.corrections)
        scores = job.step.scores()
        right = [s.margin >= LEARNED_MARGIN for s in scores[:job.must_be_right]]
        score = fmean(s.log_probability for s in scores[:count])
        if job.steps == 0:
            job.score_before = score
        if not all(right) and job.steps < settings.finetune.max_steps:
            return []
        keeps = all(right[count:])
        learned = [w for w, ok in zip(job.corrections, right, strict=False) if ok and keeps]
        reason = ('not learned' if keeps else 'not learned without losing what was right before')
        events: list[Event] = [
            self._set_state(w.record, CorrectionState.FAILED,
                            f'{reason} after {job.steps} steps (finetune.max_steps)')
            for w in job.corrections if w not in learned]
        if learned and job.steps:
            job.corrections, job.score_after = learned, score
            return events + self._score(job, settings)
        self._job = None
        return events + [
            self._set_state(w.record, CorrectionState.LEARNED,
                            'the live version already answers so', job.parent) for w in learned]

    def _save(self, job: Job) -> list[Event]:
        """Write the new version to disk, as soon as there is a slot for it."""
        assert job.score_after is not None
        tensors, config = self._bank.export(), peft_config(self._bank, self._model_name)
        job.slot = self._slots.reserve()
        if job.slot is None:
            return []    # asked again: publication waits for a request to end, never the reverse
        record = VersionRecord(
            profile=job.profile, version=0, parent=job.parent,
            correction_ids=tuple(w.record.id for w in job.corrections),
            score_before=job.score_before, score_after=job.score_after,
            train_tokens=job.train_tokens, train_seconds=job.train_seconds, created=time.time())

        def save(journal: Journal) -> tuple[VersionRecord, tuple[str, ...]]:
            while True:
                version = journal.next_version(job.profile)
                try:
                    saved = self._store.save(job.profile, version, tensors, config)
                except FileExistsError:   # left by a crash before it was recorded
                    continue
                done = replace(record, version=version, path=saved.path, sha256=saved.sha256)
                return done, journal.publish(done)

        job.saving = self._submit(save)
        return []

    def _publish(self, job: Job) -> list[Event]:
        assert job.saving is not None and job.slot is not None
        error = job.saving.exception()
        if error is not None:
            return self.drop(f'the new version could not be saved: {error}')
        record, learned = job.saving.result()
        self._bank.write_slot(job.slot)
        self._slots.publish(job.profile, record.version, job.slot)
        self._job = None
        return [version_event(record, self._store), *(
            CorrectionProgress(i, CorrectionState.LEARNED, adapter_version=record.version)
            for i in learned)]

    # -- helpers ---------------------------------------------------------------------

    def _submit(self, function: Callable[[Journal], object]) -> Future[Any]:
        future = self._journal.submit(function)
        future.add_done_callback(lambda _: self._wake())
        return future

    def _set_state(self, record: CorrectionRecord, state: CorrectionState, reason: str = '',
                   version: int = 0) -> CorrectionProgress:
        self._journal.submit(lambda j: j.set_correction(record.id, state, reason, version))
        return CorrectionProgress(record.id, state, reason, version)

    def _length(self, record: CorrectionRecord) -> int:
        return len(record.prompt_ids) + len(self._chat.answer(record.corrected))
