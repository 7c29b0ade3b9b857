# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Corrections of an answer that is still being written wait for its end."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.robot import RANDOM_MODEL, Robot, robot_with

from mace_ros.api.events import (
    Correction,
    CorrectionState,
    CorrectionStatus,
    FinishReason,
    Query,
    Response,
    ResponseChunk,
)
from mace_ros.api.settings import Settings
from mace_ros.engine import correction_intake
from mace_ros.store.journal import Journal
from mace_ros.store.layout import JOURNAL

ACCEPTED, REJECTED = CorrectionState.ACCEPTED, CorrectionState.REJECTED


def begin(robot: Robot, query_id: str, **fields: object) -> None:
    """Ask, and return once the answer has begun."""
    robot.engine.submit(Query('Who are you?', id=query_id, **{'max_tokens': 40, **fields}))
    robot.until(lambda e: isinstance(e, ResponseChunk) and e.query_id == query_id)


def status_of(robot: Robot, name: str) -> CorrectionStatus:
    """Step until the correction of that name has its first status."""
    event = next((e for e in robot.events if isinstance(e, CorrectionStatus) and e.id == name),
                 None) or robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == name)
    assert isinstance(event, CorrectionStatus)
    return event


@pytest.fixture
def robot(settings: Settings, tmp_path: Path):
    with robot_with(settings.updated({**RANDOM_MODEL, 'finetune.budget': 0.0}),
                    tmp_path) as made:
        yield made


@pytest.mark.parametrize('named_by', ['query_id', 'conversation_id'])
def test_a_correction_during_the_answer_is_accepted_at_its_end(
        robot: Robot, tmp_path: Path, named_by: str) -> None:
    ended = robot.ask('Earlier?', id='earlier', conversation_id='kitchen', max_tokens=2)
    begin(robot, 'now', conversation_id='kitchen')
    named = {'query_id': 'now', 'conversation_id': 'kitchen'}[named_by]
    robot.engine.correct(Correction('Rover.', id='k', **{named_by: named}))
    response = robot.response('now')
    assert status_of(robot, 'k').state is ACCEPTED
    order = [e for e in robot.events if e is response or isinstance(e, CorrectionStatus)]
    assert order[0] is response, 'it is acknowledged once it is in the journal'
    with Journal(tmp_path / JOURNAL) as journal:
        record = journal.correction('k')
    assert (record.query_id, record.rejected) == ('now', response.text)
    # The conversation continues with the right answer.
    robot.ask('And where?', id='next', conversation_id='kitchen', max_tokens=1)
    robot.engine.pause()    # until it is in the journal
    with Journal(tmp_path / JOURNAL) as journal:
        turns = [m['content'] for m in journal.answer('next').messages if m['role'] == 'assistant']
    assert turns == [ended.text, 'Rover.']


def test_before_the_first_token_a_conversation_still_ends_with_the_earlier_answer(
        robot: Robot, tmp_path: Path) -> None:
    robot.ask('Earlier?', id='earlier', conversation_id='kitchen', max_tokens=2)
    robot.engine.submit(Query('Now?', id='now', conversation_id='kitchen', max_tokens=2))
    robot.engine.correct(Correction('Rover.', id='k', conversation_id='kitchen'))
    assert status_of(robot, 'k').state is ACCEPTED
    with Journal(tmp_path / JOURNAL) as journal:
        assert journal.correction('k').query_id == 'earlier'
    while not any(isinstance(e, Response) and e.query_id == 'now' for e in robot.events):
        robot.events += robot.engine.step().events


@pytest.mark.parametrize('tokens', [0, 1])
def test_a_cancelled_answer_can_be_corrected_if_it_had_begun(robot: Robot, tokens: int) -> None:
    robot.engine.submit(Query('Who are you?', id='now', max_tokens=40))
    robot.events += robot.engine.step().events
    if tokens:
        robot.until(lambda e: isinstance(e, ResponseChunk))
    robot.engine.correct(Correction('Rover.', id='k', query_id='now'))
    robot.engine.cancel('now')
    assert robot.response('now').finish_reason is FinishReason.CANCELLED
    status = status_of(robot, 'k')
    began = [e for e in robot.events if isinstance(e, ResponseChunk) and e.index > 0]
    assert status.state is (ACCEPTED if began else REJECTED), status.reason


def test_deactivation_acknowledges_what_waits(robot: Robot, tmp_path: Path) -> None:
    begin(robot, 'now')
    robot.engine.correct(Correction('Rover.', id='k', query_id='now'))
    events = robot.engine.pause()
    assert [e.finish_reason for e in events if isinstance(e, Response)] == [
        FinishReason.CANCELLED]
    assert [(e.id, e.state) for e in events if isinstance(e, CorrectionStatus)] == [
        ('k', ACCEPTED)]
    with Journal(tmp_path / JOURNAL) as journal:
        assert journal.correction('k').query_id == 'now'


def test_the_number_that_waits_is_bounded(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correction_intake, 'MAX_HELD', 2)
    begin(robot, 'now')
    for name in ('k1', 'k2', 'k3'):
        robot.engine.correct(Correction('Rover.', id=name, query_id='now'))
    refused = status_of(robot, 'k3')
    assert refused.state is REJECTED and 'try again later' in refused.reason
    robot.response('now')
    assert {status_of(robot, name).state for name in ('k1', 'k2')} == {ACCEPTED}
    # The second one of the same answer replaces the first.
    assert CorrectionState.SUPERSEDED in {
        e.state for e in robot.events if isinstance(e, CorrectionStatus) and e.id == 'k1'}
