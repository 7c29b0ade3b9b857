# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A job can be cancelled at each wait, and then publishes no version."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
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
from mace_ros.finetune.sample import Sample, SampleScore
from mace_ros.learning import learning_job
from mace_ros.learning.gate import wrong
from mace_ros.learning.job import JobKind, JobState
from mace_ros.learning.learning_job import LearningJob

# Questions with the same rare word: they are learned in the same version.
QUESTIONS = [f'Where does Rumpelstiltskin {verb}?' for verb in ('sing', 'work')]
# A job's kind and state, whether its weights are swapped out, and the current lines of its
# generators.
Point = tuple[JobKind, JobState, bool, tuple[int, ...]]


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
        generator: Any = run(self)
        try:
            while True:
                try:
                    said = next(generator)
                except StopIteration as end:
                    return end.value
                if not isinstance(said, (CorrectionStatus, AdapterVersion)):
                    seen.append((
                        self.kind, self.state, self.swapped_out, tuple(lines(generator))))
                yield said
        finally:
            generator.close()

    monkeypatch.setattr(LearningJob, 'run', noted)
    return seen


def cancel(robot: Robot) -> None:
    """Roll back to the live version, which cancels the job; check that it leaves nothing behind."""
    engine, job = robot.engine, running(robot)
    done = engine.rollback('', engine.live_version(''))
    while (now := engine.learner.status().job) is not None and now.number == job.number:
        robot.events += engine.step().events
    status = engine.learner.status()
    waiting = {c.id for c in (*status.queue, *(now.corrections if now is not None else ()))}
    assert waiting >= {*job.correction_ids} or job.kind is not JobKind.LEARNING
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


def cancel_each(robot: Robot, points: list[Point], done: Callable[[], bool]) -> set[Point]:
    """Step until ``done()``, and cancel a job at each point where none was cancelled before."""
    before, cancelled = published(robot), set[Point]()
    end = time.monotonic() + 200.0
    while not done():
        assert time.monotonic() < end
        del points[:]
        robot.events += robot.engine.step().events
        if points and points[-1] not in cancelled and points[-1][1] is not JobState.SAVING:
            assert published(robot) == before
            cancelled.add(points[-1])
            cancel(robot)
    return cancelled


@pytest.mark.parametrize(('scope', 'states'), [
    ('similar', {JobState.READING, JobState.CHOOSING, JobState.TRAINING, JobState.JUDGING}),
    ('everywhere', {JobState.READING, JobState.PREPARING, JobState.CHOOSING, JobState.SCORING,
                    JobState.TRAINING, JobState.INTERPOLATING, JobState.JUDGING})])
def test_a_job_can_be_cancelled_at_each_wait(
        robot: Robot, points: list[Point], monkeypatch: pytest.MonkeyPatch, scope: str,
        states: set[JobState]) -> None:
    """Its corrections wait, and no version is published."""
    engine = robot.engine
    lost: list[int] = []        # jobs whose first candidate loses what is guarded

    def lose_once(samples: Sequence[Sample], scores: Sequence[SampleScore]) -> list[Sample]:
        if not samples or running(robot).number in lost:
            return wrong(samples, scores)
        lost.append(running(robot).number)
        return list(samples)

    def both_joined() -> bool:
        """Let two corrections arrive during training; return whether all are learned."""
        job = engine.learner.status().job
        if job is not None and job.steps and len(job.correction_ids) == len(joined) + 1 < 3:
            joined.append(f'joins {len(joined)}')
            engine.correct(Correction(
                'A human.', id=joined[-1], prompt=QUESTIONS[len(joined) - 1]))
            # On disk before the next step, which may be the last.
            engine.parts.journal.submit(lambda _: None).result(60)
        return are_learned(robot, 'k', 'joins 0', 'joins 1')

    engine.update(engine.settings.updated({'finetune.max_steps': 400, 'adapter.scope': scope}))
    robot.ask('How are you?')       # replayed
    engine.correct(Correction(
        'In the hall.', id='first', prompt='Where does Rumpelstiltskin live?'))
    first = cancel_each(robot, points, lambda: are_learned(robot, 'first'))
    # There is nothing to guard yet.
    assert {point[1] for point in first} == states - {JobState.JUDGING}
    monkeypatch.setattr(learning_job, 'wrong', lose_once)
    joined: list[str] = []
    engine.correct(Correction('A robot.', id='k', prompt='Where does Rumpelstiltskin sleep?'))
    cancelled = cancel_each(robot, points, both_joined)
    # What is prepared is kept.
    assert {state for _, state, *_ in cancelled} == states - {JobState.PREPARING}
    assert {state for _, state, swapped_out, _ in cancelled if swapped_out} == (
        states & {JobState.CHOOSING, JobState.SCORING})
    assert len(published(robot)) == 2
    assert robot.ask('Where does Rumpelstiltskin sleep?').text == 'A robot.'


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
