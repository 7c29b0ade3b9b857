# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""One replay: simulates a load on a device, for one model and one policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
import json
import math
from pathlib import Path
from typing import Any

from mace_ros.api.settings import Settings
from mace_ros.scheduling.cost_file import from_dict
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.plan import Plan, SegmentKind
from mace_ros.scheduling.request import Request
from mace_ros.scheduling.scheduler import Scheduler
from mace_ros.simulation.arrival_trace import Arrival
from mace_ros.simulation.devices import DeviceProfile, DEVICES
from mace_ros.simulation.models import MODELS, ModelShape
from mace_ros.simulation.roofline import DeviceTimes, Measured, Roofline, SteadyCost
from mace_ros.simulation.virtual_engine import IterationRecord, VirtualEngine
from mace_ros.simulation.virtual_learning import (
    AlwaysPending,
    CorrectionLearning,
    Learned,
    LearningSource,
    MAX_STEP_TOKENS,
    Mistakes,
    NoLearning,
    VirtualStep,
)

SHARES = 200     # intervals of the plot of the device's shares

# Bytes of a fine-tune step for each token and unit of width, beside the layers' bfloat16 inputs:
# the float32 autograd graph of one layer.
STEP_BYTES = 24.0


class DoesNotFit(ValueError):
    """The model does not fit into the device's memory; the message gives the sizes."""


@dataclass(frozen=True)
class Load:
    """Arrivals and learning: ``learning`` is 'corrections', 'always' or 'none'."""

    arrivals: Sequence[Arrival]
    learning: str = 'corrections'
    mistakes: Mistakes = field(default_factory=Mistakes)
    sample_tokens: int = 256     # of a fine-tune step, with 'always'
    seed: int = 0


@dataclass(frozen=True)
class HostTimes:
    """Seconds of the host beside the device's: per iteration, and per arriving request."""

    overhead_s: float = 0.0
    admission_s: float = 0.0


@dataclass(frozen=True)
class Target:
    """
    The simulated device and model.

    With ``calibration``, a file written by :mod:`bench.simulation`, the device is this machine.
    """

    device: str
    model: str
    mode: str = 'maxn'
    weight_bytes: float = 2.0
    calibration: Path | None = None

    def times(self, settings: Settings, seed: int) -> tuple[DeviceTimes, CostModel, HostTimes]:
        """Return the device's times, the cost model to plan with, and the host's times."""
        if self.calibration is not None:
            data = json.loads(self.calibration.read_text())
            known, cost = (from_dict(SteadyCost, data['cost_model']) for _ in range(2))
            return Measured(
                known, layers=MODELS[self.model].layers, pass_ratios=data['pass_ratios'],
                segment_ratios=data['segment_ratios'], seed=seed), cost, HostTimes(
                    data['overhead_s'], data['admission_s'])
        device = Roofline(DEVICES[self.device], MODELS[self.model], mode=self.mode,
                          weight_bytes=self.weight_bytes, rank=settings.adapter.rank)
        return device, SteadyCost.of(
            device, max_tokens=settings.scheduler.max_batch_tokens), HostTimes()

    def check_memory(self, settings: Settings) -> None:
        """Raise :class:`DoesNotFit` if weights, KV cache and a fine-tune step are too large."""
        if self.calibration is None:
            check_memory(DEVICES[self.device], MODELS[self.model], settings, self.weight_bytes)


def memory_gb(model: ModelShape, settings: Settings, weight_bytes: float) -> dict[str, float]:
    """Return the memory of each part, in GB."""
    lora = model.layers * model.lora_parameters(settings.adapter.rank)
    tokens = settings.finetune.max_sample_tokens
    return {name: count / 1e9 for name, count in {
        'weights': model.parameters * weight_bytes,
        'KV cache': settings.memory.kv_cache_tokens * model.layers * 4.0 * model.kv_width,
        # Master weights with two moments and a gradient, and a copy for each slot.
        'adapters': lora * (16.0 + 2.0 * (settings.adapter.slots + 2)),
        'fine-tune step': tokens * (model.hidden + model.intermediate) * (
            2.0 * model.layers + STEP_BYTES)}.items()}


def check_memory(device: DeviceProfile, model: ModelShape, settings: Settings,
                 weight_bytes: float) -> None:
    """Raise :class:`DoesNotFit` if a model with these settings does not fit on a device."""
    parts = memory_gb(model, settings, weight_bytes)
    usable = device.memory_gb.value * device.usable_share.value
    if sum(parts.values()) > usable:
        listed = ', '.join(f'{name} {gb:.1f}' for name, gb in parts.items())
        raise DoesNotFit(
            f'{model.name} takes {sum(parts.values()):.1f} GB ({listed}), {device.name} has '
            f'{usable:.1f} GB for it: fewer memory.kv_cache_tokens, or smaller weights')


@dataclass
class Outcome:
    """The result of a replay; times in seconds."""

    policy: str
    load: float                     # factor to the load asked for
    arrivals: int
    ends_at: float
    requests: list[Request]         # answered ones, by arrival
    rejected: int
    stages: dict[str, float]        # device time of prefill, decode and finetune
    shares: dict[str, list[float]]  # serving and learning, by interval
    learned: list[Learned]
    finetune_tokens: float
    finetune_steps: int
    iterations: int
    plans: int
    late_for_learning: int


class Recorder:
    """Accounts for the device time of a replay while it runs."""

    def __init__(self, device: DeviceTimes, interval_s: float) -> None:
        """Record shares over intervals of ``interval_s``."""
        self._device, self._interval_s = device, interval_s
        self.stages = dict.fromkeys(('prefill', 'decode', 'finetune'), 0.0)
        self._serving: dict[int, float] = {}
        self._learning: dict[int, float] = {}
        self.plans = 0

    def on_plan(self, plan: Plan) -> None:
        """Count a plan."""
        self.plans += 1

    def on_iteration(self, iteration: IterationRecord) -> None:
        """Account for an iteration."""
        shape, pass_s = iteration.plan.shape, iteration.pass_s
        decode = pass_s
        if shape.prefill_tokens or shape.finetune_tokens:
            # Rows pay for a pass of their own, prompts for the time that they add to it, and
            # fine-tune tokens for the rest.
            seconds = self._device.seconds
            whole = seconds(shape)
            without = shape._replace(finetune_tokens=0)
            serving = seconds(without) if without.tokens else 0.0
            rows = (seconds(shape._replace(prefill_tokens=0, prefill_context=0,
                                           finetune_tokens=0)) if shape.decode_rows else 0.0)
            decode = pass_s * min(rows / whole, 1.0)
            self.stages['prefill'] += pass_s * max(serving - rows, 0.0) / whole
            self.stages['finetune'] += pass_s * max(whole - serving, 0.0) / whole
            pass_s *= min(serving / whole, 1.0)
        self.stages['decode'] += decode
        self.stages['finetune'] += iteration.segments_s
        began = iteration.began
        self._spread(self._serving, began, began + pass_s)
        began += iteration.pass_s
        self._spread(self._learning, began - (iteration.pass_s - pass_s),
                     began + iteration.segments_s)

    def _spread(self, sums: dict[int, float], begin: float, end: float) -> None:
        interval_s = self._interval_s
        index = int(begin / interval_s)
        while begin < end:
            stop = min((index + 1) * interval_s, end)
            sums[index] = sums.get(index, 0.0) + stop - begin
            begin, index = stop, index + 1

    def shares(self, ends_at: float) -> dict[str, list[float]]:
        """Return the device's shares by interval; the last interval ends at ``ends_at``."""
        count = max(math.ceil(ends_at / self._interval_s), 1)
        lengths = [min(self._interval_s, max(ends_at - i * self._interval_s, 1e-9))
                   for i in range(count)]
        return {name: [min(sums.get(i, 0.0) / lengths[i], 1.0) for i in range(count)]
                for name, sums in (('serving', self._serving), ('learning', self._learning))}


def replay(target: Target, settings: Settings, policy: str, load: Load, *, factor: float = 1.0,
           skips: bool = True, on_progress: Callable[[int], object] | None = None) -> Outcome:
    """
    Replay a load under a policy.

    ``factor`` is recorded as the load's. ``on_progress`` is called from time to time with the
    number of requests answered since its last call.
    """
    settings = settings.updated({'scheduler.policy': policy})
    target.check_memory(settings)
    device, cost, host = target.times(settings, load.seed)
    slo = settings.slo
    requests = [Request(
        id=str(number), arrival=each.at, prompt_tokens=each.prompt_tokens,
        max_tokens=each.output_tokens, ttft_slo=slo.ttft_ms / 1e3, tpot_slo=slo.tpot_ms / 1e3)
        for number, each in enumerate(load.arrivals)]
    last = requests[-1].arrival if requests else 0.0
    recorder = Recorder(device, max(last / SHARES, 1.0))
    learning = _learning(load, settings, device, cost)
    reported = 0

    def on_plan(plan: Plan) -> None:
        nonlocal reported
        recorder.on_plan(plan)
        if on_progress is not None and recorder.plans % 256 == 0:
            done = len(engine.finished) + len(engine.rejected)
            on_progress(done - reported)
            reported = done

    engine = VirtualEngine(
        Scheduler(settings, cost), device, settings, learning, overhead_s=host.overhead_s,
        admission_s=host.admission_s, skips=skips, on_plan=on_plan,
        on_iteration=recorder.on_iteration)
    engine.run(requests, until=last)
    if on_progress is not None:
        on_progress(len(requests) - reported)
    statistics = engine.scheduler.statistics(engine.now)
    step = learning.step
    left = step.progress * step.tokens if step is not None else 0.0
    return Outcome(
        policy=policy, load=factor, arrivals=len(requests), ends_at=engine.now,
        requests=sorted(engine.finished, key=lambda r: r.arrival),
        rejected=len(engine.rejected), stages=recorder.stages, shares=recorder.shares(engine.now),
        learned=_learned(learning), finetune_tokens=statistics.finetune_tokens + left,
        finetune_steps=statistics.finetune_steps, iterations=engine.iterations,
        plans=recorder.plans, late_for_learning=statistics.late_for_learning)


def _learning(load: Load, settings: Settings, device: DeviceTimes,
              cost: CostModel) -> LearningSource:
    if load.learning == 'none':
        return NoLearning()
    recompute = settings.finetune.recompute
    if load.learning == 'always':
        return AlwaysPending(lambda now: VirtualStep(
            device.layers, load.sample_tokens, learned=load.sample_tokens - 1,
            oldest_correction_at=now, may_piggyback=recompute != 'never',
            keep_graphs=recompute != 'always'))
    return CorrectionLearning(
        load.mistakes.corrections(load.arrivals, load.seed), layers=device.layers,
        tokens_within=partial(
            cost.tokens_within, SegmentKind.BACKWARD_RECOMPUTED,
            settings.finetune.max_blocking_ms / 1e3, MAX_STEP_TOKENS),
        replay_samples=settings.finetune.replay_samples, recompute=recompute)


def _learned(learning: LearningSource) -> list[Learned]:
    """Return all corrections that arrived, with the time at which each one went live."""
    if not isinstance(learning, CorrectionLearning):
        return []
    return [*learning.learned, *(Learned(c) for c in learning.unlearned)]


def summary(outcome: Outcome) -> dict[str, Any]:
    """Return the numbers of a replay, in the units that their names say."""
    done = outcome.requests
    ttft = [r.first_token_at - r.arrival for r in done if r.first_token_at is not None]
    tpot = [tpot_s(r) for r in done if r.output_tokens > 1]
    met = sum(r.slo_met for r in done)
    # The age of a correction that is not live yet counts up to the end of the replay.
    ages = [min(each.live_at, outcome.ends_at) - each.correction.at for each in outcome.learned]
    busy = sum(outcome.stages.values()) / outcome.ends_at if outcome.ends_at else 0.0
    return {
        'policy': outcome.policy, 'load': outcome.load, 'requests': outcome.arrivals,
        'rejected': outcome.rejected,
        'ttft_ms': {f'p{p}': 1e3 * quantile(ttft, p) for p in (50, 95, 99)},
        'ttft_mean_ms': 1e3 * mean(ttft),
        'tpot_ms': {f'p{p}': 1e3 * quantile(tpot, p) for p in (50, 95, 99)},
        'tpot_mean_ms': 1e3 * mean(tpot),
        'slo_attainment': met / outcome.arrivals if outcome.arrivals else math.nan,
        'utilisation': busy, 'ends_at_s': outcome.ends_at,
        'stages_s': outcome.stages,
        'finetune_tokens': outcome.finetune_tokens,
        'finetune_tokens_per_s': outcome.finetune_tokens / max(outcome.ends_at, 1e-9),
        'finetune_steps': outcome.finetune_steps,
        'corrections': len(outcome.learned),
        'corrections_learned': sum(math.isfinite(each.live_at) for each in outcome.learned),
        'freshness_s': {'mean': mean(ages), 'p95': quantile(ages, 95)},
        'late_for_learning': outcome.late_for_learning,
        'iterations': outcome.iterations, 'plans': outcome.plans}


def tpot_s(request: Request) -> float:
    """Return the mean time per output token after the first one."""
    assert request.first_token_at is not None and request.last_token_at is not None
    return (request.last_token_at - request.first_token_at) / max(request.output_tokens - 1, 1)


def mean(values: Sequence[float]) -> float:
    """Return the mean; NaN if there are no values."""
    return math.fsum(values) / len(values) if values else math.nan


def quantile(values: Sequence[float], percent: float) -> float:
    """Return a percentile, interpolated linearly; NaN if there are no values."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    position = (len(ordered) - 1) * percent / 100.0
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
