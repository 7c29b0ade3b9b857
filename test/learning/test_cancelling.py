# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A job can be cancelled at each wait; it frees its slot and publishes no version."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
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
from mace_ros.learning.job import Job, JobKind, JobState
from mace_ros.learning.learning_job import LearningJob
from mace_ros.learning.verification import Verification, VerificationJob

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
    runs = {kind: kind.run for kind in (LearningJob, VerificationJob)}

    def noted(self: Job) -> Generator[Any, None, Any]:
        generator: Any = runs[type(self)](self)
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

    for kind in runs:
        monkeypatch.setattr(kind, 'run', noted)
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
    assert waiting >= {*job.correction_ids} or job.kind is not JobKind.LEARNING
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
    """Its slot is free again, its corrections wait, and no version is published."""
    engine, judge = robot.engine, Gate.judge
    rejected: list[int] = []        # jobs, of each its first candidate

    def reject_one(self: Gate, *arguments: Any) -> Verdict:
        if running(robot).number in rejected:
            return judge(self, *arguments)
        rejected.append(running(robot).number)
        return Verdict('injected', ())

    def two_joined() -> bool:
        """Let two corrections arrive during training; return whether all are learned."""
        job = engine.learner.status().job
        if job is not None and job.steps and len(job.correction_ids) == len(joined) + 1 < 3:
            joined.append(f'joins {len(joined)}')
            engine.correct(Correction('A human.', id=joined[-1], prompt=f'{len(joined)}?'))
        return are_learned(robot, 'k', 'joins 0', 'joins 1')

    engine.update(engine.settings.updated({'finetune.max_steps': 400}))
    engine.correct(Correction('In the hall.', id='first', prompt='Where are you?'))
    first = cancel_each(robot, points, lambda: are_learned(robot, 'first'))
    assert {point[1] for point in first} == {
        JobState.READING, JobState.CHOOSING, JobState.TRAINING}    # there is nothing to guard yet
    monkeypatch.setattr(Gate, 'judge', reject_one)
    engine.update(engine.settings.updated({'adapter.scope': scope}))
    joined: list[str] = []
    engine.correct(Correction('A robot.', id='k', prompt='Who are you?'))
    cancelled = cancel_each(robot, points, two_joined)
    assert {state for _, state, *_ in cancelled} == states
    assert {state for _, state, swapped_out, _ in cancelled if swapped_out} == (
        states & {JobState.CHOOSING, JobState.SCORING})
    assert len(published(robot)) == 2
    assert robot.ask('Who are you?').text == 'A robot.'


@pytest.mark.parametrize(('kind', 'states'), [
    (JobKind.VERIFICATION, {JobState.READING, JobState.SCORING}),
    (JobKind.REPAIR, {JobState.READING, JobState.TRAINING, JobState.JUDGING})])
def test_a_check_of_what_was_learned_can_be_cancelled_at_each_wait(
        robot: Robot, points: list[Point], monkeypatch: pytest.MonkeyPatch, kind: JobKind,
        states: set[JobState]) -> None:
    """It forgets what there was to do; here that is noted again each time."""
    engine, forget = robot.engine, Verification.forget
    lessons = {'Where are you?': 'In the hall.', 'Who are you?': 'A robot.', 'When?': 'At nine.'}
    for prompt, text in lessons.items():
        robot.correct(Correction(text, id=prompt, prompt=prompt))
    known = engine.parts.journal.submit(lambda j: j.learned('')).result()

    def note_again(self: Verification, profile: str) -> None:
        noted.append(self)
        forget(self, profile)
        assert self.next_check(None) is None and self.next_repair(None, 0.0) == ('', [])
        if kind is JobKind.VERIFICATION:
            self.published(profile, [record.id for record in known], [], repaired=False)
        else:       # no version has learned this text, so there is something to train
            self.checked(profile, replace(known[0], corrected='In the garden.'), right=False)

    def ended() -> bool:
        return (len(published(robot)) > before if kind is JobKind.REPAIR
                else noted != [] and noted[-1].next_check(None) is None)

    monkeypatch.setattr(Verification, 'forget', note_again)
    before, noted = len(published(robot)), list[Verification]()
    engine.rollback('', engine.live_version(''))
    cancelled = cancel_each(robot, points, ended)
    assert {state for of, state, *_ in cancelled if of is kind} == states
    assert len(published(robot)) == before + (kind is JobKind.REPAIR)
    repaired = {known[0].id: 'In the garden.'} if kind is JobKind.REPAIR else {}
    assert {prompt: robot.ask(prompt).text for prompt in lessons} == lessons | repaired


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
