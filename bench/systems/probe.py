# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""An engine that notes where its time goes; all from outside, nothing in it is changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
import math
from pathlib import Path
import time
from typing import Any

from bench.load import Answered
from mace_ros.api.settings import Settings
from mace_ros.engine import model_runner
from mace_ros.engine.engine import Engine, Iteration
from mace_ros.scheduling.plan import Measurement, Plan

# Of each iteration, in this order; what JSON keeps of them.
COLUMNS = ('wall_ms', 'work_ms', 'plan_us', 'predicted_ms', 'measured_ms', 'in_flight',
           'decode_rows', 'prefill_tokens', 'finetune_tokens', 'segments')


@dataclass(slots=True)
class Spent:
    """
    What one iteration took, in seconds.

    ``work_s`` is the time in the model, in segments and in sampling; ``predicted_s`` and
    ``measured_s`` are of what it ran: the pass with all that belongs to it, and segments.
    """

    wall_s: float = 0.0
    work_s: float = 0.0
    plan_s: float = 0.0
    predicted_s: float = math.nan
    measured_s: float = 0.0
    in_flight: int = 0
    decode_rows: int = 0
    prefill_tokens: int = 0
    finetune_tokens: int = 0
    segments: int = 0

    def row(self) -> list[float]:
        """Return the values of :data:`COLUMNS`."""
        return [self.wall_s * 1e3, self.work_s * 1e3, self.plan_s * 1e6, self.predicted_s * 1e3,
                self.measured_s * 1e3, self.in_flight, self.decode_rows, self.prefill_tokens,
                self.finetune_tokens, self.segments]


@dataclass(slots=True)
class _Stamps:
    """When the tokens of a request reached whoever called :meth:`Engine.step`."""

    arrival: float
    started: float
    first: float
    last: float = math.nan
    tokens: int = 0


@dataclass
class Log:
    """What was noted since :meth:`MeasuredEngine.forget`."""

    iterations: list[Spent] = field(default_factory=list)
    # Pieces of fine-tuning: beginning, end, and the share of that time that is theirs.
    learning: list[tuple[float, float, float]] = field(default_factory=list)
    stamps: dict[str, _Stamps] = field(default_factory=dict)

    @property
    def busy_s(self) -> float:
        """Time that the device worked: passes and segments, without planning."""
        return sum(i.measured_s for i in self.iterations)

    def answered(self, query_id: str, arrival: float) -> Answered:
        """Return the times of a query that was due at ``arrival``."""
        seen = self.stamps[query_id]
        return Answered(arrival, seen.started, seen.first, seen.last, seen.tokens)

    def finetune_wait_s(self, query_id: str) -> float:
        """Return how long a query waited, until its first pass, while fine-tuning ran."""
        seen = self.stamps[query_id]
        return sum(share * max(min(end, seen.started) - max(begin, seen.arrival), 0.0)
                   for begin, end, share in self.learning)


class MeasuredEngine(Engine):
    """An engine whose iterations and tokens are noted in ``log``."""

    def __init__(self, settings: Settings, *, storage: Path, wake: Callable[[], None],
                 progress: Callable[[str], None] = lambda text: None) -> None:
        """Load the model; answers don't end before their longest length."""
        super().__init__(settings, storage=storage, wake=wake, progress=progress)
        self.chat.end_tokens = frozenset()
        self.log = Log()
        self._now = Spent()
        self._pass = (0.0, 0.0)
        self._sampled: list[Any] = []
        after(self.model, 'run', self._ran_pass)
        after(self.model, 'forward_row', self._worked)
        after(self.model.skeleton, 'call_layers', self._worked)     # where a step begins
        after(self.scheduler, 'plan', self._planned)
        before(self.scheduler, 'observe', self._observing)
        before(self._requests, 'commit', self._committing)
        after(model_runner, 'sample', self._worked)

    def forget(self) -> None:
        """Begin a new log."""
        self.log = Log()

    def step(self) -> Iteration:
        """Run one iteration, and note it unless it did nothing."""
        self._sampled = []
        begun = time.monotonic()
        iteration = super().step()
        ended = time.monotonic()
        # Whoever called hears of a token only now.
        for answering in self._sampled:
            stamps = self.log.stamps.get(answering.query.id)
            if stamps is None:
                stamps = self.log.stamps[answering.query.id] = _Stamps(
                    answering.request.arrival, answering.request.started_at, ended)
            stamps.last = ended
            stamps.tokens += 1
        self._now.wall_s += ended - begun
        if not self.runner.is_suspended:     # else the next call goes on with it
            if self._now.measured_s:
                self.log.iterations.append(self._now)
            self._now = Spent()
        return iteration

    def learned(self, began: float, ended: float) -> None:
        """Note a segment; for the learner that makes the steps."""
        self._now.work_s += ended - began
        self.log.learning.append((began, ended, 1.0))

    def _committing(self, sampled: list[Any], drawn: list[int]) -> None:
        self._sampled = list(sampled)

    def _worked(self, began: float, ended: float, result: object) -> None:
        self._now.work_s += ended - began

    def _ran_pass(self, began: float, ended: float, result: object) -> None:
        self._pass = (began, ended)

    def _planned(self, began: float, ended: float, plan: Plan) -> None:
        self._now.plan_s, self._now.in_flight = ended - began, len(self._requests)

    def _observing(self, measurement: Measurement, now: float) -> None:
        """Compare with what would be predicted: nothing of the iteration is known yet."""
        cost, shape, spent = self.scheduler.cost, measurement.plan.shape, self._now
        spent.predicted_s = sum(cost.segment_s(s.kind, s.tokens) for s, _ in measurement.segments)
        spent.measured_s = measurement.pass_s + sum(s for _, s in measurement.segments)
        if measurement.pass_s:
            with_s = cost.pass_s(*shape)
            spent.predicted_s += with_s
            if shape.finetune_tokens:
                share = 1.0 - cost.pass_s(*shape._replace(finetune_tokens=0)) / with_s
                self.log.learning.append((*self._pass, share))
        spent.decode_rows, spent.prefill_tokens = shape.decode_rows, shape.prefill_tokens
        spent.finetune_tokens, spent.segments = shape.finetune_tokens, len(measurement.segments)


def after(owner: Any, name: str, note: Callable[[float, float, Any], None]) -> None:
    """Have ``note`` told when each call of a function of ``owner`` began, ended, what it gave."""
    function = getattr(owner, name)

    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        result = function(*args, **kwargs)
        note(began, time.monotonic(), result)
        return result
    setattr(owner, name, timed)


def before(owner: Any, name: str, note: Callable[..., None]) -> None:
    """Have ``note`` called with the same arguments before each call."""
    function = getattr(owner, name)

    @wraps(function)
    def noted(*args: Any, **kwargs: Any) -> Any:
        note(*args, **kwargs)
        return function(*args, **kwargs)
    setattr(owner, name, noted)
