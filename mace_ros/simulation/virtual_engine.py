# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The engine's loop (plan, run, commit) under a virtual clock, with a device that only takes time.

Scheduler, policies, batcher, ledger and block pool are those of the robot. Where nothing can
change for a while (the same rows decode, nobody comes, nothing ends, and the policy has no
room for learning), the iterations are run without asking for a plan each time; the result is
that of asking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
import math

from mace_ros.api.settings import Settings, Value
from mace_ros.memory.block_pool import BLOCK_TOKENS, BlockPool
from mace_ros.scheduling.batching import admission_blocks
from mace_ros.scheduling.kv_cache_manager import KVCacheManager
from mace_ros.scheduling.plan import Measurement, PassShape, Plan, Segment, State
from mace_ros.scheduling.request import Request, RequestState
from mace_ros.scheduling.scheduler import Scheduler
from mace_ros.simulation.roofline import DeviceTimes
from mace_ros.simulation.virtual_learning import LearningSource, NoLearning, VirtualStep


class Stuck(RuntimeError):
    """Requests are left, and nothing will ever happen again: an error of the scheduler."""


@dataclass(frozen=True, slots=True)
class IterationRecord:
    """What was run from ``began`` on; ``count`` passes after the same plan, all in all."""

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
    """Serves requests and learns on a clock of its own."""

    def __init__(self, scheduler: Scheduler, device: DeviceTimes, settings: Settings,
                 learning: LearningSource | None = None, *, overhead_s: float = 0.0,
                 admission_s: float = 0.0, skips: bool = True,
                 on_plan: Callable[[Plan], None] = lambda plan: None,
                 on_iteration: Callable[[IterationRecord], None] = lambda iteration: None) -> None:
        """
        Begin at time 0 with nothing to do.

        ``overhead_s`` is what an iteration takes beside passes and segments,
        ``admission_s`` what it takes to read a request before it can wait. Without
        ``skips`` every iteration is planned, which a cost model that goes on learning needs.
        ``on_plan`` hears each plan before it runs, ``on_iteration`` what came of it.
        """
        self.scheduler, self.device, self.settings = scheduler, device, settings
        self.learning = learning if learning is not None else NoLearning()
        self.pool = BlockPool(settings.memory.kv_cache_tokens // BLOCK_TOKENS, BLOCK_TOKENS)
        self.state = State()
        self.kv_cache = KVCacheManager(self.pool, self.state)
        self.now = 0.0
        self.finished: list[Request] = []
        self.rejected: list[Request] = []
        self.iterations = 0     # passes and pieces of learning that were run
        self._overhead_s, self._admission_s, self._skips = overhead_s, admission_s, skips
        self._on_plan, self._on_iteration = on_plan, on_iteration
        self._coming: list[Request] = []
        self._came = 0          # of ``_coming``
        self._changes: list[tuple[float, dict[str, Value]]] = []
        self._riding: list[int] = []    # KV blocks of the step whose forward rides

    def run(self, requests: Sequence[Request], until: float = -math.inf,
            changes: Sequence[tuple[float, dict[str, Value]]] = ()) -> None:
        """
        Serve ``requests`` until all are answered, and go on until the time ``until``.

        ``changes`` are settings that come into force on the way, in order of time.
        """
        self._coming, self._came = sorted(requests, key=lambda r: r.arrival), 0
        self._changes = list(changes)
        to_answer = len(self.finished) + len(self.rejected) + len(requests)
        while (len(self.finished) + len(self.rejected) < to_answer) or self.now < until:
            self._take_in()
            self.kv_cache.refresh()
            plan = self.scheduler.plan(self.state, self.now)
            self._on_plan(plan)
            for rejection in plan.rejected:
                self.kv_cache.leave(rejection.request)
                self.rejected.append(rejection.request)
            if plan.lacks_memory and self._learning_makes_room():
                continue     # and plan again
            if not plan.is_empty:
                self._execute(plan)
            elif not plan.rejected:
                self._wait(plan, until)

    # -- between iterations ------------------------------------------------------------

    def _take_in(self) -> None:
        coming = self._coming
        while self._came < len(coming) and coming[self._came].arrival <= self.now:
            request = coming[self._came]
            self._came += 1
            self.now += self._admission_s
            if len(self.state.waiting) >= self.settings.scheduler.max_queue:
                self._reject(request)
            else:
                self.state.waiting.add(request)
        while self._changes and self._changes[0][0] <= self.now:
            self.settings = self.settings.updated(self._changes.pop(0)[1])
            self.scheduler.update(self.settings)
        self.learning.advance(self.now)
        self.state.finetune = self.learning.step

    @property
    def _next_arrival(self) -> float:
        """When the next request comes."""
        return self._coming[self._came].arrival if self._came < len(self._coming) else math.inf

    @property
    def _next_event(self) -> float:
        """When something comes from outside."""
        return min(self._next_arrival, self.learning.next_at,
                   self._changes[0][0] if self._changes else math.inf)

    def _wait(self, plan: Plan, until: float) -> None:
        then = min(self._next_event, math.inf if plan.wake_at is None else plan.wake_at,
                   until if until > self.now else math.inf)
        if not self.now < then < math.inf:
            raise Stuck(f'nothing will happen after {self.now:.6g} s: '
                        f'{len(self.state.waiting)} wait, {len(self.state.running)} run')
        self.now = then

    def _learning_makes_room(self) -> bool:
        """Let the step give up the KV blocks with which it rides; return whether it had any."""
        step = self.learning.step
        if step is None or not self._riding:
            return False
        self.pool.release(self._riding)
        step.stop_riding()
        return True

    def _reject(self, request: Request) -> None:
        request.state = RequestState.FINISHED
        self.rejected.append(request)

    # -- an iteration ------------------------------------------------------------------

    def _execute(self, plan: Plan) -> None:
        began, pass_s, count = self.now, 0.0, 1
        step = self.learning.step
        self.kv_cache.begin(plan, self.now)
        if plan.finetune_tokens and step is not None:
            self._hold_blocks(step)
        if plan.has_pass:
            if self._may_repeat(plan):
                pass_s, count = self._repeat(plan)
            else:
                self.now += self._overhead_s
                pass_s = self.device.run(plan.shape)
                self.now += pass_s
                self._commit(plan)      # tokens go out before the segments run
            if plan.finetune_tokens and step is not None:
                step.piggybacked(plan.finetune_tokens)
                if not step.is_riding:
                    self.pool.release(self._riding)
        else:
            self.now += self._overhead_s
        segments = self._run_segments(plan, step) if plan.segments and step is not None else ()
        self.iterations += count
        self.scheduler.observe(Measurement(plan, pass_s, segments), self.now)
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

    def _hold_blocks(self, step: VirtualStep) -> None:
        """Take KV blocks for the tokens of a forward that begins to ride."""
        if not step.ridden:
            self._riding = self.pool.allocate(step.tokens)

    def _commit(self, plan: Plan) -> None:
        for request in plan.decode:
            self._token(request, 1)
        for chunk in plan.prefill:
            self._token(chunk.request, chunk.tokens)

    def _token(self, request: Request, computed: int) -> None:
        """Note that ``computed`` more tokens are; sample the next one if all are."""
        self.kv_cache.computed(request, computed)
        if request.remaining_tokens:
            return
        request.output_tokens += 1
        request.last_token_at = self.now
        if request.first_token_at is None:
            request.first_token_at = self.now
        if request.output_tokens == request.max_tokens:
            self._finish(request)

    def _finish(self, request: Request) -> None:
        self.kv_cache.leave(request)
        self.finished.append(request)

    # -- many iterations at once ---------------------------------------------------------

    def _may_repeat(self, plan: Plan) -> bool:
        """Return whether the same rows would be planned again until something happens."""
        if (not self._skips or plan.prefill or plan.segments or plan.finetune_tokens
                or plan.rejected or plan.preempted or len(plan.decode) < len(self.state.running)):
            return False
        waiting = self.state.waiting
        if not waiting:
            return True
        # Those who wait must wait on: there is no row, or no room in the KV cache, for them.
        if self.settings.slo.admission == 'reject':
            return False
        if len(plan.decode) >= self.settings.scheduler.max_requests:
            return True
        # The rows keep a block each, and what is free gets less.
        unclaimed = self.pool.free_blocks - len(plan.decode)
        return all(admission_blocks(request) > unclaimed for request in waiting)

    def _repeat(self, plan: Plan) -> tuple[float, int]:
        """Run passes of the same rows until something may change; return seconds and count."""
        rows = len(plan.decode)
        most = self._passes_in_memory(
            plan.decode, min([r.max_tokens - r.output_tokens for r in plan.decode]))
        ends = min(self._next_event, self.scheduler.quiet_until(self.state, self.now))
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
            if count == most or now >= ends:
                break
        self.now = now
        for request in plan.decode:
            self.pool.grow(request.blocks, request.computed_tokens + count)
            # A row decodes: all of its tokens but the newest are computed.
            self.kv_cache.computed(request, count)
            request.output_tokens += count
            request.last_token_at = now
            if request.output_tokens == request.max_tokens:
                self._finish(request)
        return spent, count

    def _passes_in_memory(self, rows: Sequence[Request], most: int) -> int:
        """Return how many passes, up to ``most``, these rows run before they lack KV blocks."""
        free, size = self.pool.free_blocks, self.pool.block_size
        # What the first pass needs was given already.
        low, high = 1, most
        while low < high:
            middle = (low + high + 1) // 2
            growth = sum([max(-(-(r.computed_tokens + middle) // size) - len(r.blocks), 0)
                          for r in rows])
            if growth <= free:
                low = middle
            else:
                high = middle - 1
        return low
