# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Which corrections the engine learns next, and when."""

from collections.abc import Sequence
from dataclasses import replace
import time
from typing import Any

import pytest
from support.robot import correct, DONE, Robot, running, until_state

from mace_ros.api.events import (
    AdapterVersion,
    Correction,
    CorrectionState,
    CorrectionStatus,
    Event,
)
from mace_ros.api.settings import EVERYWHERE
from mace_ros.finetune.sample import Sample
from mace_ros.learning import learner, selection
from mace_ros.learning.acceptance import Accepted
from mace_ros.learning.drift import Drift, DriftState, MAX_PENDING
from mace_ros.learning.job import JobKind, JobState
from mace_ros.learning.task import Task
from mace_ros.learning.training import Scored, Training


@pytest.mark.parametrize(('changes', 'first'), [
    ({'slo.freshness_s': 1e9}, {'3', '4', '5'}),     # the weight of the oldest one is low
    ({'slo.freshness_s': 1.0}, {'0'}),
    ({'slo.freshness_s': 1.0, 'finetune.order': 'arrival'}, {'0'})])
def test_the_order_in_which_corrections_are_learned(
        robot: Robot, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object],
        first: set[str]) -> None:
    """The newest first, unless the oldest is overdue; each is scored once."""
    monkeypatch.setattr(selection, 'JOB_CANDIDATES', 4)
    monkeypatch.setattr(selection, 'JOB_CORRECTIONS', 1)
    score, scored = Training.score, []

    def noted(self: Training, samples: Sequence[Sample], *rest: Any) -> Task[Scored]:
        if running(robot).state is JobState.CHOOSING:
            scored.extend(samples)
        return score(self, samples, *rest)

    monkeypatch.setattr(Training, 'score', noted)
    settings = robot.engine.settings.updated(
        {'finetune.max_steps': 2, 'finetune.replay_samples': 1, **changes})
    robot.engine.update(settings.updated({'finetune.budget': 0.0}))
    for i in range(6):
        robot.engine.correct(Correction(
            f'Number {i}.', id=str(i), prompt=f'Question {i}?', weight=1.0 if i else 0.01))
        robot.until(lambda e, i=i: isinstance(e, CorrectionStatus) and e.id == str(i))
    time.sleep(1.0)
    robot.engine.update(settings)
    left = {str(i) for i in range(6)}
    trained = []
    while left:
        event = robot.until(lambda e: isinstance(e, CorrectionStatus))
        if event.state is CorrectionState.TRAINING:
            trained.append(event.id)
        left -= {event.id} if event.state in DONE else set()
    assert trained[0] in first
    assert len(scored) == 6
    if robot.engine.settings.finetune.order == 'arrival':
        assert trained == sorted(trained)


def test_in_calm_a_backlog_is_learned_with_the_whole_budget(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    robot.engine.update(robot.engine.settings.updated({'drift.min_budget': 0.2}))
    for i in range(20 + MAX_PENDING):
        robot.engine.learner.answered(f'good {i}')
    robot.ask('Who are you?', max_tokens=2)
    calm = robot.engine.status().finetune_budget
    assert calm < 0.5
    monkeypatch.setattr(robot.engine.learner, 'poll', list)         # no job begins
    for i in range(selection.JOB_CORRECTIONS):
        assert robot.engine.status().finetune_budget == calm
        robot.engine.correct(Correction('A robot.', id=str(i), prompt=f'Question {i}?'))
        robot.until(lambda e, i=i: isinstance(e, CorrectionStatus) and e.id == str(i))
        robot.engine.step()
    assert robot.engine.status().finetune_budget == robot.engine.settings.finetune.budget


@pytest.fixture
def resting(robot: Robot, monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Return the correction ids of each job of a robot in calm, which has learned one so far."""
    engine, jobs = robot.engine, []
    monkeypatch.setattr(Drift, 'state', DriftState.CALM)
    monkeypatch.setattr(Drift, 'level', 0.0)
    poll = learner.Learner.poll

    def noted(self: learner.Learner) -> list[Event]:
        events = poll(self)
        job = self.status().job
        if job is not None and job.number > len(jobs):
            jobs.append(set(job.correction_ids))
        return events

    monkeypatch.setattr(learner.Learner, 'poll', noted)
    engine.update(engine.settings.updated({
        'drift.min_budget': 0.0, 'slo.freshness_s': 1e6, 'finetune.max_steps': 2}))
    correct(robot, 'first')
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.state in DONE)
    assert jobs == [{'first'}]
    return jobs


def test_in_calm_corrections_of_one_adapter_are_learned_together_after_a_rest(
        robot: Robot, resting: list[set[str]]) -> None:
    robot.engine.update(robot.engine.settings.updated({'adapter.scope': EVERYWHERE}))
    correct(robot, '1')
    correct(robot, '2')
    for _ in range(20):
        until = robot.engine.step().wake_at
    assert until is not None and until > time.monotonic() + 1e5
    correct(robot, '1 again', about='1')    # the one that has waited longest
    assert robot.engine.step().wake_at == until
    correct(robot, '3')
    assert len(resting) == 1
    correct(robot, '4')                     # as many as a job takes
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == '4' and e.state in DONE)
    assert resting == [{'first'}, {'1 again', '2', '3', '4'}]


def test_a_rest_ends_before_a_correction_is_overdue(robot: Robot, resting: list[set[str]]) -> None:
    engine = robot.engine
    engine.update(engine.settings.updated({'slo.freshness_s': 1.0}))
    sent = time.monotonic()
    correct(robot, 'alone')
    while len(resting) == 1:
        engine.step()
    assert 1.0 <= time.monotonic() - sent < 100.0


def test_drift_ends_the_rest(
        robot: Robot, resting: list[set[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    correct(robot, 'another')
    monkeypatch.setattr(Drift, 'state', DriftState.DRIFTING)
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.state in DONE)
    assert resting == [{'first'}, {'another'}]


def test_the_continuous_policy_rehearses_learned_corrections(robot: Robot) -> None:
    """Rehearsal never pauses and publishes no correction status."""
    engine = robot.engine
    engine.update(engine.settings.updated({
        'scheduler.policy': 'continuous', 'finetune.period_steps': 2}))
    for name in ('1', '2'):
        correct(robot, name)
        robot.until(lambda e: isinstance(e, CorrectionStatus) and e.state in DONE)
    learned = engine.live_version('')
    told: list[Event] = []
    end = time.monotonic() + 200.0
    while engine.live_version('') < learned + 2 and time.monotonic() < end:
        told += engine.step().events
    assert engine.live_version('') >= learned + 2
    assert not [e for e in told if isinstance(e, CorrectionStatus)]
    # A repeated correction is acknowledged even if its job fails.
    while (job := engine.learner.status().job) is None or job.kind is not JobKind.REHEARSAL:
        engine.step()
    correct(robot, 'again', about='1')
    engine.learner.fail('injected')
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == 'again'
                and e.state is CorrectionState.LEARNED)


def test_profiles_take_turns(robot: Robot) -> None:
    for number in range(9):
        robot.engine.correct(Correction('Yes.', id=f'ann{number}', profile='ann',
                                        prompt=f'Question {number}?'))
    robot.correct(Correction('No.', id='bob', profile='bob', prompt='Question?'))
    published = [e.profile for e in robot.events if isinstance(e, AdapterVersion)]
    assert published.count('ann') <= 1 and published[-1] == 'bob'


def test_the_continuous_policy_does_not_rehearse_superseded_corrections(robot: Robot) -> None:
    """Even if the newer correction came while the version was being saved."""
    engine = robot.engine
    engine.update(engine.settings.updated({'scheduler.policy': 'continuous'}))
    correct(robot, 'old', about='this')
    until_state(robot, JobState.SAVING)
    engine.correct(Correction('Your friend.', id='new', prompt='Question this?'))
    engine.parts.journal.submit(lambda _: None).result(60)
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == 'new'
                and e.state is CorrectionState.LEARNED)
    while (job := engine.learner.status().job) is None or job.kind is not JobKind.REHEARSAL:
        engine.step()
    assert job.correction_ids == ('new',)


def test_an_overdue_correction_makes_the_steps_of_every_job_overdue(robot: Robot) -> None:
    """The oldest correction counts, even if another job will learn it."""
    robot.engine.correct(Correction('A robot.', id='k', prompt='Who are you?'))
    robot.until(lambda e: isinstance(e, CorrectionStatus)
                and e.state is CorrectionState.TRAINING)
    record = robot.engine.parts.journal.submit(lambda j: j.correction('k')).result(60)
    robot.engine.learner.accepted(Accepted(
        replace(record, id='older', profile='ann', state=CorrectionState.ACCEPTED), new=True,
        arrived=-5.0))
    step = robot.engine.learner.step
    while robot.engine.learner.step in (step, None):
        robot.engine.step()
    assert robot.engine.learner.step.oldest_correction_at == -5.0
