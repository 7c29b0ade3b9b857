# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The engine: queries and corrections in, events out, one iteration at a time.

It is the only place where plan (scheduling), run (running.py) and commit meet. One
thread, the one that owns the device, calls :meth:`Engine.step`; any thread may call
:meth:`Engine.submit`, :meth:`Engine.cancel`, :meth:`Engine.correct` and
:meth:`Engine.update`, which only enqueue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
import gc
from itertools import takewhile
from pathlib import Path
import time
import uuid

from mace_ros.api.events import (
    AdapterVersion,
    Correction,
    CorrectionState,
    CorrectionStatus,
    ErrorCode,
    Event,
    FinishReason,
    InvalidCorrection,
    Query,
    VersionState,
)
from mace_ros.api.settings import Settings
from mace_ros.api.validation import (
    checked_correction,
    CorrectionLimiter,
    MAX_ID,
)
from mace_ros.engine.anchor_requests import AnchorRequests
from mace_ros.engine.builder import budget_bytes, check_budget, load
from mace_ros.engine.kv_blocks import KvBlocks
from mace_ros.engine.model_runner import ModelRunner
from mace_ros.engine.request_manager import RequestManager
from mace_ros.finetune.calibration import measure
from mace_ros.finetune.footprint import measure_footprint
from mace_ros.finetune.step import FinetuneStep
from mace_ros.learning.acceptance import accept, Accepted
from mace_ros.learning.learner import Learner
from mace_ros.learning.rollback import RolledBack
from mace_ros.memory.adapter_slots import AdapterSlots
from mace_ros.memory.block_pool import BLOCK_TOKENS, BlockPool
from mace_ros.memory.budget import MB, MemoryBudget
from mace_ros.model.chat import ChatTokenizer
from mace_ros.model.graph_capture import capture
from mace_ros.model.heap import HeapTrimmer
from mace_ros.model.loading import Progress, reporting, weights_digest
from mace_ros.model.lora import BASE_SLOT, FIRST_SERVED_SLOT, LoRAManager
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.kv_cache_manager import KVCacheManager
from mace_ros.scheduling.memory_arbiter import MemoryArbiter
from mace_ros.scheduling.plan import SegmentKind, State
from mace_ros.scheduling.scheduler import Scheduler
from mace_ros.store.adapter_store import AdapterStore, check_same_model
from mace_ros.store.journal_writer import JournalWriter
from mace_ros.store.layout import JOURNAL
from mace_ros.store.retention import tidy
from mace_ros.telemetry.status import Status
from mace_ros.telemetry.trace import phase_of, Record, Trace

MAX_STEP_TOKENS = 4096     # of a fine-tune step, however fast the device
CAPTURE_S = 45.0       # at most; what it leaves out runs eagerly
CALIBRATION_S = 8.0    # at most; what it leaves out is learned while serving


@dataclass(frozen=True)
class Iteration:
    """
    What one call of :meth:`Engine.step` did, and when to call again.

    ``wake_at`` is a time on the engine's clock; None waits for the ``wake`` callback.
    """

    events: list[Event]
    wake_at: float | None


class _StepCost:
    """What a fine-tune step costs, by the cost model and the memory that is free for it."""

    def __init__(self, cost: CostModel, memory: MemoryArbiter, layers: int) -> None:
        self._cost, self._memory, self._layers = cost, memory, layers

    def tokens_within(self, seconds: float) -> int:
        """Return the tokens of a step whose pieces end within so many seconds."""
        return self._memory.step_tokens(self._cost.tokens_within(
            SegmentKind.BACKWARD_RECOMPUTED, seconds, most=MAX_STEP_TOKENS))

    def step_s(self, tokens: int) -> float:
        """Return the device seconds of a step."""
        return self._layers * (self._cost.segment_s(SegmentKind.FORWARD, tokens)
                               + self._cost.segment_s(SegmentKind.BACKWARD, tokens))


class Engine:
    """Answers queries and learns corrections on one device."""

    def __init__(self, settings: Settings, *, storage: Path | None = None,
                 wake: Callable[[], None] = lambda: None,
                 progress: Progress = lambda text: None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        """
        Load the model and the live adapter versions.

        ``storage`` defaults to the setting. ``wake`` is called, from any thread, when
        there is something to do. Raises ``ModelNotFound``, ``UnsupportedModel``,
        ``InvalidSetting``, ``JournalError``, ``StorageInUse``, ``OtherModel`` or ``OtherAdapter``.
        """
        self._settings, self._wake, self._clock = settings, wake, clock
        folder = storage or Path(settings.storage.folder).expanduser()
        # First: if another node has the folder, that is known before the model is loaded.
        self._journal = JournalWriter(
            folder / JOURNAL, max_answers=settings.storage.max_answers)
        try:
            self._set_up(folder, progress)
        except BaseException:
            self._journal.close()
            raise

    def _set_up(self, folder: Path, progress: Progress) -> None:
        """Load everything; the journal is open."""
        settings, clock, wake = self._settings, self._clock, self._wake
        loaded, self.model, self.hardware, free = load(settings, progress)
        self.chat = ChatTokenizer(loaded.tokenizer, loaded.model.generation_config.eos_token_id)
        adapter = settings.adapter
        self.bank = LoRAManager(
            self.model.groups, targets=adapter.target_modules, rank=adapter.rank,
            # One more than may be live, for the version that is about to be.
            alpha=adapter.alpha, slots=adapter.slots + 1,
            spared=settings.finetune.spared_directions)
        self._state = State()
        self._pool = BlockPool(self.model.kv_blocks, BLOCK_TOKENS)
        self._kv_cache = KVCacheManager(
            self._pool, self._state, sharing=settings.memory.prefix_sharing)
        self._free_at_start = free
        self._memory = MemoryArbiter(
            MemoryBudget(
                measure_footprint(self.model, self.bank), budget_bytes(settings, free),
                most_blocks=self.model.kv_blocks, pass_tokens=settings.scheduler.max_batch_tokens,
                rows=settings.scheduler.max_requests,
                # Device graphs hold the addresses of a cache that is there from the start.
                resident=self.model.device.type == 'cuda'), self._kv_cache, self._state)
        check_budget(self._memory.budget)
        self._blocks = KvBlocks(self.model, self._pool, self._kv_cache)
        self._blocks.prune_share = settings.memory.kv_prune
        self._slots = AdapterSlots(
            base_slot=BASE_SLOT, first=FIRST_SERVED_SLOT, count=adapter.slots + 1)
        check_same_model(folder, loaded.model)
        self._store = store = AdapterStore(folder)
        if self.model.device.type == 'cuda' and settings.model.device_graphs:
            with reporting(progress, 'capturing device graphs'):
                end = clock() + CAPTURE_S
                captured = capture(
                    self.model, max_rows=settings.scheduler.max_requests,
                    max_tokens=settings.scheduler.max_batch_tokens, max_context=self._longest,
                    steps=settings.finetune.recompute != 'always',
                    may_go_on=lambda: clock() < end)
            progress(str(captured))
        cost = CostModel()
        with reporting(progress, 'measuring the device'):
            end = clock() + CALIBRATION_S
            cost.calibrate(takewhile(lambda _: clock() < end, measure(
                self.model, self.bank, max_tokens=settings.scheduler.max_batch_tokens,
                clock=clock)))
        self.scheduler = Scheduler(settings, cost)
        self.learner = Learner(
            model=self.model, model_name=loaded.name, lora=self.bank, chat=self.chat,
            slots=self._slots, journal=self._journal, store=store,
            cost=_StepCost(cost, self._memory, len(self.model.layers)), settings=settings,
            wake=wake, clock=clock)
        self._inbox: deque[Callable[[], list[Event]]] = deque()
        self._arrived: deque[tuple[Query, float]] = deque()     # those of the inbox
        self._unsaid: list[Event] = []      # of the iteration that is being run
        self._was_idle = True
        self._requests = RequestManager(
            settings, chat=self.chat, state=self._state, kv_cache=self._kv_cache,
            slots=self._slots, learner=self.learner, journal=self._journal,
            base=self._base_answers(weights_digest(loaded.model)),
            longest=lambda: self._longest, later=self._enqueue, clock=clock)
        self._spoke = False    # the latest iteration only said something
        self._door = CorrectionLimiter()
        # All that stays: a full collection need not look at it again and again.
        gc.collect()
        gc.freeze()
        self.model.drop_blocks(0)       # what measuring has left in them
        # Of what the budget is for, the adapters are there already; on a GPU in its own memory.
        self._heap = HeapTrimmer(
            self.bank.nbytes if self.model.device.type == 'cpu' else 0, clock())
        self.runner = ModelRunner(
            model=self.model, state=self._state, pool=self._pool, blocks=self._blocks,
            kv_cache=self._kv_cache, scheduler=self.scheduler, requests=self._requests,
            heap=self._heap, learner=lambda: self.learner, is_called=lambda: bool(self._inbox),
            clock=clock)
        # What was live before the last stop, and what is still to be learned.
        self.restored = self.learner.restore()
        tidy(self._journal, store, settings.storage.max_versions)

    # -- called from any thread ------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._settings

    @property
    def _longest(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return min(self.model.context_length, self._memory.longest)

    @property
    def free_kv_tokens(self) -> int:
        """Tokens that the KV cache can still take."""
        return self._pool.free_tokens

    def submit(self, query: Query) -> None:
        """Take a query; exactly one :class:`Response` will follow."""
        arrival, limit = self._clock(), self._settings.scheduler.max_queue
        if len(self._arrived) >= limit:    # an iteration takes so long, or hangs
            refused = self._requests.not_begun(
                replace(query, id=query.id or str(uuid.uuid4())), arrival, FinishReason.REJECTED,
                ErrorCode.OVERLOADED, f'{limit} queries wait already (scheduler.max_queue)')
            self._enqueue(lambda: [refused])
            return
        self._arrived.append((query, arrival))
        self._enqueue(lambda: self._requests.admit(*self._arrived.popleft()))

    def cancel(self, query_id: str) -> None:
        """End a query early; one that is not running is left alone."""
        if len(query_id) <= MAX_ID:     # of no query, else
            self._enqueue(lambda: self._requests.cancel(query_id))

    def correct(self, correction: Correction) -> None:
        """Take a correction; ACCEPTED or REJECTED will follow, after the write to disk."""
        arrived = self._clock()
        try:
            checked = checked_correction(correction)
            self._door.let_in(
                arrived, self._settings.correction.max_per_minute, self._journal.backlog)
        except InvalidCorrection as error:
            refused = CorrectionStatus(correction.id, CorrectionState.REJECTED, str(error))
            self._enqueue(lambda: [refused])
            return
        settings = self._settings

        future = self._journal.submit(lambda journal: accept(
            checked, journal, chat=self.chat, settings=settings, longest=self._longest,
            arrived=arrived))
        future.add_done_callback(
            lambda done: self._enqueue(lambda: self._accepted(checked, done)))

    def update(self, settings: Settings) -> None:
        """Put other settings in force at the next iteration."""
        def apply() -> list[Event]:
            self._settings = self._requests.settings = settings
            self.runner.planned_ahead = None     # under those that were in force
            self.scheduler.update(settings)
            self.learner.update(settings)
            self._kv_cache.share(settings.memory.prefix_sharing)
            self._blocks.prune_share = settings.memory.kv_prune
            limits = settings.scheduler
            self._memory.budget.limit_passes(limits.max_batch_tokens, limits.max_requests)
            self._memory.change(budget_bytes(settings, self._free_at_start))
            return self._requests.fit()
        self._enqueue(apply)

    def trace(self, iterations: int, seconds: float,
              done: Callable[[list[Record]], None]) -> None:
        """
        Record what the next iterations do, for so many seconds at most.

        ``done`` gets the records, in the device's thread. One trace at a time.
        """
        def begin() -> list[Event]:
            self.runner.trace = Trace(iterations, self._clock() + seconds, done, self._clock)
            return []
        self._enqueue(begin)

    def versions(self, profile: str) -> Future[list[AdapterVersion]]:
        """Read all versions of a profile, oldest first."""
        return self.learner.versions(profile)

    def rollback(self, profile: str, version: int, reason: str = '') -> Future[RolledBack]:
        """
        Ask for an earlier version of a profile, 0 for the base model (or the robot's).

        The future ends once the next query is served that version, or with the reason why
        it is not: ``RollbackRefused``, ``CorruptVersion`` or ``JournalError``.
        """
        done: Future[RolledBack] = Future()

        def add() -> list[Event]:
            self.learner.rollback(profile, version, reason, done)
            return []
        self._enqueue(add)
        return done

    def live_version(self, profile: str) -> int:
        """Return the version of its own that serves a profile; 0 if there is none."""
        live = self._slots.live(profile)
        return live.version if live.profile == profile else 0

    def _enqueue(self, action: Callable[[], list[Event]]) -> None:
        self._inbox.append(action)
        self._wake()

    # -- called from the device's thread ---------------------------------------------

    def step(self) -> Iteration:
        """
        Run one iteration: plan, run, commit.

        One that has something to say before its segments returns it first; the next call
        goes on with them.
        """
        with phase_of(self.runner.trace, 'iteration'):
            wake_at = self._step(self._unsaid)
        # Not before: of an iteration that fails, what it has to say is said by the next one.
        events, self._unsaid = self._unsaid, []
        iteration = Iteration(events, wake_at)
        trace = self.runner.trace
        return iteration if trace is None else self._traced(trace, iteration)

    def _traced(self, trace: Trace, iteration: Iteration) -> Iteration:
        """Note what an iteration said, and see to it that the trace ends in time."""
        trace.ended(iteration.events)
        if trace.complete:
            self._end_trace(trace)
            return iteration
        wake_at = trace.ends_at if iteration.wake_at is None else iteration.wake_at
        return replace(iteration, wake_at=min(wake_at, trace.ends_at))

    def _end_trace(self, trace: Trace) -> None:
        self.runner.trace = None
        trace.finish(self._state.waiting)

    def _step(self, events: list[Event]) -> float | None:
        """Run an iteration, and add what it has to say; return when to call again."""
        if self.runner.fatal_error is not None:
            raise self.runner.fatal_error
        if self.runner.is_suspended:
            self.runner.resume(events)
            return self._clock()
        self.runner.collect(events)
        with phase_of(self.runner.trace, 'take in'):
            self._take_in(events)
            before = self.learner.step
            try:
                events += self.learner.poll()
            except Exception as error:    # such as an allocation for the next step
                if not self.learner.busy:
                    raise                 # that is no device's fault, and nothing else would tell
                events += self.runner.learning_broke(error)
            self._release_given_up(before)
        for event in events:
            if isinstance(event, AdapterVersion) and event.state is VersionState.PUBLISHED:
                self._requests.published(event.profile)
        if any(isinstance(event, AdapterVersion) for event in events):
            tidy(self._journal, self._store, self._settings.storage.max_versions)
        # Before the pass; but messages must not hold it up.
        if events and not self._spoke and not self.runner.overlaps:
            self._spoke = True
            return self._clock()
        self._spoke = False
        self._requests.warm_up()
        if self.learner.wants_anchors:
            self._requests.ask_base(overdue=self.scheduler.is_overdue(
                self.learner.oldest_unlearned_at, self._clock()))
        events += self._take_step()
        events += self._move_blocks()
        self._kv_cache.refresh()
        now = self._clock()
        with phase_of(self.runner.trace, 'plan'):
            plan = self.runner.take_planned_ahead() or self.scheduler.plan(self._state, now)
        for rejection in plan.rejected:
            events += self._requests.end(
                self._requests[rejection.request.id], FinishReason.REJECTED,
                ErrorCode.PROMPT_TOO_LONG if rejection.too_large else ErrorCode.SLO_UNREACHABLE,
                rejection.reason)
        if self._memory.planned(plan.lacks_memory, overdue=self._is_overdue(now)):
            return now     # and plan again, with more memory
        self._check_when_idle()
        self._heap.tend(now, self._memory.budget.total, idle=(
            plan.is_empty and not self._state.has_requests and not self.learner.busy))
        if not plan.is_empty:
            if self.runner.trace is not None:
                self.runner.trace.planned(plan)
            self.runner.run(plan, events)
            return now
        if events:
            return now
        return min((t for t in (plan.wake_at, self.learner.wake_at) if t is not None),
                   default=None)

    def status(self) -> Status:
        """Return what is going on between two iterations."""
        now, state = self._clock(), self._state
        decode_rows = sum(r.is_decoding for r in state.running)
        learning = self.learner.status()
        return Status(
            now=now, statistics=self.scheduler.statistics(now),
            queue_depth=self._requests.queue_depth, prefilling=len(state.running) - decode_rows,
            decode_rows=decode_rows,
            budget_mb=self._memory.budget.total / MB,
            planned_mb=self._memory.budget.planned(
                self._pool.held_blocks + self._pool.cached_blocks) / MB,
            kv_use=self._pool.held_blocks / max(self._pool.limit, 1),
            kv_cached=self._pool.cached_blocks / max(self._pool.limit, 1),
            shared_tokens=self._kv_cache.shared_tokens,
            preemptions=self._kv_cache.preemptions,
            corrections_waiting=learning.waiting,
            freshness_s=now - min(learning.oldest_at, now),
            live_version=self.live_version(''), profiles=self._slots.profiles,
            journal_error=self._requests.journal_error, drift_state=learning.drift_state,
            drift_level=learning.drift_level,
            finetune_budget=learning.budget,
            journal_backlog=self._journal.backlog, unrecorded=self._requests.unrecorded,
            learning_error=learning.trouble,
            base_questions_left=(
                self._requests.base_questions_left if self.learner.wants_anchors else 0))

    def pause(self) -> list[Event]:
        """Cancel what runs, and hear all that the journal has to say; may be gone on from."""
        # What it was given before is through when this is, or has failed.
        self._journal.submit(lambda _: None).exception()
        events, self._unsaid = self._unsaid, []
        self.runner.collect(events)
        self._take_in(events)
        events += self._requests.cancel_all()
        if self.runner.trace is not None:
            self.runner.trace.ended(events)
            self._end_trace(self.runner.trace)
        return events

    def close(self) -> list[Event]:
        """Cancel what runs, and wait until the journal is on disk."""
        try:
            events = self.pause()
        finally:    # or the folder would stay in use
            self.learner.close('the node is stopping')
            self._journal.close()
            gc.unfreeze()
        # What the journal finished meanwhile has put its last words into the inbox.
        self._take_in(events)
        return events

    def _take_in(self, events: list[Event]) -> None:
        while self._inbox:
            events += self._inbox.popleft()()

    # -- intake ----------------------------------------------------------------------

    def _accepted(self, correction: Correction, done: Future[Accepted]) -> list[Event]:
        """Report what the journal said."""
        error = done.exception()
        if not isinstance(error, InvalidCorrection):
            self._requests.journal_error = str(error or '')
        if error is not None:
            return [CorrectionStatus(correction.id, CorrectionState.REJECTED, str(error))]
        accepted = done.result()
        if accepted.new:
            self._requests.correct(accepted.record.query_id, accepted.record.corrected)
        before = self.learner.step
        events = self.learner.accepted(accepted)
        self._release_given_up(before)
        return events

    def _release_given_up(self, step: FinetuneStep | None) -> None:
        if step is not None and self.learner.step is not step:
            self._blocks.release(step)

    def _base_answers(self, model: str) -> AnchorRequests:
        journal = self._journal
        return AnchorRequests(
            journal.submit(lambda j: j.base_answers(model)).result(),
            record=lambda prompt, output: journal.submit(
                lambda j: j.record_base_answer(model, prompt, output)))

    # -- between two passes ----------------------------------------------------------

    def _check_when_idle(self) -> None:
        """Account for every KV block when the last request has gone."""
        idle = not self._state.has_requests
        if idle and not self._was_idle:
            step = self.learner.step
            self._pool.check(step.blocks if step is not None else ())
        self._was_idle = idle

    def _take_step(self) -> list[Event]:
        """Let the scheduler see the learner's step if there is memory for it."""
        step = self.learner.step
        try:
            allowed = self._memory.allows(step, overdue=self._is_overdue(self._clock()))
            self._state.finetune = step if allowed else None
        except Exception as error:    # the step could not be laid out in smaller pieces
            self._state.finetune = None
            return self.runner.learning_broke(error)
        if step is None or self._state.finetune is not None:
            return []
        lack = self._memory.lacks(step)
        if not lack:
            return []
        events = self.learner.fail(lack)    # with fewer corrections it may fit
        self._release_given_up(step)
        return events

    def _move_blocks(self) -> list[Event]:
        """Let the KV cache follow its limit; learning may have taken the memory for that."""
        try:
            self._blocks.move(self.learner.step)
        except Exception as error:    # requests are computed again, and go on
            return self.runner.learning_broke(error)
        return []

    def _is_overdue(self, now: float) -> bool:
        """Whether the step is for corrections that have waited for too long."""
        step = self.learner.step
        return step is not None and self.scheduler.is_overdue(step.oldest_correction_at, now)
