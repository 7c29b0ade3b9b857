# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A device and an engine that only take time, on a clock of their own."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
import math
import random

from mace_ros.memory.block_pool import BlockPool
from mace_ros.scheduling.batching import BLOCK_TOKENS
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.plan import (
    Measurement,
    PassShape,
    Plan,
    Segment,
    SegmentKind,
    State,
)
from mace_ros.scheduling.request import Request, RequestState
from mace_ros.scheduling.residence import Residence
from mace_ros.scheduling.scheduler import Scheduler
from mace_ros.settings import Settings

LAYERS = 30
STEP_TOKENS = 128
HEAD_TOKENS = 16

# ms by tokens, as measured with SmolLM2-135M in fp32 on two cores; bumps included.
CPU_PASS = ((1, 25.0), (2, 37.0), (8, 30.0), (32, 50.0), (64, 80.0), (128, 140.0), (256, 270.0),
            (65536, 69000.0))
# Weight-bound up to 200 tokens, then compute-bound: an 8B model on a large GPU.
GPU_PASS = ((1, 8.4), (200, 8.8), (65536, 2870.0))
CPU_SEGMENT = {   # seconds per token of the segment
    SegmentKind.FORWARD: 14e-3 / 128, SegmentKind.HEAD: 159e-3 / 128,
    SegmentKind.BACKWARD: 22.6e-3 / 128, SegmentKind.BACKWARD_RECOMPUTED: 37e-3 / 128,
    SegmentKind.OPTIMIZER: 30e-3 / 128}
GPU_SEGMENT = {
    SegmentKind.FORWARD: 0.3e-3 / 128, SegmentKind.HEAD: 1.5e-3 / 128,
    SegmentKind.BACKWARD: 0.45e-3 / 128, SegmentKind.BACKWARD_RECOMPUTED: 0.75e-3 / 128,
    SegmentKind.OPTIMIZER: 1e-3 / 128}


class VirtualDevice:
    """Times of a pass and of segments, with seeded noise and outliers."""

    def __init__(self, *, curve=CPU_PASS, segment=None, scale=1.0, noise=0.0, outliers=0.0, seed=0):
        self.curve = curve
        self.segment = segment or (CPU_SEGMENT if curve is CPU_PASS else GPU_SEGMENT)
        self.scale = scale     # may be changed while it runs: a hot chip, a neighbour
        self.noise = noise
        self.outliers = outliers
        self._random = random.Random(seed)

    def seconds(self, what: PassShape | Segment) -> float:
        """Return the time without noise."""
        if isinstance(what, Segment):
            return self.scale * self.segment[what.kind] * what.tokens
        knots = [tokens for tokens, _ in self.curve]
        i = min(bisect_right(knots, what.tokens), len(knots) - 1)
        (low, start), (high, end) = self.curve[i - 1:i + 1]
        seconds = (start + (end - start) * (what.tokens - low) / (high - low)) / 1e3
        seconds += seconds_of_context(self.curve, what)
        return self.scale * seconds

    def run(self, what: PassShape | Segment) -> float:
        """Return the time with noise."""
        seconds = self.seconds(what) * math.exp(self._random.gauss(0.0, self.noise))
        if self._random.random() < self.outliers:
            seconds *= self._random.uniform(2.0, 6.0)
        return seconds

    def calibrated(self) -> CostModel:
        """Return a cost model that was calibrated on this device."""
        cost = CostModel()
        shapes: list[PassShape | Segment] = [
            PassShape(prefill_tokens=1 << k, prefill_context=1 << 2 * k >> 1) for k in range(9)]
        shapes += [PassShape(rows, rows * context) for rows in (1, 16) for context in (32, 1024)]
        shapes.append(PassShape(prefill_tokens=128, prefill_context=128 * 1024))
        shapes += [Segment(kind, STEP_TOKENS) for kind in SegmentKind]
        shapes.append(Segment(SegmentKind.HEAD, HEAD_TOKENS))
        cost.calibrate((shape, self.run(shape)) for shape in shapes for _ in range(3))
        return cost


def seconds_of_context(curve, shape: PassShape) -> float:
    """Attending to a thousand tokens costs a tenth of a pass of one token."""
    return curve[0][1] / 1e3 * 1e-4 * (shape.decode_context + 0.1 * shape.prefill_context)


class VirtualStep:
    """A fine-tune step as execution has it: its forward rides, or runs layer by layer."""

    def __init__(self, number: int, arrived: float, tokens=STEP_TOKENS, recompute=False):
        self.number = number
        self.oldest_correction_at = arrived
        self.tokens = tokens
        self.ridden = 0
        self.done: list[Segment] = []
        backward = SegmentKind.BACKWARD_RECOMPUTED if recompute else SegmentKind.BACKWARD
        self.left = (
            [Segment(SegmentKind.FORWARD, tokens)] * LAYERS
            + [Segment(SegmentKind.HEAD, HEAD_TOKENS)] * (tokens // HEAD_TOKENS)
            + [Segment(backward, tokens)] * LAYERS
            + [Segment(SegmentKind.OPTIMIZER, tokens)])

    @property
    def ridable_tokens(self) -> int:
        return 0 if self.done else self.tokens - self.ridden

    def segments(self) -> Iterator[Segment]:
        return iter(() if 0 < self.ridden < self.tokens else self.left)

    def rode(self, tokens: int) -> None:
        assert 0 < tokens <= self.ridable_tokens
        self.ridden += tokens
        if self.ridden == self.tokens:
            again = Segment(SegmentKind.BACKWARD_RECOMPUTED, self.tokens)
            self.left = [again if s.kind is SegmentKind.BACKWARD else s for s in self.left
                         if s.kind is not SegmentKind.FORWARD]

    def run(self) -> Segment:
        assert not 0 < self.ridden < self.tokens
        segment = self.left.pop(0)
        self.done.append(segment)
        return segment


def undivided_step_s(device: VirtualDevice) -> float:
    """Return the time of a whole step, which one call computes a little faster."""
    return 0.95 * sum(device.seconds(s) for s in VirtualStep(0, 0.0).segments())


@dataclass
class VirtualEngine:
    """Plans, runs and commits on a clock of its own, and checks each plan on the way."""

    scheduler: Scheduler
    device: VirtualDevice
    settings: Settings = field(default_factory=Settings)
    learns: bool = True
    now: float = 0.0
    steps: list[VirtualStep] = field(default_factory=list)
    plans: list[tuple[float, Plan]] = field(default_factory=list)
    segment_s: list[float] = field(default_factory=list)   # of each plan, as measured
    finished: list[Request] = field(default_factory=list)
    rejected: list[Request] = field(default_factory=list)
    learning_waits: list[float] = field(default_factory=list)   # of queries that met it
    correction_at: float = 0.0
    recompute: bool = False

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.settings.memory.kv_cache_tokens // BLOCK_TOKENS, BLOCK_TOKENS)
        self.state = State()
        self.residence = Residence(self.pool, self.state)
        self._coming: list[Request] = []
        if self.learns:
            self._next_step()

    def _next_step(self) -> None:
        step = VirtualStep(len(self.steps), self.correction_at, recompute=self.recompute)
        self.steps.append(step)
        self.state.finetune = step

    def run(self, requests: Sequence[Request], until: float = -math.inf,
            changes: Sequence[tuple[float, dict]] = ()) -> None:
        """
        Serve ``requests`` until all are answered, and go on until the time ``until``.

        ``changes`` are settings that come into force on the way, in order of time.
        """
        self._coming = sorted(requests, key=lambda r: r.arrival)
        to_answer = len(self.finished) + len(self.rejected) + len(requests)
        changes = list(changes)
        while True:
            if len(self.finished) + len(self.rejected) == to_answer and self.now >= until:
                return
            self._take_arrivals()
            while changes and changes[0][0] <= self.now:
                self.settings = self.settings.updated(changes.pop(0)[1])
                self.scheduler.update(self.settings)
            self.residence.refresh()
            plan = self.scheduler.plan(self.state, self.now)
            self._check(plan)
            self.plans.append((self.now, plan))
            self.segment_s.append(0.0)
            self._reject(plan)
            if plan.is_empty:
                soon = [r.arrival for r in self._coming[:1]] + [t for t, _ in changes[:1]]
                if plan.wake_at is not None:
                    soon.append(plan.wake_at)
                if until > self.now:
                    soon.append(until)
                then = min(soon, default=self.now)
                assert then > self.now or plan.rejected, f'stuck at {self.now}: {self.state}'
                self.now = max(then, self.now)
                continue
            self._execute(plan)

    def _take_arrivals(self) -> None:
        while self._coming and self._coming[0].arrival <= self.now:
            self.state.waiting.append(self._coming.pop(0))

    def _check(self, plan: Plan) -> None:
        limits = self.settings.scheduler
        chunks = [c.request for c in plan.prefill]
        busy = [*plan.decode, *chunks]
        assert len(set(busy)) == len(busy), 'a request is planned twice'
        assert not set(busy) & {r.request for r in plan.rejected}
        assert all(r.is_decoding and r in self.state.running for r in plan.decode)
        assert all(r in self.state.running or r in self.state.waiting for r in chunks)
        assert all(0 < c.tokens <= c.request.remaining_tokens for c in plan.prefill)
        tokens = len(plan.decode) + sum(c.tokens for c in plan.prefill) + plan.finetune_tokens
        assert tokens == plan.shape.tokens <= limits.max_batch_tokens
        assert len(plan.decode) <= limits.max_requests
        admitted = [r for r in chunks if r.state is RequestState.WAITING]
        assert not admitted or len(self.state.running) + len(admitted) <= limits.max_requests
        assert not (plan.preempted and admitted)
        assert not set(plan.preempted) & set(busy)
        assert all(r in self.state.running for r in plan.preempted)
        step = self.state.finetune
        if step is None:
            assert not plan.segments and not plan.finetune_tokens
        else:
            assert plan.finetune_tokens <= step.ridable_tokens
            assert plan.segments <= len(list(step.segments()))
        assert not (plan.segments and plan.finetune_tokens)

    def _reject(self, plan: Plan) -> None:
        for rejection in plan.rejected:
            self.residence.leave(rejection.request)
            self.rejected.append(rejection.request)

    def _execute(self, plan: Plan) -> None:
        pass_s = 0.0
        self.residence.begin(plan, self.now)     # raises if the blocks don't suffice
        if plan.has_pass:
            pass_s = self.device.run(plan.shape)
            self.now += pass_s
            self._commit(plan)   # tokens go out before the segments run
        step = self.state.finetune
        ran: list[tuple[Segment, float]] = []
        learning_since = self.now
        if plan.finetune_tokens:
            step.rode(plan.finetune_tokens)
        for _ in range(plan.segments):
            if plan.interruptible and self._coming and self._coming[0].arrival <= self.now:
                break
            segment = step.run()
            seconds = self.device.run(segment)
            self.now += seconds
            ran.append((segment, seconds))
            if plan.interruptible:
                self._note_waits(learning_since)
                learning_since = self.now
        self._note_waits(learning_since)
        self.segment_s[-1] = sum(seconds for _, seconds in ran)
        self.scheduler.observe(Measurement(plan, pass_s, tuple(ran)), self.now)
        if step is not None and not step.left:
            self._next_step()

    def _note_waits(self, since: float) -> None:
        """Note how long the queries that came have waited for learning that began ``since``."""
        for request in self._coming:
            if request.arrival > self.now:
                break
            if request.started_at is None and self.now > since:
                request.started_at = self.now
                self.learning_waits.append(self.now - max(request.arrival, since))

    def _commit(self, plan: Plan) -> None:
        for request, tokens in [*((r, 1) for r in plan.decode),
                                *((c.request, c.tokens) for c in plan.prefill)]:
            self.residence.computed(request, tokens)
            if request.remaining_tokens:
                continue
            request.output_tokens += 1
            request.last_token_at = self.now
            if request.first_token_at is None:
                request.first_token_at = self.now
            if request.output_tokens == request.max_tokens:
                self.residence.leave(request)
                self.finished.append(request)

    @property
    def finished_steps(self) -> int:
        return sum(not step.left for step in self.steps)

    @property
    def learned_steps(self) -> float:
        """Steps with the finished part of the one that goes on, by device time."""
        last = self.steps[-1]
        done = sum(self.device.seconds(s) for s in last.done)
        left = sum(self.device.seconds(s) for s in last.left)
        return self.finished_steps + (done / (done + left) if last.left else 0.0)


def query(number: int, arrival: float, *, prompt=64, answer=32, ttft=0.5, tpot=0.1,
          priority=0) -> Request:
    """Return a request that is answered with ``answer`` tokens."""
    return Request(id=str(number), arrival=arrival, prompt_tokens=prompt, max_tokens=answer,
                   ttft_slo=ttft, tpot_slo=tpot, priority=priority)


def poisson(count: int, rate: float, seed: int, **kinds) -> list[Request]:
    """Return ``count`` queries at ``rate`` per second."""
    draw = random.Random(seed)
    arrival, result = 0.0, []
    for number in range(count):
        arrival += draw.expovariate(rate)
        result.append(query(number, arrival, **kinds))
    return result


def ttft(request: Request) -> float:
    return request.first_token_at - request.arrival


def tpot(request: Request) -> float:
    return (request.last_token_at - request.first_token_at) / max(request.output_tokens - 1, 1)


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(math.ceil(q * len(ordered)) - 1, len(ordered) - 1)]


def served(policy: str, requests: Sequence[Request], *, until=-math.inf, device=None,
           values=None, changes=(), **kinds) -> VirtualEngine:
    """Return the engine that served ``requests`` by ``policy``."""
    settings = Settings().updated({'scheduler.policy': policy, **(values or {})})
    device = device or VirtualDevice(noise=0.05, outliers=0.01)
    engine = VirtualEngine(
        Scheduler(settings, device.calibrated()), device, settings, **kinds)
    engine.run(requests, until, changes)
    return engine
