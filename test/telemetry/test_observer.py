# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Observers get the reports of an iteration, and can be added and removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import pytest
from support.robot import Robot

from mace_ros.api.events import Event
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.plan import Measurement, Plan
from mace_ros.scheduling.request import Request
from mace_ros.telemetry.observer import IterationObserver, Observers


@dataclass(eq=False)
class Recorder(IterationObserver):
    """Keeps all reports."""

    phases: list[tuple[str, float, float, dict[str, float]]] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def phase(self, name: str, began: float, ended: float, values: Mapping[str, float]) -> None:
        self.phases.append((name, began, ended, dict(values)))

    def planned(self, plan: Plan, in_flight: int) -> None:
        self.plans.append(plan)

    def committed(self, requests: Sequence[Request]) -> None:
        self.tokens += [request.id for request in requests]

    def measured(self, measurement: Measurement, cost: CostModel) -> None:
        self.measurements.append(measurement)

    def finished(self, events: Sequence[Event]) -> None:
        self.events += events


def test_a_phase_is_timed_also_if_it_fails() -> None:
    observers, recorder = Observers(count().__next__), Recorder()
    observers.add(recorder)
    with pytest.raises(ValueError, match='broken'), observers.timed('pass', rows=2):
        raise ValueError('broken')
    [(name, began, ended, values)] = recorder.phases
    assert (name, began, ended, values.pop('rows')) == ('pass', 0, 1, 2)
    assert values.pop('cpu_ms') >= 0.0 and not values


def test_a_removed_observer_gets_no_reports() -> None:
    observers, stays, leaves = Observers(lambda: 0.0), Recorder(), Recorder()
    observers.add(stays)
    observers.add(leaves)
    observers.remove(leaves)
    observers.finished([])
    with observers.timed('plan'):
        pass
    assert len(stays.phases) == 1 and not leaves.phases


def test_an_iteration_is_reported_whole(robot: Robot) -> None:
    recorder = Recorder()
    robot.ask('Hm?')        # the prompt's beginning takes a pass of its own once
    robot.engine.observe(recorder)
    answer = robot.ask('Hm?', max_tokens=5)
    robot.engine.unobserve(recorder)
    assert recorder.tokens == [answer.query_id] * answer.output_tokens
    passes = [m for m in recorder.measurements if m.plan.has_pass]
    assert len(passes) == answer.output_tokens and all(m.pass_s > 0 for m in passes)
    assert any(plan.prefill for plan in recorder.plans)
    names = {name for name, *_ in recorder.phases}
    assert {'iteration', 'receive', 'learn', 'plan', 'pass', 'sample', 'wait', 'commit'} <= names
    assert all(began <= ended for _, began, ended, _ in recorder.phases)
    assert answer in recorder.events
