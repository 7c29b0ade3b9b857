# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Plans on the device: passes, segments, and what becomes of those that fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mace_ros.api.events import Event
from mace_ros.engine.active_request import ActiveRequest
from mace_ros.engine.kv_blocks import KvBlocks
from mace_ros.engine.request_manager import RequestManager
from mace_ros.learning.learner import Learner
from mace_ros.memory.block_pool import BlockPool
from mace_ros.model.heap import HeapTrimmer
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.sampling import sample
from mace_ros.model.spans import Span
from mace_ros.model.timing import DeviceTimer
from mace_ros.scheduling.kv_cache_manager import KVCacheManager
from mace_ros.scheduling.plan import Measurement, Plan, Segment, State
from mace_ros.scheduling.plan_ahead import plan_ahead, still_valid
from mace_ros.scheduling.request import Request
from mace_ros.scheduling.scheduler import Scheduler
from mace_ros.telemetry.trace import phase_of, Trace

MAX_FAILURES = 10      # passes in a row; then the device is taken to be broken


@dataclass(frozen=True)
class InFlightBatch:
    """A pass that the device was given, and may still be running."""

    plan: Plan
    work: list[tuple[Request, int]]     # with the tokens of each that it computes
    sampled: list[ActiveRequest]
    drawn: Tensor                       # the next token of each of these
    timer: DeviceTimer


class ModelRunner:
    """
    Runs what the scheduler has planned, in the thread that owns the device.

    One that has something to say before its segments says it first: :meth:`resume` runs those.
    """

    def __init__(self, *, model: PackedModel, state: State, pool: BlockPool, blocks: KvBlocks,
                 kv_cache: KVCacheManager, scheduler: Scheduler, requests: RequestManager,
                 heap: HeapTrimmer, learner: Callable[[], Learner], is_called: Callable[[], bool],
                 clock: Callable[[], float]) -> None:
        """``is_called`` says whether somebody waits who comes before fine-tune segments."""
        self._model, self._state, self._pool, self._blocks = model, state, pool, blocks
        self._kv_cache, self._scheduler, self._requests = kv_cache, scheduler, requests
        self._heap, self._get_learner, self._is_called, self._clock = (
            heap, learner, is_called, clock)
        # Whether a device runs a pass while this thread tells what came of the last one.
        self.overlaps = model.device.type == 'cuda'
        self.flight: InFlightBatch | None = None
        self.planned_ahead: Plan | None = None       # what to do after it, if nothing happens
        # The plan whose segments are still to run, and the seconds of its pass.
        self._begun: tuple[Plan, float] | None = None
        self._failures = 0      # passes that failed, one after the other
        self.fatal_error: Exception | None = None      # the device is broken
        self.trace: Trace | None = None     # of what is done, if somebody has asked for it

    @property
    def _learner(self) -> Learner:
        return self._get_learner()

    @property
    def is_suspended(self) -> bool:
        """Whether segments of a plan are still to run."""
        return self._begun is not None

    def resume(self, events: list[Event]) -> None:
        """Run the segments of the plan that is under way."""
        assert self._begun is not None
        (plan, pass_s), self._begun = self._begun, None
        self._finish(plan, pass_s, events)

    def run(self, plan: Plan, events: list[Event]) -> None:
        """
        Run the plan; what fails ends those who took part in it, and nobody else.

        Where that overlaps, a pass without segments is left to the device: see :meth:`collect`.
        """
        pass_s = 0.0
        started = self._clock()
        try:
            self._kv_cache.begin(plan, started)
            flight = self._launch(plan, events) if plan.has_pass else None
            if flight is not None:
                plan = flight.plan      # less what did not ride
                if self.overlaps and not plan.segments:
                    self.flight = flight
                    self.planned_ahead = plan_ahead(plan, self._state, self._scheduler.cost)
                    return
                events += self._take_tokens(flight)
        except Exception as error:   # allocators, kernels
            events += self._broken(plan, error)
            return
        if plan.has_pass:
            self._failures = 0
            self._model.synchronize()
            pass_s = self._clock() - started
        if events and plan.segments:
            self._suspended = (plan, pass_s)
        else:
            self._finish(plan, pass_s, events)

    def collect(self, events: list[Event]) -> None:
        """Wait for the pass that the device is running, if it is, and take its tokens."""
        flight, self.flight = self.flight, None
        if flight is None:
            return
        try:
            events += self._take_tokens(flight)
            pass_s = flight.timer.seconds()
        except Exception as error:
            events += self._broken(flight.plan, error)
            return
        self._failures = 0
        self._finish(flight.plan, pass_s, events)

    def take_planned_ahead(self) -> Plan | None:
        """Return what was planned while the last pass ran, if that is still right."""
        plan, self.planned_ahead = self.planned_ahead, None
        if plan is None or not still_valid(plan, self._state, self._pool.free_blocks):
            return None
        return plan

    def _finish(self, plan: Plan, pass_s: float, events: list[Event]) -> None:
        """Run the plan's segments, and let the scheduler know what all of it took."""
        segments: list[tuple[Segment, float]] = []
        try:
            self._run_segments(plan, segments)
        except Exception as error:
            self._learner.commit(segments)
            events += self.learning_broke(error)
        else:
            self._learner.commit(segments)
        self._scheduler.observe(
            Measurement(plan, pass_s, tuple(segments)), self._clock())

    def _run_segments(self, plan: Plan, segments: list[tuple[Segment, float]]) -> None:
        """Run fine-tune segments, and append each one with its time."""
        step = self._learner.step
        for _ in range(plan.segments if step is not None else 0):
            assert step is not None
            if step.done or (plan.interruptible and self._is_called()):
                break      # the learner, or a query, comes first
            was_scored, started = step.scored, self._clock()
            segment = step.run_segment()
            self._model.synchronize()
            spent = self._clock() - started
            if self.trace is not None:
                self.trace.slice(f'fine-tune {segment.kind.name.lower()}', started,
                                  started + spent, tokens=segment.tokens)
            segments.append((segment, spent))
            if step.done:
                self._heap.left_gaps(started)
            if step.scored and not was_scored:
                break      # the learner may have seen enough

    def _launch(self, plan: Plan, events: list[Event]) -> InFlightBatch | None:
        """Give the hybrid pass to the device; None if nothing is left of it."""
        spans: list[Span] = []
        work = [*((r, 1) for r in plan.decode),
                *((c.request, min(c.tokens, c.request.remaining_tokens)) for c in plan.prefill)]
        for request, tokens in work:
            done = request.computed_tokens
            answering = self._requests[request.id]
            spans.append(Span(
                answering.ids[done:done + tokens], done, request.blocks, request.adapter_slot,
                wants_logits=tokens == request.remaining_tokens, dropped=request.dropped_tokens,
                attention=self._blocks.attention(answering, tokens)))
        step, rows = self._learner.step, None
        if step is not None:
            try:
                rows = self._blocks.ride(step, plan.finetune_tokens)
            except Exception as error:    # memory that only learning wants: answers go on
                events += self.learning_broke(error)
        if not spans and rows is None:
            return None
        if plan.finetune_tokens and rows is None:
            plan = plan._replace(finetune_tokens=0, shape=plan.shape._replace(finetune_tokens=0))
        timer = DeviceTimer(self._model.device, self._clock)
        with phase_of(self.trace, 'pass', predicted_ms=plan.predicted_s * 1e3,
                      **plan.shape._asdict()):
            logits = self._model.run(spans, rows)
        timer.stop()
        if rows is not None and step is not None:
            step.piggybacked(rows.tokens)
            if step.piggyback_tokens == 0:
                self._blocks.release(step)
        sampled = [self._requests[request.id] for (request, _), span
                   in zip(work, spans, strict=True) if span.wants_logits]
        with phase_of(self.trace, 'sample'):
            drawn = sample(logits, [(a.sampling, a.request.output_tokens) for a in sampled])
        return InFlightBatch(plan, work, sampled, drawn, timer)

    def _take_tokens(self, flight: InFlightBatch) -> list[Event]:
        """Wait for a pass, and take its tokens."""
        with phase_of(self.trace, 'wait'):
            tokens = flight.drawn.tolist()
        with phase_of(self.trace, 'commit'):
            for request, computed in flight.work:
                self._kv_cache.computed(request, computed)
                if not request.remaining_tokens:
                    self._blocks.prune(self._requests[request.id])
            return self._requests.commit(flight.sampled, tokens)

    def _broken(self, plan: Plan, error: Exception) -> list[Event]:
        """End what took part in an iteration that failed; the rest goes on."""
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            self.fatal_error = error
        reason = f'{type(error).__name__}: {error}'
        events: list[Event] = []
        for request in [*plan.decode, *(c.request for c in plan.prefill)]:
            events += self._requests.broke_off(request.id, reason)
        if plan.finetune_tokens:
            events += self.learning_broke(error)
        return events

    def learning_broke(self, error: Exception) -> list[Event]:
        """Let the learner begin its job anew; what is served is not touched."""
        step = self._learner.step
        if step is not None:
            self._blocks.release(step)
        return self._learner.fail(f'{type(error).__name__}: {error}')
