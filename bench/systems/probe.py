# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""An observer of the engine that records where its time goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
import math
import time

from bench.common.load import RequestTimes
from mace_ros.api.events import Event
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.plan import Measurement, Plan
from mace_ros.scheduling.request import Request
from mace_ros.telemetry.observer import IterationObserver

# The columns of an iteration in the JSON files, in this order.
COLUMNS = ('wall_ms', 'work_ms', 'plan_us', 'plan_cpu_us', 'predicted_ms', 'measured_ms',
           'in_flight', 'decode_rows', 'prefill_tokens', 'finetune_tokens', 'segments')

# Phases in which the device works or the engine waits for it; the rest is host overhead.
WORK_PHASES = frozenset({'pass', 'sample', 'wait'})
FINETUNE = 'fine-tune '     # the names of fine-tune phases begin with this


@dataclass(slots=True)
class IterationRecord:
    """
    Times of one iteration, in seconds, and the sizes of its parts.

    ``work_s`` is the time in the pass, in sampling and in fine-tune segments, and
    ``receive_s`` the time that admits requests. ``plan_cpu_s`` is the processor time of the plan,
    without preemption by other threads. ``predicted_s`` and ``measured_s`` are the
    cost model's prediction and the measurement of pass and segments together.
    """

    wall_s: float = 0.0
    work_s: float = 0.0
    receive_s: float = 0.0
    plan_s: float = 0.0
    plan_cpu_s: float = 0.0
    predicted_s: float = math.nan
    measured_s: float = 0.0
    in_flight: int = 0
    decode_rows: int = 0
    prefill_tokens: int = 0
    finetune_tokens: int = 0
    segments: int = 0

    def row(self) -> list[float]:
        """Return the values of :data:`COLUMNS`."""
        return [self.wall_s * 1e3, self.work_s * 1e3, self.plan_s * 1e6,
                self.plan_cpu_s * 1e6, self.predicted_s * 1e3, self.measured_s * 1e3,
                self.in_flight, self.decode_rows, self.prefill_tokens, self.finetune_tokens,
                self.segments]


@dataclass(slots=True)
class _TokenTimes:
    """When the tokens of a request reached the caller of ``Engine.step``."""

    arrival: float
    started: float
    first: float
    last: float = math.nan
    tokens: int = 0


@dataclass
class ProbeLog:
    """What a probe has recorded since :meth:`Probe.clear`."""

    iterations: list[IterationRecord] = field(default_factory=list)
    # Intervals of fine-tuning: begin, end, and its share of the device in between.
    finetuning: list[tuple[float, float, float]] = field(default_factory=list)
    tokens: dict[str, _TokenTimes] = field(default_factory=dict)

    @property
    def busy_s(self) -> float:
        """Seconds in which the device worked: passes and segments, without planning."""
        return sum(i.measured_s for i in self.iterations)

    def request_times(self, query_id: str, arrival: float) -> RequestTimes:
        """Return the times of a query that was due at ``arrival``."""
        seen = self.tokens[query_id]
        return RequestTimes(arrival, seen.started, seen.first, seen.last, seen.tokens)

    def finetune_wait_s(self, query_id: str) -> float:
        """Return how long fine-tuning ran between a query's arrival and its first pass."""
        seen = self.tokens[query_id]
        return sum(share * max(min(end, seen.started) - max(begin, seen.arrival), 0.0)
                   for begin, end, share in self.finetuning)


class Probe(IterationObserver):
    """
    Records iterations and tokens.

    An iteration may take several calls of ``Engine.step``: events are returned before the
    fine-tune segments run. Its record is complete once it was measured. Iterations that ran
    nothing are not recorded.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Read times from ``clock``, which must be the engine's."""
        self.log = ProbeLog()
        self._clock = clock
        self._current = IterationRecord()
        self._segments_left = False     # of the plan that was not measured yet
        self._pass = (0.0, 0.0)
        self._committed: list[Request] = []

    def clear(self) -> None:
        """Begin a new log."""
        self.log = ProbeLog()

    def phase(self, name: str, began: float, ended: float, values: Mapping[str, float]) -> None:
        """Add a phase to the current iteration."""
        current, seconds = self._current, ended - began
        if name == 'iteration':
            current.wall_s += seconds
        elif name == 'receive':
            current.receive_s += seconds
        elif name == 'plan':
            current.plan_s, current.plan_cpu_s = seconds, values['cpu_ms'] / 1e3
        elif name in WORK_PHASES:
            current.work_s += seconds
            if name == 'pass':
                self._pass = began, ended
        elif name.startswith(FINETUNE):
            current.work_s += seconds
            self.log.finetuning.append((began, ended, 1.0))

    def planned(self, plan: Plan, in_flight: int) -> None:
        """Note the number of requests in flight, and whether segments follow the pass."""
        self._current.in_flight = in_flight
        self._segments_left = plan.segments > 0

    def committed(self, requests: Sequence[Request]) -> None:
        """Note which requests got a token; the caller receives it when the step returns."""
        self._committed += requests

    def measured(self, measurement: Measurement, cost: CostModel) -> None:
        """Compare a measurement with the prediction of a cost model that has not seen it."""
        shape, current = measurement.plan.shape, self._current
        current.predicted_s = sum(cost.segment_s(s.kind, s.tokens)
                                  for s, _ in measurement.segments)
        current.measured_s = measurement.pass_s + sum(s for _, s in measurement.segments)
        if measurement.pass_s:
            pass_s = cost.pass_s(*shape)
            current.predicted_s += pass_s
            if shape.finetune_tokens:
                share = 1.0 - cost.pass_s(*shape._replace(finetune_tokens=0)) / pass_s
                self.log.finetuning.append((*self._pass, share))
        current.decode_rows, current.prefill_tokens = shape.decode_rows, shape.prefill_tokens
        current.finetune_tokens, current.segments = (
            shape.finetune_tokens, len(measurement.segments))
        self._segments_left = False

    def finished(self, events: Sequence[Event]) -> None:
        """Stamp the tokens that the step returns, and end the iteration if it is complete."""
        now = self._clock()
        for request in self._committed:
            times = self.log.tokens.get(request.id)
            if times is None:
                assert request.started_at is not None
                times = self.log.tokens[request.id] = _TokenTimes(
                    request.arrival, request.started_at, now)
            times.last = now
            times.tokens += 1
        self._committed = []
        if self._segments_left:
            return
        if self._current.measured_s:
            self.log.iterations.append(self._current)
        self._current = IterationRecord()


class MeasurementLog(IterationObserver):
    """An observer that keeps all measurements, for the calibration of a simulated device."""

    def __init__(self) -> None:
        """Start without measurements."""
        self.all: list[Measurement] = []

    def measured(self, measurement: Measurement, cost: CostModel) -> None:
        """Keep a measurement."""
        self.all.append(measurement)
