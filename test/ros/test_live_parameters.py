# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Parameter changes and cancellations take effect at the next iteration.

The node runs in this process, so that its iterations can be observed; parameters are set through
ROS. The effect of each parameter is tested with the scheduler.
"""

from __future__ import annotations

from collections.abc import Iterator
import gc
import os
from pathlib import Path
import time
from typing import Any

from mace_ros.msg import Response
import pytest
from rclpy.context import Context
from support.graph import domain_id, ENVIRONMENT, wait_until
from support.ros_graph import Generator, set_parameters

from mace_ros.api.events import Event
from mace_ros.api.settings import Parameter, PARAMETERS, Settings, Value
from mace_ros.ros.client import AnswerHandle, MaceClient
from mace_ros.ros.executor_thread import ExecutorThread
from mace_ros.ros.node import MaceNode
from mace_ros.scheduling.plan import Plan, State

LIVE = [p for p in PARAMETERS.values() if not p.read_only]


class Watched:
    """A node that answers without end, and the settings of each of its plans."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.context = Context()
        values = {'storage.folder': folder, 'model.source': model, 'model.device': 'cpu',
                  'model.threads': 1, 'memory.kv_cache_tokens': 8192}
        arguments = [x for name, value in values.items() for x in ('-p', f'{name}:={value}')]
        self.context.init(args=['--ros-args', *arguments], domain_id=domain_id())
        self.node = MaceNode(context=self.context)
        self._spinner = ExecutorThread(self.node, name='ros', context=self.context)
        self._spinner.start()
        self.node.start()
        self.client = MaceClient()
        self.client.wait_until_ready(100.0)
        self.plans: list[tuple[float, Settings]] = []
        scheduler = self.node.engine.scheduler
        plan = scheduler.plan

        def watched(state: State, now: float) -> Plan:
            self.plans.append((time.monotonic(), scheduler._settings))
            return plan(state, now)

        scheduler.plan = watched

    def ask(self) -> AnswerHandle:
        """Ask for a long answer, and return once it has begun."""
        answer = self.client.ask('Sing.', max_tokens=4000, ttft_slo_ms=6e5, tpot_slo_ms=6e5)
        next(answer.stream(100.0))
        return answer

    def in_force_after(self, moment: float) -> Settings:
        """Return the settings of the first iteration that began after a moment."""
        def plans() -> list[Settings]:
            return [settings for at, settings in self.plans[-1000:] if at > moment]

        # The first plan may be of an iteration that had begun before.
        assert wait_until(lambda: len(plans()) > 1, 100.0)
        return plans()[1]

    def close(self) -> None:
        self.client.close()
        self.node.stop()
        self._spinner.stop(1.0)
        self.node.destroy_node()
        self.context.try_shutdown()
        # Until the node is collected, it stays in the graph beside others of its name.
        del self.node, self._spinner
        gc.collect()


@pytest.fixture(scope='module')
def watched(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setitem(os.environ, name, value)
        node = Watched(tmp_path_factory.mktemp('live'), model_folder)
        yield node
        node.close()


def other_value(parameter: Parameter) -> Value:
    """Return an allowed value that is not the default."""
    if isinstance(parameter.default, bool):
        return not parameter.default
    if parameter.choices:
        return next(c for c in parameter.choices if c != parameter.default)
    if isinstance(parameter.default, str):
        return 'You are a robot.'
    lowest = type(parameter.default)(parameter.minimum)
    return lowest if lowest != parameter.default else type(lowest)(parameter.maximum)


def test_each_live_parameter_is_in_force_at_the_next_iteration(watched: Watched) -> None:
    for parameter in LIVE:
        answer = watched.ask()
        for value in (other_value(parameter), parameter.default):
            result = set_parameters(watched.client, {parameter.name: value})
            replied = time.monotonic()
            assert result == [(True, '')], parameter.name
            assert watched.in_force_after(replied).value(parameter.name) == value
        assert not answer.is_complete(), 'the node must serve during the changes'
        answer.cancel()
        answer.result(100.0)


@pytest.mark.parametrize('through', ['topic', 'action'])
def test_a_cancellation_ends_an_answer_within_one_iteration(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, through: str,
) -> None:
    engine, answer = watched.node.engine, watched.ask()
    cancel, end, plans = engine.cancel, engine.requests.end, {}

    def cancelled(query_id: str) -> None:
        cancel(query_id)
        plans['when it came'] = len(watched.plans)

    def ended(*arguments: Any) -> list[Event]:
        plans['when it ended'] = len(watched.plans)
        return end(*arguments)

    monkeypatch.setattr(engine, 'cancel', cancelled)
    monkeypatch.setattr(engine.requests, 'end', ended)
    answer.cancel()
    assert answer.result(100.0).finish_reason == Response.CANCELLED
    if through == 'action':
        with Generator(watched.client) as generator:
            goal = generator.send('Sing.', max_tokens=4000, ttft_slo_ms=6e5, tpot_slo_ms=6e5)
            assert wait_until(lambda: generator.chunks, 100.0)
            goal.cancel_goal_async()
            assert generator.result(goal)[1].finish_reason == Response.CANCELLED
    # One iteration may run when the cancellation arrives; none begins after it.
    assert plans['when it ended'] - plans['when it came'] <= 1


def test_no_budget_stops_learning_at_the_next_segment(watched: Watched) -> None:
    # A learning rate so low that training does not end.
    assert all(ok for ok, _ in set_parameters(
        watched.client, {'finetune.max_steps': 10000, 'finetune.learning_rate': 1e-6}))
    correction = watched.client.correct('Never mind the question.', prompt='Who are you?')
    engine = watched.node.engine
    assert wait_until(lambda: engine.learner.step is not None, 100.0), correction.status
    assert set_parameters(watched.client, {'finetune.budget': 0.0}) == [(True, '')]

    def learns() -> bool:
        before = engine.scheduler.statistics(time.monotonic()).learning_s
        time.sleep(0.5)
        return engine.scheduler.statistics(time.monotonic()).learning_s > before

    # A segment may run when the change arrives; none begins after it.
    assert not learns() or not learns()
    assert not correction.is_final()
