# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Answers on record that call a tool are guarded: a version that breaks one is rejected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.records import answer, correction
from support.robot import Robot, robot_with

from mace_ros.api.events import (
    AdapterVersion,
    Correction,
    CorrectionState,
    VersionState,
)
from mace_ros.api.settings import AdapterSettings, Settings
from mace_ros.learning.live_versions import LiveVersions
from mace_ros.learning.question import questions
from mace_ros.learning.training_set import TrainingSet
from mace_ros.memory.adapter_slots import ServedVersion
from mace_ros.store.journal import Journal
from mace_ros.store.records import VersionRecord

WHERE = 'Where is the dock?'

pytestmark = pytest.mark.timeout(300)


def asked(robot: Robot, *, calls_tool: bool) -> str:
    """Answer a question, and put the answer on record as a call of a tool, or as none."""
    text = robot.ask(WHERE, id='where', temperature=0.0).text
    journal = robot.engine.parts.journal
    record = journal.submit(lambda j: j.answer('where')).result()
    journal.submit(lambda j: j.record_answer(
        replace(record, calls_tool=calls_tool), given_now=False)).result()
    return text


def settings_of(settings: Settings, scope: str) -> Settings:
    """Return settings with which nothing is replayed."""
    return settings.updated({
        'adapter.scope': scope, 'finetune.replay_samples': 0, 'adapter.scope_threshold': 0.0})


@pytest.mark.parametrize('scope', ['everywhere', 'similar'])
def test_what_calls_a_tool_stays_word_for_word(
        settings: Settings, tmp_path: Path, scope: str) -> None:
    with robot_with(settings_of(settings, scope), tmp_path) as robot:
        text = asked(robot, calls_tool=True)
        status = robot.correct(
            Correction('A robot.', id='who', prompt='Who is at the dock?'), 240.0)
        assert status.state is CorrectionState.LEARNED, status
        assert robot.ask(WHERE, temperature=0.0).text == text


@pytest.mark.parametrize('scope', ['everywhere', 'similar'])
def test_a_version_that_breaks_a_call_is_rejected(
        settings: Settings, tmp_path: Path, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if training could not give back what it has broken.
    monkeypatch.setattr(TrainingSet, 'add_lost', lambda *_: None)
    with robot_with(settings_of(settings, scope).updated({'finetune.max_steps': 20}),
                    tmp_path) as robot:
        text = asked(robot, calls_tool=True)
        robot.engine.correct(Correction('A robot.', id='who', prompt='Who is at the dock?'))
        rejected = robot.until(lambda e: isinstance(e, AdapterVersion), 240.0)
        assert rejected.state is VersionState.REJECTED
        assert rejected.reason == 'tool calls: 1 of 1 would be lost'
        assert robot.ask(WHERE, temperature=0.0).text == text


def test_the_newest_calls_of_uncorrected_questions_are_guarded(tmp_path: Path) -> None:
    journal = Journal(tmp_path / 'journal.sqlite')
    for record in (answer('text'), answer('call', calls_tool=True),
                   answer('secret', calls_tool=True, no_learn=True),
                   answer('tools', calls_tool=True, tools=({'name': 'move'},))):
        journal.record_answer(record)
    found = journal.replay_candidates('', 10, calls_tool=True)
    assert [a.query_id for a in found] == ['tools', 'call']
    assert found[0].tools == ({'name': 'move'},)
    assert [a.query_id for a in journal.replay_candidates('', 1, calls_tool=True)] == ['tools']
    journal.close()


def test_a_call_is_guarded_if_the_version_is_to_answer_its_question() -> None:
    live, settings = LiveVersions(lambda _: 1e-4), AdapterSettings()
    learned = [correction('c', 'Where is the red dock?')]
    near, far = (questions(({'role': 'user', 'content': text},))
                 for text in ('Where is the dock that is red?', 'Sing a song of sixpence.'))
    fresh, version = ServedVersion('', 0), ServedVersion('', 1)
    assert live.will_answer(fresh, near, learned, settings)
    assert not live.will_answer(fresh, far, learned, settings)
    assert not live.will_answer(fresh, near, [], settings)
    live.publish(VersionRecord('', 1, 0), [replace(learned[0], adapter_version=1)])
    assert live.will_answer(version, near, [], settings)        # what it has learned already
    assert not live.will_answer(fresh, near, [], settings)
