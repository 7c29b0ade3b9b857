# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""More versions answer than the device has slots for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.robot import LESSONS, Robot, robot_with, taught_robot

from mace_ros.api.events import Correction, FinishReason, Query, Response
from mace_ros.api.settings import Settings
from mace_ros.model.lora_manager import LoRAManager


@pytest.fixture
def robot(settings: Settings, tmp_path: Path) -> Iterator[Robot]:
    """Return a robot with one slot, and three versions."""
    with taught_robot(settings, tmp_path) as made:
        yield made


def responses(robot: Robot, count: int) -> dict[str, Response]:
    """Return this many responses, by the ids of their queries."""
    while True:
        found = {e.query_id: e for e in robot.events if isinstance(e, Response)}
        if len(found) == count:
            return found
        robot.events += robot.engine.step().events


def test_a_question_waits_until_a_slot_is_free(robot: Robot) -> None:
    for question in LESSONS:
        robot.engine.submit(Query(question, id=question))
    robot.engine.submit(Query('Tell me about the sea.', id='base'))
    found = responses(robot, 4)
    assert {question: found[question].text for question in LESSONS} == LESSONS
    assert [found[question].adapter_version for question in LESSONS] == [1, 2, 3]
    assert found['base'].adapter_version == 0
    # The base model needs no slot.
    assert found['base'].queue_ms < found['What colour is the gate?'].queue_ms


def test_a_question_that_waits_for_a_slot_can_be_cancelled(robot: Robot) -> None:
    first, second, third = LESSONS
    for question in LESSONS:
        robot.engine.submit(Query(question, id=question))
    robot.engine.step()
    robot.engine.cancel(second)
    found = responses(robot, 3)
    assert found[second].finish_reason is FinishReason.CANCELLED
    assert {found[q].text for q in (first, third)} == {LESSONS[first], LESSONS[third]}


def test_all_live_versions_are_restored(settings: Settings, tmp_path: Path) -> None:
    with robot_with(settings, tmp_path) as robot:
        for question, answer in LESSONS.items():
            robot.correct(Correction(answer, id=question, prompt=question))
    with robot_with(settings, tmp_path) as again:
        assert {question: again.ask(question).text for question in LESSONS} == LESSONS


def test_a_pause_ends_every_query_once_though_no_version_can_be_loaded(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    for question in LESSONS:
        robot.engine.submit(Query(question, id=question))
    robot.engine.step()

    def fail(*_: object) -> None:
        raise RuntimeError('injected')

    monkeypatch.setattr(LoRAManager, 'write_slot', fail)
    ended = [(e.query_id, e.finish_reason) for e in (*robot.events, *robot.engine.pause())
             if isinstance(e, Response)]
    assert sorted(ended) == sorted((q, FinishReason.CANCELLED) for q in LESSONS)
