# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Answers, corrections and versions in the journal."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
import math
from pathlib import Path
import sqlite3

import pytest
from support.records import answer, correction

from mace_ros.api.events import CorrectionState, VersionState
from mace_ros.store import answers
from mace_ros.store.journal import Journal
from mace_ros.store.journal_file import JournalError
from mace_ros.store.records import AnswerRecord, VersionRecord
from mace_ros.store.schema import MIGRATIONS

LEARNED, TRAINING = CorrectionState.LEARNED, CorrectionState.TRAINING


# Answers and corrections

def test_all_records_survive_a_restart(journal_path: Path) -> None:
    """Ids, texts of any language, states and times survive; unknown scores stay NaN."""
    given = answer(
        'q1', 'Wer hat dich gebaut? 你好 \N{ROBOT FACE} \0 "', conversation_id='c', profile='Zoë',
        adapter_version=3, matched_correction_id='k0', out_of_scope=True, no_learn=True,
        time=1753.25)
    record = correction(
        'k1', query_id='q1', conversation_id='c', profile='Zoë', weight=2.5, source='Ann',
        received=1754.5, scope='everywhere')
    version = VersionRecord(
        profile='Zoë', version=1, parent=0, correction_ids=('k1',), score_before=-2.5,
        train_tokens=2**40, train_seconds=1.5, path='adapters/zoe/v000001', sha256='ab', created=3)
    with Journal(journal_path) as journal:
        journal.record_answer(given)
        assert journal.accept(record)
        assert journal.set_correction('k1', TRAINING)
        assert journal.publish(version) == ('k1',)
    with Journal(journal_path) as journal:
        assert journal.answer('q1') == given
        assert journal.correction('k1') == replace(record, state=LEARNED, adapter_version=1)
        live = journal.newest('Zoë')
        assert live is not None and math.isnan(live.score_after)
        assert replace(live, score_after=0.0) == replace(version, score_after=0.0)
        assert journal.live_versions() == (live,)
        assert journal.newest('') is None
        assert journal.answer('q2') is None and journal.correction('k2') is None


def test_the_file_is_set_up_for_power_failures(journal: Journal, journal_path: Path) -> None:
    """WAL with synchronous=FULL, which kill -9 can't tell from NORMAL."""
    settings = {name: journal.rows(f'PRAGMA {name}')[0][0]
                for name in ('journal_mode', 'synchronous', 'user_version')}
    assert settings == {'journal_mode': 'wal', 'synchronous': 2, 'user_version': 12}


def test_a_journal_of_schema_1_is_migrated(journal_path: Path) -> None:
    """Its rows are kept, and the new columns have their defaults."""
    journal_path.parent.mkdir()
    with closing(sqlite3.connect(journal_path, isolation_level=None)) as old:
        for statement in MIGRATIONS[0]:
            old.execute(statement)
        old.execute('PRAGMA user_version = 1')
        old.execute("INSERT INTO answers VALUES (1, 'q', '', 'ann', '[1]', '[]', 'a', '[2]', 3, 0, "
                    "4.5, 'key')")
        old.execute("INSERT INTO profiles VALUES ('ann', 0, 2)")
    with Journal(journal_path) as journal:
        assert journal.answer('q') == AnswerRecord(
            'q', (1,), (), 'a', (2,), profile='ann', adapter_version=3, time=4.5)
        assert journal.next_version('ann') == 3
    with Journal(journal_path) as journal:
        assert journal.answer('q') is not None


def test_the_last_answer_of_a_conversation_is_the_one_recorded_last(journal: Journal) -> None:
    """By insertion, not by time stamps; the empty id is no conversation."""
    journal.record_answer(answer('q1', conversation_id='a', time=50.0))
    journal.record_answer(answer('q2', conversation_id='a', time=10.0))
    journal.record_answer(answer('q3'))
    last = journal.last_answer('a')
    assert last is not None and last.query_id == 'q2'
    assert journal.last_answer('') is None and journal.last_answer('b') is None
    journal.record_answer(answer('q1', conversation_id='a', text='again'))
    last = journal.last_answer('a')
    assert last is not None and last.text == 'again'


def test_a_correction_id_is_accepted_once(journal: Journal) -> None:
    """Accepting it again changes nothing, not even the state."""
    assert journal.accept(correction('k'))
    assert journal.set_correction('k', LEARNED, adapter_version=4)
    assert not journal.accept(correction('k', corrected='something else'))
    kept = journal.correction('k')
    assert kept is not None
    assert (kept.corrected, kept.state, kept.adapter_version) == ('right', LEARNED, 4)
    assert not journal.set_correction('unknown', TRAINING)
    # if_pending leaves a correction alone that has a final state by now.
    journal.set_correction('k', CorrectionState.SUPERSEDED, 'by correction k2')
    assert not journal.set_correction('k', TRAINING, if_pending=True)
    kept = journal.correction('k')
    assert kept is not None and kept.state is CorrectionState.SUPERSEDED
    assert not journal.pending()


def test_pending_are_accepted_and_training_corrections(journal: Journal) -> None:
    """Oldest first, of one profile or of all."""
    for name, profile in (('k1', ''), ('k2', 'ann'), ('k3', ''), ('k4', ''), ('k5', '')):
        journal.accept(correction(name, profile=profile, received=-float(name[1])))
    journal.set_correction('k3', TRAINING)
    journal.set_correction('k4', CorrectionState.FAILED, 'too hard')
    journal.set_correction('k5', CorrectionState.SUPERSEDED)
    assert [record.id for record in journal.pending()] == ['k1', 'k2', 'k3']
    assert [record.id for record in journal.pending('')] == ['k1', 'k3']
    assert [record.id for record in journal.pending('ann')] == ['k2']


def test_old_answers_are_deleted_unless_a_pending_correction_needs_them(journal_path: Path) -> None:
    with Journal(journal_path, max_answers=5) as journal:
        for number in range(4):
            journal.record_answer(answer(f'q{number}'))
        journal.accept(correction('k', query_id='q1'))
        for number in range(4, 20):
            journal.record_answer(answer(f'q{number}'))
        kept = [number for number in range(20) if journal.answer(f'q{number}')]
        assert kept == [1, 15, 16, 17, 18, 19]
        journal.set_correction('k', LEARNED, adapter_version=1)
        journal.record_answer(answer('q20'))
        kept = [number for number in range(21) if journal.answer(f'q{number}')]
        assert kept == [16, 17, 18, 19, 20]


def test_base_answers_are_of_one_model_and_bounded(
        journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat template that contains the date makes new prompts every day."""
    monkeypatch.setattr(answers, 'MAX_BASE_ANSWERS', 3)
    journal.record_base_answer('old', [0], [9])
    for i in range(5):
        journal.record_base_answer('new', [i], [i, i])
    assert journal.base_answers('old') == {}
    assert journal.base_answers('new') == {(i,): [i, i] for i in (2, 3, 4)}


def test_replay_candidates_are_answers_to_uncorrected_questions(journal: Journal) -> None:
    """Newest first, one per question, none with no_learn."""
    journal.record_answer(answer('sky1', 'What colour is the sky?'))
    journal.record_answer(answer('other', profile='ann'))
    journal.record_answer(answer('name1', 'What is your name?'))
    journal.record_answer(answer('private', no_learn=True))
    journal.record_answer(answer('sky2', '  what colour is  the SKY?'))
    journal.record_answer(answer('name2', 'What is your name?'))
    journal.record_answer(answer('sum', '1 + 1?'))
    journal.record_answer(answer('wrong'))
    # The same wrong answer was given twice and corrected once.
    journal.accept(correction('k1', 'What is your name?', query_id='name2'))
    journal.accept(correction('k2', query_id='wrong', state=CorrectionState.FAILED))

    def found(profile: str = '', limit: int = 9) -> list[str]:
        return [a.query_id for a in journal.replay_candidates(profile, limit)]

    assert found() == ['sum', 'sky2']
    assert found(limit=1) == ['sum'] and found(limit=0) == []
    assert found('ann') == ['other']


# Versions

def test_publishing_is_all_or_nothing(journal: Journal, journal_path: Path) -> None:
    """An error at the last correction leaves no version and no LEARNED correction."""
    journal.accept(correction('k1'))
    journal.accept(correction('k2'))
    journal.execute(
        "CREATE TEMP TRIGGER fails BEFORE UPDATE ON corrections WHEN new.id = 'k2' "
        "BEGIN SELECT raise(ABORT, 'injected'); END")
    with pytest.raises(JournalError, match='injected'):
        journal.publish(VersionRecord('', 1, 0, correction_ids=('k1', 'k2')))
    assert journal.versions() == () and journal.newest('') is None
    assert len(journal.pending()) == 2


def test_publishing_leaves_superseded_corrections_alone(journal: Journal) -> None:
    """A correction superseded during training does not become LEARNED."""
    for name in ('k1', 'k2', 'k3'):
        journal.accept(correction(name))
    journal.set_correction('k2', CorrectionState.SUPERSEDED)
    assert journal.publish(VersionRecord('', 1, 0, correction_ids=('k2', 'k1'))) == ('k1',)
    assert [record.id for record in journal.learned('')] == ['k1']
    assert journal.learned('ann') == ()
    assert journal.publish(VersionRecord('', 2, 1, correction_ids=('k1', 'k3'))) == ('k3',)
    assert [record.adapter_version for record in journal.learned('')] == [1, 2]
    live = journal.newest('')
    assert live is not None and live.version == 2
    assert [record.version for record in journal.versions('')] == [1, 2]


def test_a_version_number_is_never_reused(journal_path: Path) -> None:
    """Neither that of a rejected version nor that of one lost in a crash."""
    with Journal(journal_path) as journal:
        assert journal.next_version('') == 1
        journal.record_version(VersionRecord('', 1, 0, VersionState.REJECTED, 'worse'))
        assert journal.newest('') is None
        assert journal.next_version('') == 2  # the process ends before it is recorded
    with Journal(journal_path) as journal:
        assert journal.next_version('') == 3
        journal.publish(VersionRecord('', 3, 0))
        journal.publish(VersionRecord('', 7, 3))
        assert journal.next_version('') == 8
        assert journal.next_version('ann') == 1
        with pytest.raises(ValueError, match='already in the journal'):
            journal.record_version(VersionRecord('', 7, 3))
        with pytest.raises(ValueError, match='not PUBLISHED'):
            journal.publish(VersionRecord('', 9, 7, VersionState.REJECTED))
        with pytest.raises(ValueError, match='base model'):
            journal.record_version(VersionRecord('', 0, 0))
        live = journal.newest('')
        assert live is not None and live.version == 7
