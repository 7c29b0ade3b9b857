# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What a journal keeps: limits, deletion, and the files of versions."""

from __future__ import annotations

from pathlib import Path
import subprocess
import sys

import pytest
from support.records import answer, correction
from support.stored import on_disk, publish
import torch

from mace_ros.api.events import CorrectionState, InvalidCorrection
from mace_ros.learning.rollback import roll_back, RollbackRefused
from mace_ros.store.adapter_store import AdapterStore
from mace_ros.store.journal import Journal
from mace_ros.store.journal_writer import JournalWriter
from mace_ros.store.layout import JOURNAL
from mace_ros.store.lock import StorageInUse, StorageLock
from mace_ros.store.records import VersionRecord, wording_key
from mace_ros.store.retention import remove_files, tidy

ROOT = Path(__file__).resolve().parents[2]
LEARNED = CorrectionState.LEARNED


def test_surplus_corrections_are_deleted_oldest_first_but_never_pending_ones(
        tmp_path: Path) -> None:
    """Those that no version has learned go first; too many pending ones refuse new ones."""
    with Journal(tmp_path / JOURNAL) as journal:
        for name in ('learned1', 'failed', 'learned2', 'waits1', 'waits2'):
            journal.record_answer(answer(f'q-{name}', f'question of {name}'))
            journal.accept(correction(name, query_id=f'q-{name}'))
        journal.record_answer(answer('q-again', ' Question OF  failed'))
        journal.record_answer(answer('q-wanted', 'question of failed'))
        journal.accept(correction('waits3', query_id='q-wanted'))
        journal.set_correction('failed', CorrectionState.FAILED)
        for name in ('learned1', 'learned2'):
            journal.set_correction(name, LEARNED, adapter_version=1)

        def after(most: int) -> list[str]:
            journal.limit_corrections(most)
            return [record.id for record in journal.corrections()]

        assert len(after(6)) == 6
        assert after(5) == ['learned1', 'learned2', 'waits1', 'waits2', 'waits3']
        # Without the correction, the wrong answers would be replayed.
        assert journal.answer('q-failed') is None and journal.answer('q-again') is None
        assert after(4) == ['learned2', 'waits1', 'waits2', 'waits3']
        assert after(3) == ['waits1', 'waits2', 'waits3']
        with pytest.raises(InvalidCorrection, match=r'2 corrections wait.*max_corrections'):
            journal.limit_corrections(2)
        assert [record.id for record in journal.pending()] == ['waits1', 'waits2', 'waits3']
        assert journal.answer('q-waits1') is not None and journal.answer('q-wanted') is not None


def test_deleting_a_correction_deletes_answers_that_pending_ones_refer_to(tmp_path: Path) -> None:
    with Journal(tmp_path / JOURNAL) as journal:
        for query, name in (('q1', 'deleted'), ('q2', 'waits')):
            journal.record_answer(answer(query, 'the question'))
            journal.accept(correction(name, 'the question', query_id=query))
        journal.forget_corrections(['deleted'])
        assert not journal.answers()
        assert [record.id for record in journal.pending()] == ['waits']


def teach_a_name_three_times(journal: Journal) -> None:
    """Publish four versions: of k1 to k3, of which each supersedes the one before, and of k4."""
    for number, question in enumerate(('Name?', 'Name?', 'Called?', 'Who?'), 1):
        record = correction(f'k{number}', question, replaces='k2' if number == 3 else '')
        journal.accept(record)
        journal.supersede(record)
        journal.publish(VersionRecord(
            '', number, number - 1, continues=number - 1, correction_ids=(record.id,),
            path=f'v{number}', sha256='ab'))


def test_a_deleted_correction_takes_those_that_it_superseded_with_it(tmp_path: Path) -> None:
    """A rollback would make them LEARNED again, in a version that has learned the newer one."""
    with Journal(tmp_path / JOURNAL) as journal:
        teach_a_name_three_times(journal)
        deleted = journal.forget_corrections(['k3'])
        assert [record.id for record in deleted.records] == ['k1', 'k2', 'k3']
        assert journal.deleted_questions('') == {wording_key('Name?'), wording_key('Called?')}
        assert {wording for _, wording in deleted.questions} == journal.deleted_questions('')
        roll_back(journal, '', 3, '')
        assert [(c.id, c.state) for c in journal.corrections()] == [
            ('k4', CorrectionState.FAILED)]


def test_a_deleted_correction_in_a_row_of_them_brings_no_earlier_one_back(tmp_path: Path) -> None:
    with Journal(tmp_path / JOURNAL) as journal:
        teach_a_name_three_times(journal)
        journal.forget_corrections(['k2'])
        roll_back(journal, '', 3, '')
        assert [(c.id, c.state) for c in journal.corrections()] == [
            ('k3', LEARNED), ('k4', CorrectionState.FAILED)]


def test_a_deleted_correction_leaves_what_another_one_superseded(tmp_path: Path) -> None:
    """A thumbs-down has superseded nothing, and neither has one that a rollback took back."""
    with Journal(tmp_path / JOURNAL) as journal:
        for number in (1, 2, 3):
            journal.accept(correction(f'k{number}', 'Name?'))
        for name, state in (('k1', CorrectionState.SUPERSEDED), ('k2', LEARNED),
                            ('k3', CorrectionState.RECORDED)):
            journal.set_correction(name, state, adapter_version=int(name[1]))
        assert [record.id for record in journal.forget_corrections(['k3']).records] == ['k3']
        assert [record.id for record in journal.forget_corrections(['k2']).records] == ['k1', 'k2']


def test_the_newest_versions_and_those_in_use_keep_their_files(tmp_path: Path) -> None:
    """An old version stays if it answers queries: those of its scope, or all others."""
    store = AdapterStore(tmp_path)
    with Journal(tmp_path / JOURNAL) as journal:
        for _ in range(6):
            publish(journal, store)
        publish(journal, store, 'bob')
        for continues, everywhere in ((0, True), (0, False)):
            publish(journal, store, 'ann', continues=continues, everywhere=everywhere)
        roll_back(journal, '', 3, '')
        journal.forget_old_versions(2)
        remove_files(journal, store)
        assert on_disk(tmp_path) == [
            '_robot/v000003', '_robot/v000006', 'ann/v000001', 'ann/v000002', 'bob/v000001']
        assert len(journal.versions('')) == 6
        with pytest.raises(RollbackRefused, match=r'version 5 .*storage\.max_versions'):
            roll_back(journal, '', 5, '')
        roll_back(journal, '', 6, '')


def test_what_was_live_beside_a_kept_version_is_kept_with_it(tmp_path: Path) -> None:
    """So a rollback can be undone; a version whose corrections are all deleted is not missed."""
    continues = {6: 1, 7: 3}    # the others began with a fresh adapter
    with Journal(tmp_path / JOURNAL) as journal:
        for number in range(1, 9):
            journal.accept(correction(f'k{number}'))
            journal.publish(VersionRecord(
                '', number, number - 1, continues=continues.get(number, 0),
                correction_ids=(f'k{number}',), path=f'v{number}', sha256='ab'))
        journal.forget_corrections(['k2'])

        def kept() -> list[int]:
            journal.forget_old_versions(2)
            return [record.version for record in journal.versions('') if record.sha256]

        assert kept() == [1, 3, 4, 5, 6, 7, 8]      # 3, and 1, which was live beside it
        roll_back(journal, '', 0, '')
        assert kept() == [4, 5, 6, 7, 8]            # 8, and what was live beside it
        roll_back(journal, '', 8, '')
        assert [c.id for c in journal.learned('')] == ['k1', 'k3', 'k4', 'k5', 'k6', 'k7', 'k8']
        roll_back(journal, '', 7, '')
        with pytest.raises(RollbackRefused, match=r'version 3 .*storage\.max_versions'):
            roll_back(journal, '', 6, '')


def test_files_are_deleted_after_the_commit_that_forgot_them(tmp_path: Path) -> None:
    """Files that the journal does not know are left alone."""
    store = AdapterStore(tmp_path)
    with JournalWriter(tmp_path / JOURNAL) as writer:
        for _ in range(3):
            writer.submit(lambda journal: publish(journal, store)).result(60)
        store.save('', 99, {'weight': torch.ones(2)}, {})     # of a journal that was lost
        tidy(writer, store, 1)
        writer.submit(lambda journal: None).result(60)
        writer.submit(lambda journal: None).result(60)
    assert on_disk(tmp_path) == ['_robot/v000003', '_robot/v000099']


def test_a_rollback_after_old_version_records_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr('mace_ros.store.versions.VERSION_RECORDS', 3)
    with Journal(tmp_path / JOURNAL) as journal:
        for number in range(1, 7):
            journal.accept(correction(f'k{number}'))
            journal.publish(VersionRecord('', number, number - 1, continues=number - 1,
                                          correction_ids=(f'k{number}',),
                                          sha256='ab' if number > 4 else ''))
        journal.forget_old_versions(9)
        assert [v.version for v in journal.versions('')] == [4, 5, 6]
        outcome = roll_back(journal, '', 5, '')
        assert [c.id for c in outcome.corrections] == ['k6']
        roll_back(journal, '', 0, '')
        assert not journal.learned('')


def test_only_one_process_at_a_time_locks_the_storage_folder(tmp_path: Path) -> None:
    """The error names the process that holds the lock; its end, also by a signal, frees it."""
    holder = subprocess.Popen(
        [sys.executable, '-c', 'import sys, time; from pathlib import Path; '
         'from mace_ros.store.lock import StorageLock; '
         'StorageLock(Path(sys.argv[1])); print("locked", flush=True); time.sleep(60)', tmp_path],
        cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == 'locked\n'
    with pytest.raises(StorageInUse, match=f'process {holder.pid}'):
        StorageLock(tmp_path, wait_s=0.1)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    StorageLock(tmp_path, wait_s=60.0).release()
