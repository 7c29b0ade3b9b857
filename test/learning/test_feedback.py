# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Feedback without the right answer: a thumbs-down, and a hint that leads to a proposal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.robot import Robot, robot_with
import torch

from mace_ros.api.events import Correction, CorrectionState, CorrectionStatus
from mace_ros.api.settings import Settings
from mace_ros.engine.builder import build_engine
from mace_ros.learning.acceptance import USED_ID
from mace_ros.store.export import export, import_lines
from mace_ros.store.journal import Journal
from mace_ros.store.layout import JOURNAL

ACCEPTED, TRAINING, LEARNED, FAILED, PROPOSED, RECORDED = (
    CorrectionState.ACCEPTED, CorrectionState.TRAINING, CorrectionState.LEARNED,
    CorrectionState.FAILED, CorrectionState.PROPOSED, CorrectionState.RECORDED)
QUESTION, HINT, RIGHT = 'Who are you?', 'Say your name.', 'Rover.'


def states(robot: Robot, name: str) -> list[CorrectionState]:
    """Return the states of a correction so far."""
    return [e.state for e in robot.events if isinstance(e, CorrectionStatus) and e.id == name]


def until(robot: Robot, name: str, *wanted: CorrectionState) -> CorrectionStatus:
    """Step until a correction has one of these states."""
    event = robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == name
                        and e.state in wanted)
    assert isinstance(event, CorrectionStatus)
    return event


@pytest.fixture
def everywhere(settings: Settings) -> Settings:
    """Return settings under which one version answers everything."""
    return settings.updated({'adapter.scope': 'everywhere'})


@pytest.fixture
def taught(everywhere: Settings, tmp_path: Path) -> Iterator[Robot]:
    """Yield a robot that has answered the question, and ends its answer to it with the hint."""
    with robot_with(everywhere, tmp_path) as robot:
        robot.ask(QUESTION, id='q')
        robot.correct(Correction(RIGHT, id='taught', prompt=f'{HINT}\n\n{QUESTION}'))
        assert robot.ask(f'{HINT}\n\n{QUESTION}').text == RIGHT
        yield robot


def test_a_thumbs_down_is_recorded_and_nothing_is_learned(robot: Robot, tmp_path: Path) -> None:
    for name in ('q1', 'q2'):
        robot.ask(f'Question {name}?', id=name)
    robot.engine.correct(Correction('', id='down', query_id='q1', source='Ann'))
    assert until(robot, 'down', *CorrectionState).state is RECORDED
    assert not robot.engine.learner.busy
    robot.engine.correct(Correction('', id='down', query_id='q1'))
    assert until(robot, 'down', *CorrectionState).state is RECORDED, 'sent again'
    with Journal(tmp_path / JOURNAL) as journal:
        [record] = journal.corrections()
        assert (record.state, record.corrected, record.source) == (RECORDED, '', 'Ann')
        assert [a.query_id for a in journal.replay_candidates('', 9)] == ['q2']
        assert {o.query_id: o.corrected for o in journal.answer_outcomes('', 9)} == {
            'q1': True, 'q2': False}
        assert not journal.pending()


def test_a_text_follows_a_thumbs_down(robot: Robot) -> None:
    robot.ask(QUESTION, id='q')
    robot.engine.correct(Correction('', id='down', query_id='q'))
    until(robot, 'down', RECORDED)
    assert robot.correct(Correction(RIGHT, id='text', query_id='q')).state is LEARNED
    assert robot.ask(QUESTION).text == RIGHT


def test_a_hint_is_proposed_and_learned_when_it_is_confirmed(taught: Robot, tmp_path: Path) -> None:
    taught.engine.correct(Correction('', id='hint', query_id='q', hint=HINT))
    assert until(taught, 'hint', PROPOSED).corrected == RIGHT
    assert states(taught, 'hint') == [ACCEPTED, PROPOSED]
    assert not taught.engine.learner.status().waiting
    taught.engine.correct(Correction('', id='hint', query_id='q'))
    assert until(taught, 'hint', *CorrectionState).corrected == RIGHT, 'its status can be read'

    taught.engine.correct(Correction(RIGHT, id='hint'))
    until(taught, 'hint', LEARNED, FAILED)
    assert states(taught, 'hint')[3:] == [ACCEPTED, TRAINING, LEARNED]
    assert taught.ask(QUESTION).text == RIGHT
    with Journal(tmp_path / JOURNAL) as journal:
        assert journal.correction('hint').hint == HINT


def test_a_proposal_may_be_confirmed_with_another_text(taught: Robot) -> None:
    taught.engine.correct(Correction('', id='hint', query_id='q', hint=HINT))
    until(taught, 'hint', PROPOSED)
    assert taught.correct(Correction('Rover, a robot.', id='hint')).state is LEARNED
    assert taught.ask(QUESTION).text == 'Rover, a robot.'


def test_hints_are_learned_by_themselves_if_allowed(taught: Robot) -> None:
    taught.engine.update(taught.engine.settings.updated({'correction.accept_hints': True}))
    taught.engine.correct(Correction('', id='hint', query_id='q', hint=HINT))
    until(taught, 'hint', LEARNED, FAILED)
    assert states(taught, 'hint') == [ACCEPTED, PROPOSED, ACCEPTED, TRAINING, LEARNED]
    assert taught.ask(QUESTION).text == RIGHT


@pytest.mark.parametrize(('fields', 'reason'), [
    ({'rejected': RIGHT}, 'equal to the rejected answer'),
    ({'hint': 'Sing.'}, 'does not end within generation.max_tokens')])
def test_a_hint_that_leads_nowhere_fails_with_a_reason(
        taught: Robot, fields: dict[str, str], reason: str) -> None:
    if 'hint' in fields:
        taught.engine.update(taught.engine.settings.updated({'generation.max_tokens': 1}))
    taught.engine.correct(Correction('', id='hint', query_id='q', **{'hint': HINT, **fields}))
    assert reason in until(taught, 'hint', FAILED, PROPOSED).reason


@pytest.mark.parametrize(('failures', 'state'), [(2, PROPOSED), (3, FAILED)])
def test_a_hint_is_answered_again_after_a_device_error(
        taught: Robot, monkeypatch: pytest.MonkeyPatch, failures: int,
        state: CorrectionState) -> None:
    """A few times: it might be what the device fails at."""
    run, failed = taught.engine.model.run, []

    def fails(*arguments: Any, **options: Any) -> Any:
        if len(failed) < failures:
            failed.append(1)
            raise torch.OutOfMemoryError('injected')
        return run(*arguments, **options)

    monkeypatch.setattr(taught.engine.model, 'run', fails)
    taught.engine.correct(Correction('', id='hint', query_id='q', hint=HINT))
    assert until(taught, 'hint', PROPOSED, FAILED).state is state
    assert len(failed) == failures


def test_a_hint_is_answered_after_a_restart(everywhere: Settings, tmp_path: Path) -> None:
    robot = Robot(build_engine(everywhere, storage=tmp_path))
    robot.ask(QUESTION, id='q')
    robot.correct(Correction(RIGHT, id='taught', prompt=f'{HINT}\n\n{QUESTION}'))
    robot.engine.correct(Correction('', id='hint', query_id='q', hint=HINT))
    until(robot, 'hint', ACCEPTED)
    assert PROPOSED not in {e.state for e in robot.engine.close()
                            if isinstance(e, CorrectionStatus)}
    with robot_with(everywhere, tmp_path) as again:
        again.events += again.engine.start()
        assert until(again, 'hint', PROPOSED, FAILED).corrected == RIGHT


def test_an_id_that_was_used_is_refused_for_another_correction(robot: Robot) -> None:
    for name in ('q1', 'q2'):
        robot.ask(f'Question {name}?', id=name)
    first = Correction(RIGHT, id='one', query_id='q1')
    assert robot.correct(first).state is LEARNED
    for other in (replace(first, query_id='q2'), replace(first, corrected='Spot.'),
                  replace(first, corrected='', hint=HINT)):
        status = robot.correct(other)
        assert (status.state, status.reason) == (CorrectionState.REJECTED, USED_ID), other
    assert robot.correct(first).state is LEARNED, 'sent again'


def test_a_confirmed_hint_may_be_sent_again_but_not_with_another_text(taught: Robot) -> None:
    hint = Correction('', id='hint', query_id='q', hint=HINT)
    taught.engine.correct(hint)
    until(taught, 'hint', PROPOSED)
    wrong = taught.correct(Correction(RIGHT, id='hint', query_id='another'))
    assert (wrong.state, wrong.reason) == (CorrectionState.REJECTED, USED_ID)
    text = Correction(RIGHT, id='hint', query_id='q')
    assert taught.correct(text).state is LEARNED
    assert [taught.correct(again).state for again in (hint, text)] == [LEARNED, LEARNED]
    assert taught.correct(replace(text, corrected='Spot.')).reason == USED_ID


def test_feedback_is_exported_and_imported_as_it_is(robot: Robot, tmp_path: Path) -> None:
    robot.ask(QUESTION, id='q')
    robot.engine.correct(Correction('', id='down', query_id='q'))
    until(robot, 'down', RECORDED)
    with Journal(tmp_path / JOURNAL) as journal, Journal(tmp_path / 'other') as other:
        counts = import_lines(other, export(journal, 'a model'), 'a model', lambda *_: None)
        assert counts['corrections'] == 1
        assert other.correction('down') == journal.correction('down')
        assert not other.replay_candidates('', 9)
