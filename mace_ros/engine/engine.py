# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The engine: queries and corrections in, events out, one iteration at a time.

One thread owns the device and calls :meth:`Engine.step`. Other threads put messages into the inbox:
callers through the methods under "called from any thread", the journal's thread when a write has
ended, and the adapter cache's thread when the file of a version was read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
import gc
import time
import uuid

from mace_ros.api.events import (
    AdapterVersion,
    Correction,
    ErrorCode,
    Event,
    FinishReason,
    Query,
)
from mace_ros.api.settings import Settings
from mace_ros.api.validation import MAX_ID
from mace_ros.engine.adapter_cache import AdapterCache
from mace_ros.engine.anchor_requests import recorded_anchors
from mace_ros.engine.answer_recorder import AnswerRecorder
from mace_ros.engine.background_requests import BackgroundRequests
from mace_ros.engine.correction_intake import CorrectionIntake
from mace_ros.engine.embeddings import Embedding
from mace_ros.engine.hint_answers import HintAnswers
from mace_ros.engine.inbox import (
    AbortQuery,
    AdapterRead,
    AnswerWritten,
    BeginTrace,
    ChangeSettings,
    CorrectionWritten,
    EmbedTexts,
    Inbox,
    Message,
    Publish,
    RollBack,
    SubmitQuery,
)
from mace_ros.engine.iteration import Iteration
from mace_ros.engine.learner_driver import LearnerDriver
from mace_ros.engine.learner_port import LearnerPort
from mace_ros.engine.model_runner import ModelRunner, PassResult
from mace_ros.engine.parts import budget_bytes, Parts
from mace_ros.engine.request_manager import queue_full, RequestManager
from mace_ros.engine.response_format import compile_format
from mace_ros.engine.snapshot import take_status
from mace_ros.engine.tracing import Tracing
from mace_ros.learning.rollback import RolledBack
from mace_ros.model.heap import HeapTrimmer
from mace_ros.scheduling.plan import Plan
from mace_ros.scheduling.scheduler import Scheduler
from mace_ros.store.retention import tidy
from mace_ros.telemetry.observer import IterationObserver, Observers
from mace_ros.telemetry.status import Status
from mace_ros.telemetry.trace import Record

READ_WAIT_S = 0.02      # longest wait for the file of a version while nothing else is asked


class Engine:
    """
    Answers queries and learns corrections on one device.

    Attributes, to be read only: ``parts`` (what holds memory or files), ``model``, ``lora``,
    ``chat``, ``hardware``, ``scheduler``, ``learner``, ``requests`` and ``runner``.
    """

    def __init__(self, settings: Settings, parts: Parts, learner: LearnerPort, *,
                 wake: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        """Assemble the parts, and restore what was learned; see :func:`build_engine`."""
        self._settings, self.parts, self._clock = settings, parts, clock
        self.model, self.lora, self.chat = parts.model, parts.lora, parts.chat
        self.hardware, self.learner = parts.hardware, learner
        self.scheduler = Scheduler(settings, parts.cost)
        self._inbox, self._observers = Inbox(wake), Observers(clock)
        self._recorder = AnswerRecorder(journal=parts.journal, inbox=self._inbox)
        hints = HintAnswers(settings, chat=parts.chat, journal=parts.journal, inbox=self._inbox,
                            clock=clock)
        self._background = BackgroundRequests(
            chat=parts.chat, state=parts.state, kv_cache=parts.kv_cache, paged=parts.paged,
            anchors=recorded_anchors(parts.journal, parts.weights_digest), hints=hints,
            clock=clock)
        self._corrections = CorrectionIntake(
            chat=parts.chat, journal=parts.journal, inbox=self._inbox, recorder=self._recorder,
            hints=hints, learner=learner, clock=clock)
        self._adapters = AdapterCache(
            parts.slots, parts.lora, parts.live, parts.store, self._inbox)
        self.requests = RequestManager(
            settings, chat=parts.chat, state=parts.state, kv_cache=parts.kv_cache,
            router=parts.router, adapters=self._adapters, recorder=self._recorder,
            background=self._background, corrections=self._corrections, memory=parts.memory,
            context_length=parts.model.context_length, vocabulary=parts.constraints.vocabulary,
            answered=learner.answered, clock=clock)
        self.runner = ModelRunner(
            model=parts.model, state=parts.state, paged=parts.paged, kv_cache=parts.kv_cache,
            cost=parts.cost, requests=self.requests, inbox=self._inbox,
            observers=self._observers, clock=clock)
        self._driver = LearnerDriver(
            settings, parts, learner, scheduler=self.scheduler, requests=self.requests,
            background=self._background, runner=self.runner, wake=self._inbox.wake, clock=clock)
        self._tracing = Tracing(self._observers, parts.state, clock)
        self._unpublished: list[Event] = []    # of an iteration that raised
        self._published_first = False          # the last iteration only published events
        self._was_idle = True
        # Move long-lived objects out of the garbage collector's sight.
        gc.collect()
        gc.freeze()
        # Adapters are part of the budget, and on a CPU of the process's memory.
        self._heap = HeapTrimmer(
            parts.lora.nbytes if parts.model.device.type == 'cpu' else 0, clock())
        self._restored = learner.restore()
        tidy(parts.journal, parts.store, settings.storage.max_versions)

    # -- called from any thread ------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._settings

    @property
    def free_kv_tokens(self) -> int:
        """Tokens that the KV cache has room for."""
        return self.parts.pool.free_tokens

    def submit(self, query: Query) -> None:
        """Take a query; exactly one :class:`Response` follows."""
        arrival, limit = self._clock(), self._settings.scheduler.max_queue
        if self._inbox.queries < limit:
            self._inbox.put(SubmitQuery(
                query, arrival, compile_format(query, self.parts.constraints, self.chat)))
        else:    # an iteration takes long, or hangs
            self._inbox.put(Publish(self.requests.refuse(
                replace(query, id=query.id or str(uuid.uuid4())), arrival,
                FinishReason.REJECTED, ErrorCode.OVERLOADED, queue_full(limit))))

    def cancel(self, query_id: str) -> None:
        """End a query early; the id of an ended query is ignored."""
        if len(query_id) <= MAX_ID:     # else no query has this id
            self._inbox.put(AbortQuery(query_id))

    def correct(self, correction: Correction) -> None:
        """Take a correction; a status follows once it is on disk, or REJECTED."""
        self._corrections.take(correction, self._settings, self.requests.max_length)

    def update(self, settings: Settings) -> None:
        """Put other settings into force at the next iteration."""
        self._inbox.put(ChangeSettings(settings))

    def trace(self, iterations: int, seconds: float) -> Future[list[Record]]:
        """
        Record the next ``iterations`` iterations, for ``seconds`` at most.

        The future ends with the records, sorted by time. One trace at a time.
        """
        done: Future[list[Record]] = Future()
        self._inbox.put(BeginTrace(iterations, seconds, done))
        return done

    def rollback(self, profile: str, version: int, reason: str = '') -> Future[RolledBack]:
        """
        Make an earlier version of a profile live; 0 is the base model (or the robot's version).

        The future ends when the next query is served that version, or with
        ``RollbackRefused``, ``CorruptVersion`` or ``JournalError``.
        """
        done: Future[RolledBack] = Future()
        self._inbox.put(RollBack(profile, version, reason, done))
        return done

    def embed(self, texts: Sequence[str]) -> Future[list[Embedding]]:
        """Compute the embedding of each text; raises ``InvalidText`` through the future."""
        done: Future[list[Embedding]] = Future()
        self._inbox.put(EmbedTexts(tuple(texts), done))
        return done

    def versions(self, profile: str) -> Future[list[AdapterVersion]]:
        """Read all versions of a profile, oldest first."""
        return self.learner.versions(profile)

    def live_version(self, profile: str) -> int:
        """Return the newest live version of the profile itself; 0 if it has none."""
        return self.parts.live.newest(profile)

    # -- called from the device's thread ---------------------------------------------

    def observe(self, observer: IterationObserver) -> None:
        """Report each iteration to an observer from now on."""
        self._observers.add(observer)

    def unobserve(self, observer: IterationObserver) -> None:
        """Report to an observer no longer."""
        self._observers.remove(observer)

    def start(self) -> list[Event]:
        """Return the events to publish before the first iteration: the restored versions."""
        events, self._restored = self._restored, []
        return events

    def step(self) -> Iteration:
        """Run one iteration: receive, learn, plan, run, commit."""
        self.runner.check()
        if self.parts.threads:
            self.parts.threads.adapt()
        with self._observed() as events:
            if self.runner.has_segments:        # the events of their pass are published by now
                events += self._finish_plan()
                return Iteration(events, self._clock())
            events += self._commit(self.runner.collect())
            events += self._finish_plan()
            events += self._receive()
            events += self._learn()
            if self._publishes_first(events):
                return Iteration(events, self._clock())
            events += self._prepare()
            plan = self._plan()
            events += self.requests.reject(plan.rejected)
            if self._driver.reclaim(plan):
                return Iteration(events, self._clock())     # plan again, with more memory
            self._observers.planned(plan, len(self.requests))
            self._tend_memory(plan)
            if not plan.is_empty:
                events += self._commit(self.runner.execute(plan, self._driver.step))
                if not (events and self.runner.has_segments):
                    events += self._finish_plan()
            return Iteration(events, self._wake_at(plan, events))

    @contextmanager
    def _observed(self) -> Iterator[list[Event]]:
        """Give the body a list for its events, and report them to the observers."""
        with self._observers.timed('iteration'), self._events_survive_errors() as events:
            yield events
        self._observers.finished(events)
        self._tracing.end_if_complete()

    @contextmanager
    def _events_survive_errors(self) -> Iterator[list[Event]]:
        """Keep the events of a body that raises for the next one."""
        events, self._unpublished = self._unpublished, []
        try:
            yield events
        except BaseException:
            self._unpublished = events
            raise

    def _publishes_first(self, events: Sequence[Event]) -> bool:
        """
        Decide whether this iteration ends with its events, since a pass would delay them.

        Never twice in a row: messages must not hold up the pass either. On CUDA the events
        are published while the device runs a pass.
        """
        self._published_first = bool(
            events and not self._published_first and not self.runner.overlaps)
        return self._published_first

    def _wake_at(self, plan: Plan, events: Sequence[Event]) -> float | None:
        if events or not plan.is_empty:
            return self._clock()
        times = (plan.wake_at, self.learner.wake_at, self._tracing.ends_at)
        return min((t for t in times if t is not None), default=None)

    # -- receive ---------------------------------------------------------------------

    def _receive(self) -> Iterator[Event]:
        """Yield the events of each message as it is taken: those before an error survive it."""
        with self._observers.timed('receive'):
            for message in self._inbox.drain():
                yield from self._received(message)
            if not self.parts.state.has_requests:
                # A learning slice would take longer than reading the version that a query needs.
                self._adapters.wait(READ_WAIT_S)
                for message in self._inbox.drain():
                    yield from self._received(message)

    def _received(self, message: Message) -> list[Event]:
        match message:
            case SubmitQuery(query, arrival, constraint):
                return self.requests.admit(query, arrival, constraint)
            case AbortQuery(query_id):
                return self.requests.cancel(query_id)
            case CorrectionWritten():
                events = self._corrections.written(message)
                self._driver.follow_step()      # the learner may have given up its job
                return events
            case ChangeSettings(settings):
                return self._change(settings)
            case RollBack(profile, version, reason, done):
                self.learner.rollback(profile, version, reason, done)
            case BeginTrace():
                self._tracing.begin(message)
            case AnswerWritten():
                self._recorder.written(message)
            case AdapterRead(version):
                return self.requests.version_read(version)
            case EmbedTexts(texts, done):
                self.requests.embed(texts, done)
            case Publish(event):
                return [event]
        return []

    def _change(self, settings: Settings) -> list[Event]:
        self._settings = settings
        self.runner.drop_planned_ahead()
        self.scheduler.update(settings)
        self._driver.update(settings)
        self._background.hints.update(settings)
        self.parts.kv_cache.set_sharing(settings.memory.prefix_sharing)
        self.parts.paged.update(settings.memory.kv_prune)
        limits = settings.scheduler
        self.parts.memory.budget.limit_passes(limits.max_batch_tokens, limits.max_requests)
        self.parts.memory.resize(budget_bytes(settings, self.parts.free_bytes))
        return self.requests.update(settings)

    # -- learn -----------------------------------------------------------------------

    def _learn(self) -> list[Event]:
        with self._observers.timed('learn'):
            events = self._driver.poll()
        if any(isinstance(event, AdapterVersion) for event in events):
            tidy(self.parts.journal, self.parts.store, self._settings.storage.max_versions)
        return events

    # -- plan ------------------------------------------------------------------------

    def _prepare(self) -> list[Event]:
        """Start background requests, and give the scheduler what it may plan."""
        background = self._background
        for request in (
                background.next_history(sharing=self._settings.memory.prefix_sharing),
                background.hints.next(self.requests.max_length)):
            if request is not None:
                self.requests.start(request)
        return self._driver.prepare()

    def _plan(self) -> Plan:
        with self._observers.timed('plan'):
            plan = self.runner.take_planned_ahead() or self.scheduler.plan(
                self.parts.state, self._clock())
        return plan

    def _tend_memory(self, plan: Plan) -> None:
        """When the last request has ended, account for every KV block; trim the heap."""
        idle = not self.parts.state.has_requests
        if idle and not self._was_idle:
            step = self._driver.step
            self.parts.pool.check(() if step is None else step.blocks)
        self._was_idle = idle
        self._heap.trim(self._clock(), self.parts.memory.budget.total, idle=(
            plan.is_empty and idle and not self.learner.busy))

    # -- commit ----------------------------------------------------------------------

    def _commit(self, result: PassResult | None) -> list[Event]:
        """Publish the tokens of a pass, or end the requests of one that failed."""
        if result is None:
            return []
        events: list[Event] = []
        if result.error is not None:
            events += self._fail_requests(result.plan, result.error)
        with self._observers.timed('commit'):
            try:
                events += self.requests.commit(result.sampled, result.tokens, result.scores)
            except Exception as error:    # unexpected: all requests of the pass end
                events += self._fail_requests(result.plan, error)
        self._observers.committed([active.request for active in result.sampled])
        if result.learning_error is not None:
            events += self._driver.fail(result.learning_error)
        return events

    def _fail_requests(self, plan: Plan, error: Exception) -> list[Event]:
        return self.requests.fail(
            [r.id for r in (*plan.decode, *(c.request for c in plan.prefill))],
            f'{type(error).__name__}: {error}')

    def _finish_plan(self) -> list[Event]:
        """Run the segments of a plan whose pass has ended, and account for both."""
        result = self.runner.run_segments()
        if result is None:
            return []
        measurement, now = result.measurement, self._clock()
        step = self._driver.step
        if measurement.segments and step is not None and step.done:
            self._heap.step_ended(now)
        self.learner.commit(measurement.segments)
        self._observers.measured(measurement, self.scheduler.cost)
        self.scheduler.observe(measurement, now)
        return [] if result.error is None else self._driver.fail(result.error)

    # -- status, end ---------------------------------------------------------------

    def status(self) -> Status:
        """Return a snapshot between two iterations."""
        return take_status(self.parts, self.scheduler, self.requests, self._recorder,
                           self._background, self.learner, self._clock())

    def pause(self) -> list[Event]:
        """Cancel all requests, and take in what the journal has written; step() may follow."""
        with self._events_survive_errors() as events:
            events += self._commit(self.runner.collect())
            self.runner.skip_segments()
            events += self._finish_plan()
            # Wait for what was submitted, and again for corrections of the cancelled answers.
            for _ in range(2):
                self.parts.journal.submit(lambda _: None).exception()
                events += self._receive()
                events += self.requests.cancel_all()
        if self._tracing.ends_at is not None:
            self._observers.finished(events)
            self._tracing.end()
        return events

    def close(self) -> list[Event]:
        """Cancel all requests, and wait until the journal is on disk."""
        try:
            events = self.pause()
        finally:    # otherwise the folder would stay locked
            self.learner.close('the node is stopping')
            self._adapters.close()
            self.parts.close()
            gc.unfreeze()
        events += self._receive()    # what the journal has written meanwhile
        self.learner.close('the node is stopping')    # rollbacks that have arrived since
        return events
