# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A job can be cancelled at each wait; it frees its slot and publishes no version."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
import time
from types import GeneratorType
from typing import Any

import pytest
from support.robot import Robot, running, until_state

from mace_ros.api.events import (
    AdapterVersion,
    Correction,
    CorrectionState,
    CorrectionStatus,
    VersionState,
)
from mace_ros.api.settings import Settings
from mace_ros.engine.builder import build_engine
from mace_ros.learning.gate import Gate, Verdict
from mace_ros.learning.job import JobState
from mace_ros.learning.learning_job import LearningJob

# A job's state, whether its weights are swapped out, and the current lines of its generators.
Point = tuple[JobState, bool, tuple[int, ...]]


def lines(generator: Any) -> Iterator[int]:
    """Yield the current line of each nested generator."""
    while isinstance(generator, GeneratorType):
        yield generator.gi_frame.f_lineno
        generator = generator.gi_yieldfrom


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    """Return the points at which jobs have waited so far, in order."""
    seen: list[Point] = []
    run = LearningJob.run

    def noted(self: LearningJob) -> Generator[Any, None, Any]:
        generator = run(self)
        try:
            while True:
                try:
                    said = next(generator)
                except StopIteration as end:
                    return end.value
                if not isinstance(said, (CorrectionStatus, AdapterVersion)):
                    seen.append((self.state, self.swapped_out, tuple(lines(generator))))
                yield said
        finally:
            generator.close()

    monkeypatch.setattr(LearningJob, 'run', noted)
    return seen


def cancel(robot: Robot) -> None:
    """Roll back to the live version, which cancels the job; check that it leaves nothing behind."""
    engine, job = robot.engine, running(robot)
    free = engine.parts.slots.free
    done = engine.rollback('', engine.live_version(''))
    while (now := engine.learner.status().job) is not None and now.number == job.number:
        robot.events += engine.step().events
    status = engine.learner.status()
    waiting = {c.id for c in (*status.queue, *(now.corrections if now is not None else ()))}
    assert waiting >= {*job.correction_ids}
    assert engine.parts.slots.free == free
    while not done.done():
        robot.events += engine.step().events


def published(robot: Robot) -> list[int]:
    """Return the versions that were published so far."""
    return [e.version for e in robot.events if isinstance(e, AdapterVersion)
            and e.state is VersionState.PUBLISHED and e.version]


def are_learned(robot: Robot, *names: str) -> bool:
    """Return whether all of these corrections are learned."""
    return {*names} <= {e.id for e in robot.events if isinstance(e, CorrectionStatus)
                        and e.state is CorrectionState.LEARNED}


def test_a_job_can_be_cancelled_at_each_wait(
        robot: Robot, points: list[Point], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slot is free again, its corrections wait, and no version is published."""
    engine, judge = robot.engine, Gate.judge
    rejected: list[int] = []        # jobs, of each its first candidate

    def reject_one(self: Gate, *arguments: Any) -> Verdict:
        if running(robot).number in rejected:
            return judge(self, *arguments)
        rejected.append(running(robot).number)
        return Verdict('injected', ())

    monkeypatch.setattr(Gate, 'judge', reject_one)
    engine.update(engine.settings.updated({'finetune.max_steps': 400}))
    engine.correct(Correction('A robot.', id='k', prompt='Who are you?'))
    cancelled: set[Point] = set()
    joined = 0      # corrections that arrived during training
    end = time.monotonic() + 200.0
    while not are_learned(robot, 'k', 'joins 0', 'joins 1'):
        assert time.monotonic() < end
        del points[:]
        robot.events += engine.step().events
        if points and points[-1] not in cancelled and points[-1][0] is not JobState.SAVING:
            assert not published(robot)
            cancelled.add(points[-1])
            cancel(robot)
        job = engine.learner.status().job
        if joined < 2 and job is not None and job.steps and len(job.correction_ids) == joined + 1:
            engine.correct(Correction('A human.', id=f'joins {joined}', prompt=f'{joined}?'))
            joined += 1
    assert {state for state, *_ in cancelled} == {
        JobState.READING, JobState.PREPARING, JobState.CHOOSING, JobState.SCORING,
        JobState.TRAINING, JobState.INTERPOLATING, JobState.JUDGING}
    assert sum(swapped_out for _, swapped_out, _ in cancelled) >= 2
    assert len(published(robot)) == 1
    assert robot.ask('Who are you?').text == 'A robot.'


def test_a_job_that_waits_for_a_slot_is_cancelled(settings: Settings, tmp_path: Path) -> None:
    robot = Robot(build_engine(settings.updated({'adapter.slots': 1}), storage=tmp_path))
    robot.correct(Correction('A robot.', id='a', prompt='Who?'))
    slots = robot.engine.parts.slots
    held = slots.pin('')        # as a running request does
    robot.correct(Correction('In the hall.', id='b', prompt='Where?'))
    robot.engine.correct(Correction('Never again.', id='c', prompt='When?'))
    until_state(robot, JobState.PUBLISHING)
    cancel(robot)
    slots.unpin(held)
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == 'c'
                and e.state is CorrectionState.LEARNED)
    assert published(robot) == [1, 2, 3]
    robot.engine.close()


def test_a_version_that_is_being_saved_is_published_before_it_is_rolled_back(
        robot: Robot) -> None:
    robot.engine.correct(Correction('A robot.', id='k', prompt='Who are you?'))
    until_state(robot, JobState.SAVING)
    done = robot.engine.rollback('', 0)
    while not done.done():
        robot.events += robot.engine.step().events
    robot.events += robot.engine.step().events
    assert [(e.version, e.state) for e in robot.events if isinstance(e, AdapterVersion)] == [
        (1, VersionState.PUBLISHED), (1, VersionState.ROLLED_BACK), (0, VersionState.PUBLISHED)]
    assert done.result().changed and robot.engine.live_version('') == 0


def test_a_version_that_is_being_saved_when_the_node_stops_is_served_by_the_next_start(
        settings: Settings, tmp_path: Path) -> None:
    robot = Robot(build_engine(settings, storage=tmp_path))
    robot.engine.correct(Correction('A robot.', id='k', prompt='Who are you?'))
    until_state(robot, JobState.SAVING)
    robot.engine.close()
    again = Robot(build_engine(settings, storage=tmp_path))
    assert again.engine.live_version('') == 1
    assert again.engine.learner.status().waiting == 0
    assert again.ask('Who are you?').text == 'A robot.'
    again.engine.close()
