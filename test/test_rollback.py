# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Back to an earlier version: in the journal, in the slots, and while queries are served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mace_ros.events import CorrectionState, VersionState
from mace_ros.learning.journal import CorrectionRecord, Journal, VersionRecord
from mace_ros.learning.rollback import roll_back, RollbackRefused
from mace_ros.memory.adapter_slots import AdapterSlots

ACCEPTED, LEARNED = CorrectionState.ACCEPTED, CorrectionState.LEARNED
SUPERSEDED, FAILED = CorrectionState.SUPERSEDED, CorrectionState.FAILED
PUBLISHED, ROLLED_BACK = VersionState.PUBLISHED, VersionState.ROLLED_BACK


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """Return an empty journal."""
    with Journal(tmp_path / 'journal.sqlite') as opened:
        yield opened


def correct(journal: Journal, name: str, question: str = '', profile: str = '') -> None:
    """Accept a correction, as the engine does."""
    question = question or f'question of {name}'
    record = CorrectionRecord(
        name, tuple(question.encode()), ({'role': 'user', 'content': question},), name,
        profile=profile)
    journal.accept(record)
    journal.supersede(record)


def publish(journal: Journal, version: int, *corrections: str, profile: str = '',
            parent: int | None = None) -> None:
    """Publish the next version after the live one, or after another one."""
    live = journal.live(profile)
    if parent is None:
        parent = live.version if live else 0
    assert journal.next_version(profile) == version
    journal.publish(VersionRecord(
        profile, version, parent, correction_ids=corrections,
        path=f'adapters/{profile}/v{version}'))


def states(journal: Journal, *names: str) -> list[CorrectionState]:
    """Return the states of these corrections."""
    records = [journal.correction(name) for name in names]
    return [r.state for r in records if r is not None]


def live(journal: Journal, profile: str = '') -> int:
    """Return the live version."""
    record = journal.live(profile)
    return record.version if record else 0


# In the journal

def test_what_was_learned_since_is_not_called_learned(journal: Journal) -> None:
    """Two versions are taken back; what the older one holds and what waits stays as it is."""
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
    # They are not learned again by themselves.
    assert [c.id for c in journal.pending()] == ['waits']
    assert journal.next_version('') == 4


def test_a_rollback_can_be_taken_back(journal: Journal) -> None:
    """Afterwards all is as it was before; a second time changes nothing."""
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


def test_what_was_contradicted_since_is_learned_again(journal: Journal) -> None:
    """Unless a newer correction of the same question waits."""
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


def test_only_a_branch_is_taken_back(journal: Journal) -> None:
    """After a rollback new versions grow from the older one; those in between stay out."""
    for number, name in enumerate('ab', 1):
        correct(journal, name)
        publish(journal, number, name)
    roll_back(journal, '', 1, '')
    correct(journal, 'c')
    publish(journal, 3, 'c')
    outcome = roll_back(journal, '', 2, '')
    assert [v.version for v in outcome.taken_back] == [3]
    assert states(journal, 'a', 'b', 'c') == [LEARNED, LEARNED, FAILED]


def test_a_way_back_that_is_none_is_refused(journal: Journal) -> None:
    """Each with its reason, and nothing is changed."""
    correct(journal, 'a')
    publish(journal, 1, 'a')
    journal.record_version(VersionRecord('', 2, 1, VersionState.REJECTED, 'it forgot too much'))
    journal.publish(VersionRecord('', 3, 1))
    journal.publish(VersionRecord('', 4, 3, path='adapters/_robot/v4'))
    for version, why in ((2, 'it forgot too much'), (3, 'storage.max_versions'), (9, 'on record')):
        with pytest.raises(RollbackRefused, match=why):
            roll_back(journal, '', version, '')
        assert live(journal) == 4
    with pytest.raises(RollbackRefused, match="profile 'ann' has no version 1"):
        roll_back(journal, 'ann', 1, '')


def test_profiles_are_lines_of_their_own(journal: Journal) -> None:
    """Each begins at what the robot served at its first correction, and keeps it."""
    correct(journal, 'early', profile='early')
    correct(journal, 'a')
    publish(journal, 1, 'a')
    correct(journal, 'ann1', profile='ann')
    correct(journal, 'bob1', profile='bob')
    correct(journal, 'b')
    publish(journal, 2, 'b')
    correct(journal, 'ann2', profile='ann')

    def parent(profile: str) -> tuple[str, int] | None:
        record = journal.next_parent(profile)
        return None if record is None else (record.profile, record.version)

    assert [parent(p) for p in ('', 'early', 'ann', 'bob')] == [('', 2), None, ('', 1), ('', 1)]
    publish(journal, 1, 'ann1', profile='ann')
    assert parent('ann') == ('ann', 1)
    # The robot's version 1 was bad: who has not begun yet begins before it, and nobody
    # else is touched.
    outcome = roll_back(journal, '', 0, '')
    assert {c.id for c in outcome.corrections} == {'a', 'b'}
    assert [parent(p) for p in ('', 'early', 'ann', 'bob')] == [None, None, ('ann', 1), None]
    assert states(journal, 'ann1', 'ann2', 'bob1') == [LEARNED, ACCEPTED, ACCEPTED]
    # Back to the robot's, ann begins again where the robot is at her next correction.
    roll_back(journal, '', 2, '')
    roll_back(journal, 'ann', 0, '')
    assert parent('ann') == ('', 2)
    correct(journal, 'ann3', profile='ann')
    correct(journal, 'c')
    publish(journal, 3, 'c')
    assert (parent('ann'), parent('')) == (('', 2), ('', 3))


# In the slots

def test_a_version_that_a_request_still_holds_is_not_loaded_again() -> None:
    """Its slot serves again, and becomes free once it is neither live nor held."""
    slots = AdapterSlots(base_slot=0, first=1, count=3)
    first = slots.publish('', 1, slots.reserve() or 0)
    assert slots.pin('') == first
    slots.publish('', 2, slots.reserve() or 0)
    assert slots.free == 1
    held = slots.held('', 1)
    assert held == first.slot
    assert slots.publish('', 1, held) == first
    assert slots.free == 2 and slots.held('', 2) is None
    slots.unpin(first)
    assert slots.free == 2 and slots.live('') == first
    slots.withdraw('')
    slots.withdraw('')
    assert slots.free == 3 and slots.live('').version == 0
