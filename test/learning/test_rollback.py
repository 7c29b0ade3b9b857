# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Rollback to an earlier version: in the journal, and while queries are served."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
import time

import pytest
from support.robot import NO_END, Robot

from mace_ros.api.events import (
    AdapterVersion,
    Correction,
    CorrectionState,
    CorrectionStatus,
    Event,
    Query,
    Response,
    ResponseChunk,
    VersionState,
)
from mace_ros.api.settings import Settings
from mace_ros.engine.builder import build_engine
from mace_ros.learning.rollback import roll_back, RollbackRefused, RolledBack
from mace_ros.store.adapter_store import CorruptVersion
from mace_ros.store.journal import Journal
from mace_ros.store.records import CorrectionRecord, VersionRecord

ACCEPTED, LEARNED = CorrectionState.ACCEPTED, CorrectionState.LEARNED
SUPERSEDED, FAILED = CorrectionState.SUPERSEDED, CorrectionState.FAILED
PUBLISHED, ROLLED_BACK = VersionState.PUBLISHED, VersionState.ROLLED_BACK


def correct(journal: Journal, name: str, question: str = '', profile: str = '',
            replaces: str = '') -> None:
    """Accept a correction as the engine does."""
    question = question or f'question of {name}'
    record = CorrectionRecord(
        name, tuple(question.encode()), ({'role': 'user', 'content': question},), name,
        profile=profile, replaces=replaces)
    journal.accept(record)
    journal.supersede(record)


def publish(journal: Journal, version: int, *corrections: str, profile: str = '',
            continues: int | None = None) -> None:
    """Publish the next version, by default as a continuation of the live one."""
    live = journal.newest(profile)
    parent = live.version if live else 0
    assert journal.next_version(profile) == version
    journal.publish(VersionRecord(
        profile, version, parent, correction_ids=corrections,
        continues=parent if continues is None else continues,
        path=f'adapters/{profile}/v{version}', sha256='ab'))


def states(journal: Journal, *names: str) -> list[CorrectionState]:
    """Return the states of these corrections."""
    records = [journal.correction(name) for name in names]
    return [r.state for r in records if r is not None]


def live(journal: Journal, profile: str = '') -> int:
    """Return the live version."""
    record = journal.newest(profile)
    return record.version if record else 0


# In the journal

def test_corrections_of_rolled_back_versions_fail(journal: Journal) -> None:
    """Those of the older version stay LEARNED, and pending ones stay pending."""
    for number, name in enumerate('abc', 1):
        correct(journal, name)
        publish(journal, number, name)
    correct(journal, 'waits')
    outcome = roll_back(journal, '', 1, 'it was rude')
    assert (outcome.profile, outcome.changed) == ('', True)
    assert outcome.live is not None and outcome.live.version == live(journal) == 1
    assert [(v.version, v.state, v.reason) for v in outcome.taken_back] == [
        (3, ROLLED_BACK, 'it was rude'), (2, ROLLED_BACK, 'it was rude')]
    assert [(c.id, c.state, c.adapter_version) for c in outcome.corrections] == [
        ('b', FAILED, 2), ('c', FAILED, 3)]
    assert 'version 2' in outcome.corrections[0].reason
    assert 'it was rude' in outcome.corrections[0].reason
    assert states(journal, 'a', 'b', 'c', 'waits') == [LEARNED, FAILED, FAILED, ACCEPTED]
    assert [v.state for v in journal.versions('')] == [PUBLISHED, ROLLED_BACK, ROLLED_BACK]
    assert [c.id for c in journal.learned('')] == ['a']
    # They are not learned again automatically.
    assert [c.id for c in journal.pending()] == ['waits']
    assert journal.next_version('') == 4


def test_a_rollback_can_be_undone(journal: Journal) -> None:
    """The records are then as before; a second time changes nothing."""
    for number, name in enumerate('abc', 1):
        correct(journal, name)
        publish(journal, number, name)
    versions = journal.versions('')
    roll_back(journal, '', 0, '')
    assert live(journal) == 0 and states(journal, 'a', 'b', 'c') == [FAILED] * 3
    outcome = roll_back(journal, '', 3, '')
    assert outcome.changed and not outcome.taken_back
    assert states(journal, 'a', 'b', 'c') == [LEARNED] * 3
    assert str(journal.versions('')) == str(versions)
    assert not roll_back(journal, '', 3, '').changed


def test_superseded_corrections_become_learned_again(journal: Journal) -> None:
    """Unless a newer correction of the same question is pending."""
    for number, (name, question) in enumerate(
            [('old', 'one?'), ('new', 'one?'), ('other', 'two?'), ('third', 'two?')], 1):
        correct(journal, name, question)
        publish(journal, number, name)
    assert states(journal, 'old', 'new', 'other', 'third') == [
        SUPERSEDED, LEARNED, SUPERSEDED, LEARNED]
    correct(journal, 'waits', 'two?')
    assert states(journal, 'third', 'waits') == [SUPERSEDED, ACCEPTED]
    outcome = roll_back(journal, '', 1, '')
    assert [(c.id, c.state) for c in outcome.corrections] == [('old', LEARNED), ('new', FAILED)]
    outcome = roll_back(journal, '', 3, '')
    assert states(journal, 'old', 'new', 'other', 'third', 'waits') == [
        SUPERSEDED, LEARNED, SUPERSEDED, SUPERSEDED, ACCEPTED]


def test_what_was_corrected_in_other_words_becomes_learned_again(journal: Journal) -> None:
    """It defines the scope until its replacement is learned, and after a rollback."""
    def scope() -> list[str]:
        return [record.id for record in journal.scope('')]

    correct(journal, 'old', 'one?')
    publish(journal, 1, 'old')
    correct(journal, 'new', 'one in other words?', replaces='old')
    assert (states(journal, 'old', 'new'), scope()) == ([SUPERSEDED, ACCEPTED], ['old'])
    publish(journal, 2, 'new')
    assert (states(journal, 'old', 'new'), scope()) == ([SUPERSEDED, LEARNED], ['new'])
    roll_back(journal, '', 1, '')
    assert (states(journal, 'old', 'new'), scope()) == ([LEARNED, FAILED], ['old'])
    roll_back(journal, '', 2, '')
    assert (states(journal, 'old', 'new'), scope()) == ([SUPERSEDED, LEARNED], ['new'])
    (first, _) = journal.versions('')
    assert [record.id for record in journal.scope_of(first)] == ['old']


def test_a_pending_correction_passes_on_what_it_replaces(journal: Journal) -> None:
    """Otherwise, a later rollback would bring back the old answer to the question."""
    correct(journal, 'old', 'one?')
    publish(journal, 1, 'old')
    correct(journal, 'new', 'one in other words?', replaces='old')
    correct(journal, 'newest', 'one in other words?')
    assert states(journal, 'old', 'new', 'newest') == [SUPERSEDED, SUPERSEDED, ACCEPTED]
    stored = journal.correction('newest')
    assert stored is not None and stored.replaces == 'old'
    publish(journal, 2, 'newest')
    assert [record.id for record in journal.scope('')] == ['newest']
    roll_back(journal, '', 1, '')
    assert states(journal, 'old', 'newest') == [LEARNED, FAILED]


def test_an_older_correction_never_supersedes_a_newer_one(journal: Journal) -> None:
    """Even if it is learned later."""
    correct(journal, 'old', 'one?')
    correct(journal, 'new', 'one in other words?')
    publish(journal, 1, 'new')
    old = journal.correction('old')
    assert old is not None and journal.supersede(replace(old, replaces='new')) == ()
    assert states(journal, 'old', 'new') == [ACCEPTED, LEARNED]


def test_only_the_live_lineage_is_rolled_back(journal: Journal) -> None:
    """Versions that were rolled back before are no part of it."""
    for number, name in enumerate('ab', 1):
        correct(journal, name)
        publish(journal, number, name)
    roll_back(journal, '', 1, '')
    correct(journal, 'c')
    publish(journal, 3, 'c')
    outcome = roll_back(journal, '', 2, '')
    assert [v.version for v in outcome.taken_back] == [3]
    assert states(journal, 'a', 'b', 'c') == [LEARNED, LEARNED, FAILED]


def test_a_version_is_withdrawn_with_those_that_continue_it(journal: Journal) -> None:
    """Newer ones beside it stay, and what it had continued is live again."""
    for version, name, continues in ((1, 'a', 0), (2, 'b', 1), (3, 'c', 0), (4, 'd', 2),
                                     (5, 'e', 3), (6, 'f', 4)):
        correct(journal, name)
        publish(journal, version, name, continues=continues)
    outcome = roll_back(journal, '', 2, 'it was rude', withdraw=True)
    assert [v.version for v in outcome.taken_back] == [6, 4, 2]
    assert outcome.changed and outcome.live is not None and outcome.live.version == 5
    assert states(journal, *'abcdef') == [LEARNED, FAILED, LEARNED, FAILED, LEARNED, FAILED]
    assert journal.live_lineage('').successors == {1: 1, 3: 5, 5: 5}
    assert [c.id for c in journal.scope('')] == ['a', 'c', 'e']
    correct(journal, 'g')
    publish(journal, 7, 'g', continues=0)
    assert [v.version for v in journal.live_lineage('').live] == [7, 5, 1]
    with pytest.raises(RollbackRefused, match='not live any more'):
        roll_back(journal, '', 4, '', withdraw=True)
    # A rollback to it undoes that.
    assert [v.version for v in roll_back(journal, '', 6, '').taken_back] == [7]
    assert states(journal, *'abcdefg') == [LEARNED] * 6 + [FAILED]
    assert [v.version for v in roll_back(journal, '', 4, '').taken_back] == [6, 5]


def test_all_versions_can_be_withdrawn(journal: Journal) -> None:
    correct(journal, 'a')
    publish(journal, 1, 'a')
    assert roll_back(journal, '', 1, '', withdraw=True).live is None
    assert (live(journal), states(journal, 'a')) == (0, [FAILED])


def test_an_impossible_rollback_is_refused_with_a_reason(journal: Journal) -> None:
    """Nothing is changed."""
    correct(journal, 'a')
    publish(journal, 1, 'a')
    journal.record_version(VersionRecord('', 2, 1, VersionState.REJECTED, 'it forgot too much'))
    journal.publish(VersionRecord('', 3, 1))
    journal.publish(VersionRecord('', 4, 3, path='adapters/_robot/v4', sha256='ab'))
    for version, why in ((2, 'it forgot too much'), (3, 'storage.max_versions'), (9, 'on record')):
        with pytest.raises(RollbackRefused, match=why):
            roll_back(journal, '', version, '')
        assert live(journal) == 4
    with pytest.raises(RollbackRefused, match="profile 'ann' has no version 1"):
        roll_back(journal, 'ann', 1, '')


# While queries are served

@pytest.fixture(scope='module')
def settings(settings: Settings) -> Settings:
    """Return settings with which versions answer questions that they were not taught, too."""
    return settings.updated({'adapter.scope': 'everywhere'})


def teach(robot: Robot, *corrected: str, question: str = 'Who are you?', profile: str = '') -> None:
    """Let corrections of a question be learned one by one."""
    for text in corrected:
        state = robot.correct(Correction(text, id=text, prompt=question, profile=profile))
        assert state.state is LEARNED, state.reason


def rolled_back(robot: Robot, version: int, profile: str = '') -> RolledBack:
    """Roll back, step until it is done, and return the outcome."""
    return stepped(robot, robot.engine.rollback(profile, version, 'a test'))


def stepped(robot: Robot, future: Future[RolledBack], seconds: float = 100.0) -> RolledBack:
    """Step until a rollback is done."""
    end = time.monotonic() + seconds
    while not future.done():
        assert time.monotonic() < end
        robot.events += robot.engine.step().events
        time.sleep(0.001)
    robot.events += robot.engine.step().events
    return future.result()


def since(robot: Robot, start: int) -> list[Event]:
    """Return the events of versions and corrections from an index on."""
    return [e for e in robot.events[start:] if isinstance(e, (AdapterVersion, CorrectionStatus))]


def test_the_next_query_gets_the_older_version(settings: Settings, tmp_path: Path) -> None:
    """Running queries end on the newer one; a restart changes nothing."""
    robot = Robot(build_engine(settings, storage=tmp_path))
    teach(robot, 'A robot.', 'Your friend.')
    robot.engine.submit(Query(
        'Tell me a long story about the sea.', id='running', max_tokens=3500, **NO_END))
    robot.until(lambda e: isinstance(e, ResponseChunk) and e.query_id == 'running')
    start = len(robot.events)
    outcome = rolled_back(robot, 1)
    assert outcome.live is not None and outcome.live.version == 1
    told = since(robot, start)
    assert [(e.version, e.state) for e in told if isinstance(e, AdapterVersion)] == [
        (2, ROLLED_BACK), (1, PUBLISHED)]
    assert [(e.id, e.state) for e in told if isinstance(e, CorrectionStatus)] == [
        ('A robot.', LEARNED), ('Your friend.', FAILED)]
    answer = robot.ask('Who are you?')
    assert (answer.text, answer.adapter_version) == ('A robot.', 1)
    assert not any(isinstance(e, Response) and e.query_id == 'running' for e in robot.events)
    robot.engine.cancel('running')
    assert robot.response('running').adapter_version == 2
    # To the base model, and forward again.
    assert rolled_back(robot, 0).live is None
    assert robot.ask('Who are you?').adapter_version == 0
    rolled_back(robot, 2)
    assert robot.ask('Who are you?').text == 'Your friend.'
    rolled_back(robot, 1)
    robot.engine.close()
    again = Robot(build_engine(settings, storage=tmp_path))
    assert again.ask('Who are you?').text == 'A robot.'
    again.engine.close()


def test_training_starts_anew_from_the_older_version(robot: Robot) -> None:
    """No version has a rolled-back parent, and no correction is lost."""
    teach(robot, 'A robot.', 'Your friend.')
    robot.engine.correct(Correction('In the hall.', id='k', prompt='Where do you live?'))
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == 'k'
                and e.state is CorrectionState.TRAINING)
    rolled_back(robot, 1)
    published = robot.until(lambda e: isinstance(e, AdapterVersion) and e.version == 3)
    assert isinstance(published, AdapterVersion)
    assert (published.state, published.parent, published.correction_ids) == (PUBLISHED, 1, ('k',))
    assert robot.ask('Who are you?').text == 'A robot.'
    assert robot.ask('Where do you live?').text == 'In the hall.'


def test_a_rollback_to_an_unreadable_or_unknown_version_changes_nothing(
        robot: Robot, tmp_path: Path) -> None:
    teach(robot, 'A robot.', 'Your friend.')
    weights = tmp_path / 'adapters/_robot/v000001/adapter_model.safetensors'
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    start = len(robot.events)
    with pytest.raises(CorruptVersion, match='SHA-256'):
        rolled_back(robot, 1)
    with pytest.raises(RollbackRefused, match='no version 5'):
        rolled_back(robot, 5)
    assert not since(robot, start)
    assert robot.ask('Who are you?').text == 'Your friend.'
    assert not rolled_back(robot, 2).changed
    assert not since(robot, start)
