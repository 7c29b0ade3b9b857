# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A device with noise for the simulator's engine, and an engine that checks each plan."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
import math
import random

from mace_ros.api.settings import Settings
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.plan import Measurement, PassShape, Plan, Segment, SegmentKind
from mace_ros.scheduling.request import Request, RequestState
from mace_ros.scheduling.scheduler import Scheduler
from mace_ros.simulation.virtual_engine import IterationRecord, VirtualEngine
from mace_ros.simulation.virtual_learning import AlwaysPending, NoLearning, VirtualStep

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


@dataclass
class FixedCache:
    """A KV cache of a fixed size that shares no blocks, and records the lookups."""

    free_tokens: int = 0
    capacity_tokens: int = 65536
    looked_up: list[Request] = field(default_factory=list)

    def blocks_freed_by(self, request: Request) -> int:
        return len(request.blocks)

    def get_computed_blocks(self, request: Request) -> list[int]:
        self.looked_up.append(request)
        return []


class VirtualDevice:
    """Times of a pass and of segments, with seeded noise and outliers."""

    layers = LAYERS

    def __init__(self, *, curve=CPU_PASS, segment=None, scale=1.0, noise=0.0, outliers=0.0, seed=0):
        self.curve = curve
        self.segment = segment or (CPU_SEGMENT if curve is CPU_PASS else GPU_SEGMENT)
        self.scale = scale     # may be changed while it runs: a hot chip, another process
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
    """Return the time that attention adds: for 1000 tokens, a tenth of a pass of one token."""
    return curve[0][1] / 1e3 * 1e-4 * (shape.decode_context + 0.1 * shape.prefill_context)


def shapes(count: int, seed: int) -> Iterator[PassShape]:
    """Yield passes as in serving: runs of decode passes, and sometimes a prefill."""
    draw = random.Random(seed)
    made = 0
    while made < count:
        rows = draw.choice([1, 1, 2, 3, 5, 8, 16])
        context = sum(draw.randint(20, 1500) for _ in range(rows))
        prefill = draw.choice([0, 0, 16, 50, 64, 100, 200])
        before = draw.choice([0, 0, 500])
        finetune = draw.choice([0, 0, 0, 24, 100]) if prefill < 100 else 0
        for step in range(1 if prefill else 8):
            yield PassShape(rows, context + step * rows, prefill,
                            prefill * before + prefill * (prefill + 1) // 2, finetune)
            made += 1


def observe(cost: CostModel, what: PassShape | Segment, seconds: float) -> None:
    """Let a cost model learn the time of one pass or segment."""
    if isinstance(what, Segment):
        cost.observe(Measurement(Plan(segments=1), segments=((what, seconds),)))
    else:
        cost.observe(Measurement(Plan(shape=what), seconds))


def new_step(arrived: float = 0.0, *, recompute: bool = False) -> VirtualStep:
    """Return a new fine-tune step."""
    return VirtualStep(
        LAYERS, STEP_TOKENS, oldest_correction_at=arrived, keep_graphs=not recompute)


def undivided_step_s(device: VirtualDevice) -> float:
    """Return the time of an undivided step, which is slightly faster than its segments."""
    return 0.95 * sum(device.seconds(s) for s in new_step().segments())


class CheckedEngine(VirtualEngine):
    """Checks and records each plan, and how long queries wait for learning."""

    def __init__(self, scheduler: Scheduler, device: VirtualDevice, settings: Settings, *,
                 learns: bool = True, correction_at: float = 0.0, recompute: bool = False):
        self.recompute = recompute      # of later steps
        learning = AlwaysPending(lambda now: new_step(correction_at, recompute=self.recompute))
        super().__init__(
            scheduler, device, settings, learning if learns else NoLearning(), skips=False,
            on_plan=self._planned, on_iteration=self._ran)
        self.steps = learning.steps
        self.plans: list[tuple[float, Plan]] = []
        self.segment_s: list[float] = []          # of each plan, as measured
        self.learning_waits: list[float] = []     # of queries that arrived during learning
        self._waited: set[Request] = set()
        self._queries: list[Request] = []         # by arrival

    def run(self, requests: Sequence[Request], until=-math.inf, changes=()) -> None:
        self._queries = sorted(requests, key=lambda r: r.arrival)
        super().run(requests, until, changes)

    @property
    def blocks_of_step(self) -> int:
        """KV blocks that a step holds while its forward piggybacks."""
        return len(self._step_blocks)

    def _planned(self, plan: Plan) -> None:
        self._check(plan)
        self.plans.append((self.now, plan))
        self.segment_s.append(0.0)

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
            assert plan.finetune_tokens <= step.piggyback_tokens
            assert plan.segments <= len(list(step.segments()))
        assert not (plan.segments and plan.finetune_tokens)

    def _ran(self, iteration: IterationRecord) -> None:
        self.segment_s[-1] = iteration.segments_s
        since = now = iteration.began + iteration.pass_s
        for _, seconds in iteration.segments:
            now += seconds
            if iteration.plan.interruptible:
                self._note_waits(since, now)
                since = now
        self._note_waits(since, now)

    def _note_waits(self, since: float, now: float) -> None:
        """Record how long queries that arrived before ``now`` waited for learning."""
        planned_at, _ = self.plans[-1]      # queries that came before that are in the plan
        later = bisect_right(self._queries, planned_at, key=lambda r: r.arrival)
        for request in self._queries[later:]:
            if request.arrival > now:
                break
            if request not in self._waited and now > since:
                self._waited.add(request)
                self.learning_waits.append(now - max(request.arrival, since))

    @property
    def finished_steps(self) -> int:
        return sum(not step.left for step in self.steps)

    @property
    def learned_steps(self) -> float:
        """Completed steps, with the completed part of the current one by device time."""
        last = self.steps[-1]
        done = sum(self.device.seconds(s) for s in last.done)
        left = sum(self.device.seconds(s) for s in last.left)
        return self.finished_steps + (done / (done + left) if last.left else 0.0)


def query(number: int, arrival: float, *, prompt=64, answer=32, ttft=0.5, tpot=0.1,
          priority=0) -> Request:
    """Return a request whose answer has ``answer`` tokens."""
    return Request(id=str(number), arrival=arrival, prompt_tokens=prompt, max_tokens=answer,
                   ttft_slo=ttft, tpot_slo=tpot, priority=priority)


def poisson(count: int, rate: float, seed: int, **kinds) -> list[Request]:
    """Return ``count`` requests of a Poisson process at ``rate`` per second."""
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
           values=None, changes=(), **kinds) -> CheckedEngine:
    """Return an engine that has served ``requests`` by ``policy``."""
    settings = Settings().updated({'scheduler.policy': policy, **(values or {})})
    device = device or VirtualDevice(noise=0.05, outliers=0.01)
    engine = CheckedEngine(
        Scheduler(settings, device.calibrated()), device, settings, **kinds)
    engine.run(requests, until, changes)
    return engine
