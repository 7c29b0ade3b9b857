# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The engine's loop (plan, run, commit) under a virtual clock, on a device that only takes time.

Scheduler, policies, batcher, ledger and block pool are those of the robot. While nothing can
change the plan (the same rows decode, no request arrives or ends, and the policy adds no
learning), passes are repeated without planning; the result is the same.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
import math

from mace_ros.api.settings import Settings, Value
from mace_ros.memory.block_pool import BLOCK_TOKENS, BlockPool
from mace_ros.scheduling.batching import admission_blocks
from mace_ros.scheduling.kv_cache_manager import KVCacheManager
from mace_ros.scheduling.plan import Measurement, PassShape, Plan, Segment
from mace_ros.scheduling.request import Request, RequestState
from mace_ros.scheduling.scheduler import Scheduler
from mace_ros.simulation.quiet import quiet_until
from mace_ros.simulation.roofline import DeviceTimes
from mace_ros.simulation.virtual_learning import LearningSource, NoLearning, VirtualStep


class Stuck(RuntimeError):
    """Requests are left that will never be served: an error of the scheduler."""


@dataclass(frozen=True, slots=True)
class IterationRecord:
    """``count`` passes of one plan from ``began`` on, which took ``pass_s`` in all."""

    began: float
    plan: Plan
    pass_s: float
    segments: tuple[tuple[Segment, float], ...] = ()
    count: int = 1

    @property
    def segments_s(self) -> float:
        """The seconds of the segments."""
        return sum([seconds for _, seconds in self.segments])


class VirtualEngine:
    """Serves requests and learns on a virtual clock, ``now``."""

    def __init__(self, scheduler: Scheduler, device: DeviceTimes, settings: Settings,
                 learning: LearningSource | None = None, *, overhead_s: float = 0.0,
                 admission_s: float = 0.0, skips: bool = True,
                 on_plan: Callable[[Plan], None] | None = None,
                 on_iteration: Callable[[IterationRecord], None] | None = None) -> None:
        """
        Start at time 0 without requests.

        An iteration takes ``overhead_s`` beside pass and segments, and each arriving request
        ``admission_s``. Without ``skips``, every iteration is planned; a cost model that keeps
        learning needs that. ``on_plan`` is called with each plan before it runs, and
        ``on_iteration`` with what ran.
        """
        self.scheduler, self.device, self.settings = scheduler, device, settings
        self.learning = learning if learning is not None else NoLearning()
        self.pool = BlockPool(settings.memory.kv_cache_tokens // BLOCK_TOKENS, BLOCK_TOKENS)
        self.kv_cache = KVCacheManager(self.pool)
        self.state = self.kv_cache.state
        self.now = 0.0
        self.finished: list[Request] = []
        self.rejected: list[Request] = []
        self.iterations = 0     # passes and learning slices that ran
        self._overhead_s, self._admission_s, self._skips = overhead_s, admission_s, skips
        self._on_plan, self._on_iteration = on_plan, on_iteration
        self._arrivals: list[Request] = []
        self._arrived = 0       # number of ``_arrivals`` that were taken in
        self._changes: list[tuple[float, dict[str, Value]]] = []
        self._step_blocks: list[int] = []    # KV blocks of a step whose forward is piggybacked

    def run(self, requests: Sequence[Request], until: float = -math.inf,
            changes: Sequence[tuple[float, dict[str, Value]]] = ()) -> None:
        """
        Serve ``requests`` until all are answered, but at least until the time ``until``.

        ``changes`` are settings to apply on the way, as pairs of time and values, by time.
        """
        self._arrivals, self._arrived = sorted(requests, key=lambda r: r.arrival), 0
        self._changes = list(changes)
        target = len(self.finished) + len(self.rejected) + len(requests)
        while len(self.finished) + len(self.rejected) < target or self.now < until:
            self._receive()
            plan = self.scheduler.plan(self.state, self.now)
            if self._on_plan is not None:
                self._on_plan(plan)
            for rejection in plan.rejected:
                self.kv_cache.free(rejection.request)
                self.rejected.append(rejection.request)
            if plan.lacks_memory and self._reclaim_step_blocks():
                continue     # and plan again
            if not plan.is_empty:
                self._execute(plan)
            elif not plan.rejected:
                self._wait(plan, until)

    # -- between iterations ------------------------------------------------------------

    def _receive(self) -> None:
        """Take in the requests, settings and corrections that have arrived."""
        arrivals = self._arrivals
        while self._arrived < len(arrivals) and arrivals[self._arrived].arrival <= self.now:
            request = arrivals[self._arrived]
            self._arrived += 1
            self.now += self._admission_s
            if len(self.state.waiting) >= self.settings.scheduler.max_queue:
                request.state = RequestState.FINISHED
                self.rejected.append(request)
            else:
                self.state.waiting.add(request)
        while self._changes and self._changes[0][0] <= self.now:
            self.settings = self.settings.updated(self._changes.pop(0)[1])
            self.scheduler.update(self.settings)
        self.learning.advance(self.now)
        self.state.finetune = self.learning.step

    @property
    def _next_arrival(self) -> float:
        """When the next request arrives."""
        return (self._arrivals[self._arrived].arrival if self._arrived < len(self._arrivals)
                else math.inf)

    @property
    def _next_event(self) -> float:
        """When the next request, correction or change of settings arrives."""
        return min(self._next_arrival, self.learning.next_at,
                   self._changes[0][0] if self._changes else math.inf)

    def _wait(self, plan: Plan, until: float) -> None:
        """Advance the clock to the next event."""
        then = min(self._next_event, math.inf if plan.wake_at is None else plan.wake_at,
                   until if until > self.now else math.inf)
        if not self.now < then < math.inf:
            raise Stuck(f'no event after {self.now:.6g} s: {len(self.state.waiting)} requests '
                        f'wait, {len(self.state.running)} run')
        self.now = then

    def _reclaim_step_blocks(self) -> bool:
        """Take the KV blocks of a piggybacked step; return whether it had any."""
        step = self.learning.step
        if step is None or not self._step_blocks:
            return False
        self.pool.release(self._step_blocks)
        step.stop_piggybacking()
        return True

    # -- an iteration ------------------------------------------------------------------

    def _execute(self, plan: Plan) -> None:
        began, pass_s, count = self.now, 0.0, 1
        step = self.learning.step
        self.kv_cache.allocate(plan, self.now)
        if plan.finetune_tokens and step is not None and not step.piggybacked_so_far:
            self._step_blocks = self.pool.allocate(step.tokens)
        if plan.has_pass:
            if self._may_repeat(plan):
                pass_s, count = self._repeat(plan)
            else:
                self.now += self._overhead_s
                pass_s = self.device.run(plan.shape)
                self.now += pass_s
                self._commit(plan)      # tokens are published before the segments run
            if plan.finetune_tokens and step is not None:
                step.piggybacked(plan.finetune_tokens)
                if not step.is_piggybacking:
                    self.pool.release(self._step_blocks)
        else:
            self.now += self._overhead_s
        segments = self._run_segments(plan, step) if plan.segments and step is not None else ()
        self.iterations += count
        self.scheduler.observe(Measurement(plan, pass_s, segments), self.now)
        if self._on_iteration is not None:
            self._on_iteration(IterationRecord(began, plan, pass_s, segments, count))

    def _run_segments(self, plan: Plan, step: VirtualStep) -> tuple[tuple[Segment, float], ...]:
        ran: list[tuple[Segment, float]] = []
        arrival = self._next_arrival
        for _ in range(plan.segments):
            if plan.interruptible and arrival <= self.now:
                break
            segment = step.run()
            seconds = self.device.run(segment)
            self.now += seconds
            ran.append((segment, seconds))
        return tuple(ran)

    def _commit(self, plan: Plan) -> None:
        for request in plan.decode:
            self._advance(request, 1)
        for chunk in plan.prefill:
            self._advance(chunk.request, chunk.tokens)

    def _advance(self, request: Request, computed: int) -> None:
        """Record ``computed`` more tokens; sample the next one if none is left to compute."""
        self.kv_cache.commit(request, computed)
        if request.remaining_tokens:
            return
        request.output_tokens += 1
        request.last_token_at = self.now
        if request.first_token_at is None:
            request.first_token_at = self.now
        if request.output_tokens == request.max_tokens:
            self._finish(request)

    def _finish(self, request: Request) -> None:
        self.kv_cache.free(request)
        self.finished.append(request)

    # -- many iterations at once ---------------------------------------------------------

    def _may_repeat(self, plan: Plan) -> bool:
        """Return whether the scheduler would plan the same rows again until the next event."""
        if (not self._skips or plan.prefill or plan.segments or plan.finetune_tokens
                or plan.rejected or plan.preempted or len(plan.decode) < len(self.state.running)):
            return False
        waiting = self.state.waiting
        if not waiting:
            return True
        # The waiting requests must stay inadmissible, for lack of a slot or of KV blocks.
        if self.settings.slo.admission == 'reject':
            return False
        if len(plan.decode) >= self.settings.scheduler.max_requests:
            return True
        # One block is reserved for each row; the number of free blocks only decreases.
        unclaimed = self.pool.free_blocks - len(plan.decode)
        return all(admission_blocks(request) > unclaimed for request in waiting)

    def _repeat(self, plan: Plan) -> tuple[float, int]:
        """Run passes of the same rows until the plan may change; return seconds and count."""
        rows = len(plan.decode)
        limit = self._passes_in_memory(
            plan.decode, min([r.max_tokens - r.output_tokens for r in plan.decode]))
        ends = min(self._next_event,
                   quiet_until(self.scheduler, self.state, self.settings, self.now))
        context = plan.shape.decode_context
        run, overhead_s = self.device.run, self._overhead_s
        now, spent, count = self.now, 0.0, 0
        while True:
            seconds = run(PassShape(rows, context))
            now += overhead_s
            now += seconds
            spent += seconds
            context += rows
            count += 1
            if count == limit or now >= ends:
                break
        self.now = now
        for request in plan.decode:
            self.pool.grow(request.blocks, request.computed_tokens + count)
            # A decode row has computed all of its tokens but the newest.
            self.kv_cache.commit(request, count)
            request.output_tokens += count
            request.last_token_at = now
            if request.output_tokens == request.max_tokens:
                self._finish(request)
        return spent, count

    def _passes_in_memory(self, rows: Sequence[Request], limit: int) -> int:
        """Return how many passes, up to ``limit``, these rows can run before they lack blocks."""
        size = self.pool.block_size

        def growth(passes: int) -> int:
            return sum([max(-(-(r.computed_tokens + passes) // size) - len(r.blocks), 0)
                        for r in rows])

        # The blocks of the first pass are allocated already.
        return max(bisect_right(range(1, limit + 1), self.pool.free_blocks, key=growth), 1)
