# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Runs plans on the device: one packed pass, then fine-tune segments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mace_ros.engine.active_request import ActiveRequest, RequestKind
from mace_ros.engine.inbox import Inbox
from mace_ros.engine.paged_kv_cache import PagedKVCache
from mace_ros.engine.request_manager import RequestManager
from mace_ros.finetune.step import FinetuneStep
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.sampling import sample, Sampled, Scores
from mace_ros.model.spans import PiggybackSpans, Span
from mace_ros.model.timing import DeviceTimer
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.kv_cache_manager import KVCacheManager
from mace_ros.scheduling.plan import Measurement, Plan, Segment, SegmentKind, State
from mace_ros.scheduling.plan_ahead import plan_ahead, still_valid
from mace_ros.scheduling.request import Request
from mace_ros.telemetry.observer import Observers

PHASES = {kind: f'fine-tune {kind.name.lower()}' for kind in SegmentKind}   # for observers
MAX_FAILED_PASSES = 10      # failed passes in a row after which the device counts as lost


@dataclass(frozen=True)
class PackedBatch:
    """
    The tokens of a pass, as far as they could be packed.

    Without room or memory for fine-tune tokens, ``plan`` is amended: the pass has none of them.
    After a ``learning_error`` the plan has no segments either.
    """

    plan: Plan
    step: FinetuneStep | None
    computed: list[tuple[Request, int]]     # tokens of each request that the pass computes
    spans: list[Span]
    piggyback: PiggybackSpans | None
    learning_error: Exception | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no token is left to compute."""
        return not self.spans and self.piggyback is None


@dataclass(frozen=True)
class InFlightBatch:
    """A pass that was launched and may still be running on the device."""

    batch: PackedBatch
    sampled: list[ActiveRequest]
    next: Sampled                           # a token for each of them
    timer: DeviceTimer

    @property
    def plan(self) -> Plan:
        """The plan of the pass."""
        return self.batch.plan


@dataclass(frozen=True)
class PassResult:
    """
    Outcome of a pass: one token for each request in ``sampled``.

    ``scores`` has the log-probabilities that some of them want, by their place in ``sampled``.
    After ``error`` the requests of the plan must be ended. After ``learning_error`` the
    fine-tune step must be given up; the requests are unaffected.
    """

    plan: Plan
    sampled: Sequence[ActiveRequest] = ()
    tokens: Sequence[int] = ()
    scores: Mapping[int, Scores] = field(default_factory=dict)
    error: Exception | None = None
    learning_error: Exception | None = None


@dataclass(frozen=True)
class UnfinishedPlan:
    """A plan whose segments have not run yet; its pass took ``pass_s`` seconds."""

    plan: Plan
    step: FinetuneStep | None
    pass_s: float


@dataclass(frozen=True)
class SegmentResult:
    """Measured times of a plan, and the error that ended its segments early."""

    measurement: Measurement
    error: Exception | None = None


class ModelRunner:
    """
    Runs one plan at a time, on the thread that owns the device.

    A plan runs in two phases, so that the events of its pass need not wait for its segments:
    :meth:`execute` runs the pass, and :meth:`run_segments` the rest. On CUDA a pass without
    segments is left running, and :meth:`collect` takes its result in the next iteration.
    """

    def __init__(self, *, model: PackedModel, state: State, paged: PagedKVCache,
                 kv_cache: KVCacheManager, cost: CostModel, requests: RequestManager,
                 inbox: Inbox, observers: Observers, clock: Callable[[], float]) -> None:
        """Messages in ``inbox`` interrupt segments."""
        self._model, self._state, self._paged, self._kv_cache = model, state, paged, kv_cache
        self._cost, self._requests, self._inbox = cost, requests, inbox
        self._observers, self._clock = observers, clock
        self.overlaps = model.device.type == 'cuda'
        self.in_flight: InFlightBatch | None = None
        self.planned_ahead: Plan | None = None
        self._unfinished: UnfinishedPlan | None = None
        self._failures = 0      # failed passes in a row
        self._fatal_error: Exception | None = None

    @property
    def has_segments(self) -> bool:
        """Whether segments of the plan whose pass has ended are still to run."""
        return self._unfinished is not None and self._unfinished.plan.segments > 0

    def check(self) -> None:
        """Raise the error with which the device was lost, or the last of many failed passes."""
        if self._fatal_error is not None:
            raise self._fatal_error

    def survives(self, error: Exception) -> bool:
        """
        Return whether the device still works after an error; if not, :meth:`check` raises it.

        After an illegal address or a failed launch, CUDA returns the same error to every call of
        the process: nothing can be tried again.
        """
        try:
            self._model.synchronize()
        except Exception:
            self._fatal_error = error
            return False
        return True

    # -- passes ----------------------------------------------------------------------

    def execute(self, plan: Plan, step: FinetuneStep | None) -> PassResult | None:
        """Run the pass of a plan; return None if the device is left running it."""
        started, batch = self._clock(), None
        try:
            self._kv_cache.allocate(plan, started)
            batch = self._pack(plan, step)
            if batch.is_empty:
                return self._ended(batch, 0.0)
            launched = self._launch(batch)
            if self.overlaps and not batch.plan.segments:
                self.in_flight = launched
                self.planned_ahead = plan_ahead(batch.plan, self._state, self._cost)
                return None
            result = self._take_tokens(launched)
            self._model.synchronize()
            # On CUDA the device's own time, as for a pass that was left running.
            seconds = (launched.timer.seconds() if self.overlaps
                       else self._clock() - started)
        except Exception as error:   # of an allocator or a kernel
            return self._failed(plan, batch, error)
        self._failures = 0
        return self._ended(batch, seconds, launched.sampled, *result)

    def collect(self) -> PassResult | None:
        """Wait for the pass in flight and return its result; None if there is no such pass."""
        launched, self.in_flight = self.in_flight, None
        if launched is None:
            return None
        try:
            result = self._take_tokens(launched)
            seconds = launched.timer.seconds()
        except Exception as error:
            return self._failed(launched.plan, launched.batch, error)
        self._failures = 0
        return self._ended(launched.batch, seconds, launched.sampled, *result)

    def take_planned_ahead(self) -> Plan | None:
        """Return the plan that was made while the last pass ran, if it is still valid."""
        plan, self.planned_ahead = self.planned_ahead, None
        if plan is None or not still_valid(plan, self._state, self._kv_cache.pool.free_blocks):
            return None
        return plan

    def drop_planned_ahead(self) -> None:
        """Forget the plan that was made under other settings."""
        self.planned_ahead = None

    def _pack(self, plan: Plan, step: FinetuneStep | None) -> PackedBatch:
        """Gather the tokens that the plan's pass computes."""
        computed = [*((r, 1) for r in plan.decode),
                    *((c.request, min(c.tokens, c.request.remaining_tokens))
                      for c in plan.prefill)]
        spans = [self._span(request, tokens) for request, tokens in computed]
        piggyback, error = self._piggyback(step, plan.finetune_tokens)
        if piggyback is None and plan.finetune_tokens:
            plan = plan._replace(
                finetune_tokens=0, shape=plan.shape._replace(finetune_tokens=0))
        if error is not None:
            plan, step = plan._replace(segments=0), None
        return PackedBatch(plan, step, computed, spans, piggyback, error)

    def _launch(self, batch: PackedBatch) -> InFlightBatch:
        """Launch the packed pass and the sampling of its tokens."""
        timer = DeviceTimer(self._model.device, self._clock)
        with self._observers.timed('pass', predicted_ms=batch.plan.predicted_s * 1e3,
                                   **batch.plan.shape._asdict()):
            logits = self._model.run(batch.spans, batch.piggyback)
        timer.stop()
        if batch.piggyback is not None and batch.step is not None:
            batch.step.piggybacked(batch.piggyback.tokens)
            if batch.step.piggyback_tokens == 0:
                self._paged.release(batch.step)
        sampled = [self._requests[request.id] for (request, _), span
                   in zip(batch.computed, batch.spans, strict=True) if span.wants_logits]
        with self._observers.timed('masks'):    # while the device runs the pass
            rows = [active.row() for active in sampled]
        with self._observers.timed('sample'):
            drawn = sample(logits, rows, self._model.best_tokens)
        return InFlightBatch(batch, sampled, drawn, timer)

    def _span(self, request: Request, tokens: int) -> Span:
        """Return the next ``tokens`` tokens of a request."""
        first, active = request.computed_tokens, self._requests[request.id]
        return Span(
            active.ids[first:first + tokens], first, request.blocks, request.adapter_slot,
            wants_logits=tokens == request.remaining_tokens, dropped=request.dropped_tokens,
            attention=self._paged.attention(active, tokens), adapted_from=active.adapted_from,
            pooled=self._pooled(active))

    def _pooled(self, active: ActiveRequest) -> Tensor | None:
        """Return the tensor to which a pass adds hidden states; create it for the first token."""
        if active.kind is RequestKind.EMBED and not active.request.computed_tokens:
            active.pooled = torch.zeros(
                self._model.model.config.hidden_size, device=self._model.device)
        return active.pooled

    def _piggyback(self, step: FinetuneStep | None, tokens: int,
                   ) -> tuple[PiggybackSpans | None, Exception | None]:
        """Return the fine-tune tokens of a pass, or an error, which must not fail the pass."""
        if step is None or not tokens:
            return None, None
        try:
            self._begin(step)
            return self._paged.piggyback(step, tokens), None
        except Exception as error:
            return None, error

    def _begin(self, step: FinetuneStep) -> None:
        """Let the model compute a step's first input, which is neither a pass nor a segment."""
        if not step.begun:
            with self._observers.timed('fine-tune begin'):
                step.begin()

    def _take_tokens(self, launched: InFlightBatch) -> tuple[list[int], Mapping[int, Scores]]:
        """Wait for the sampled tokens and their scores, and note what the pass has computed."""
        with self._observers.timed('wait'):
            tokens: list[int] = launched.next.tokens.tolist()
            scores = launched.next.scores()
        for request, computed in launched.batch.computed:
            self._kv_cache.commit(request, computed)
            if not request.remaining_tokens:
                self._paged.prune(self._requests[request.id])
        return tokens, scores

    def _ended(self, batch: PackedBatch, seconds: float, sampled: Sequence[ActiveRequest] = (),
               tokens: Sequence[int] = (), scores: Mapping[int, Scores] | None = None,
               ) -> PassResult:
        """Return the result of a pass, after which the plan's segments may run."""
        self._unfinished = UnfinishedPlan(batch.plan, batch.step, seconds)
        return PassResult(batch.plan, sampled, tokens, scores or {},
                          learning_error=batch.learning_error)

    def _failed(self, plan: Plan, batch: PackedBatch | None, error: Exception) -> PassResult:
        """Return the result of a pass that failed; the step fails too if it took part."""
        self._failures += 1
        if self.survives(error) and self._failures >= MAX_FAILED_PASSES:
            self._fatal_error = error
        took_part = plan.finetune_tokens > 0 if batch is None else batch.piggyback is not None
        return PassResult(plan, error=error, learning_error=(
            error if took_part else None if batch is None else batch.learning_error))

    # -- segments --------------------------------------------------------------------

    def skip_segments(self) -> None:
        """Run no segments of the plan whose pass has ended: their step was given up."""
        if self._unfinished is not None:
            self._unfinished = UnfinishedPlan(
                self._unfinished.plan._replace(segments=0), None, self._unfinished.pass_s)

    def run_segments(self) -> SegmentResult | None:
        """Run the segments of the plan whose pass has ended; return the times of both."""
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is None:
            return None
        plan, step = unfinished.plan, unfinished.step
        timed: list[tuple[Segment, float]] = []
        error = None
        try:
            for _ in range(plan.segments if step is not None else 0):
                assert step is not None
                if step.done or (plan.interruptible and self._inbox):
                    break      # the learner, or a query, comes first
                self._begin(step)
                scored = step.scored
                timed.append(self._run_segment(step))
                if step.pauses_when_scored and step.scored and not scored:
                    break      # the learner may decide that these scores are good enough
        except Exception as failure:
            error = failure
        return SegmentResult(Measurement(plan, unfinished.pass_s, tuple(timed)), error)

    def _run_segment(self, step: FinetuneStep) -> tuple[Segment, float]:
        started = self._clock()
        segment = step.run_segment()
        self._model.synchronize()
        ended = self._clock()
        self._observers.phase(
            PHASES[segment.kind], started, ended, {'tokens': segment.tokens})
        return segment, ended - started
