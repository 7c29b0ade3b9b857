# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""``mace_journal`` lists, exports, imports and deletes what a storage folder holds."""

from __future__ import annotations

import json
from pathlib import Path
import subprocess
import sys

import pytest
from support.records import answer, correction
from support.stored import on_disk, publish
import torch

from mace_ros.api.events import CorrectionState, VersionState
from mace_ros.learning.rollback import roll_back
from mace_ros.store.adapter_store import AdapterStore
from mace_ros.store.answers import MAX_ANSWERS
from mace_ros.store.journal import Journal
from mace_ros.store.journal_writer import JournalWriter
from mace_ros.store.layout import JOURNAL, MODEL
from mace_ros.store.records import VersionRecord
from mace_ros.store.retention import remove_files

ROOT = Path(__file__).resolve().parents[2]
LEARNED = CorrectionState.LEARNED
SECRET = 'I live in Rosebud Lane.'


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """Return a folder with two versions, two corrections and three answers."""
    folder = tmp_path / 'storage'
    store = AdapterStore(folder)
    with Journal(folder / JOURNAL) as journal:
        (folder / MODEL).write_text('a model\n')
        journal.record_answer(answer('q1', 'Where do I live?', text='In a house.'))
        journal.record_answer(answer('q2', 'What is 1 + 1?', text='2'))
        journal.record_answer(answer('q3', 'Where do  I LIVE?', text='In a flat.', profile='ann'))
        journal.accept(correction(
            'k1', 'Where do I live?', query_id='q1', corrected=SECRET, scope='everywhere',
            source='Ann'))
        publish(journal, store, '', 'k1')
        journal.accept(correction('k2', 'Who am I?', corrected='Ann.', profile='ann'))
        publish(journal, store)
    return folder


def run(folder: Path, *arguments: str, code: int = 0, text: str = '') -> str:
    """Run the program; return what it prints, on stderr if nothing on stdout."""
    done = subprocess.run(
        [sys.executable, '-m', 'mace_ros.cli.journal_admin', '--folder', folder, *arguments],
        cwd=ROOT, input=text, capture_output=True, text=True, timeout=100)
    assert done.returncode == code, done.stderr
    return done.stdout or done.stderr


def test_list_prints_one_line_per_record(storage: Path) -> None:
    """Oldest first, of all profiles or of one."""
    assert run(storage, 'list', 'corrections') == (
        f'k1\tLEARNED\t\tWhere do I live?\t{SECRET}\tversion 1\t\teverywhere\n'
        'k2\tACCEPTED\tann\tWho am I?\tAnn.\t\t\t\n')
    assert run(storage, 'list', 'corrections', '--profile', 'ann').startswith('k2')
    assert [line.split('\t')[0] for line in run(storage, 'list', 'answers').splitlines()] == [
        'q1', 'q2', 'q3']
    assert run(storage, 'list', 'versions') == (
        '1\tPUBLISHED\t\tparent 0\t1 correction\ton disk\t\n'
        '2\tPUBLISHED\t\tparent 1\t0 corrections\tlive\t\n')


def test_ros_arguments_are_ignored(storage: Path) -> None:
    listed = run(storage, 'list', 'versions')
    assert run(storage, '--ros-args', '-r', '__ns:=/robot2', '--', 'list', 'versions',
               '--ros-args', '-r', '__node:=journal') == listed


def test_scope_prints_what_versions_have_learned(storage: Path) -> None:
    """Of the live versions, or of one to roll back to."""
    line = f'\tversion 2\tk1\teverywhere\tWhere do I live?\t{SECRET}\tAnn\n'
    nothing = f'{storage}: nothing is learned yet\n'
    assert run(storage, 'scope') == run(storage, 'scope', '--version', '2') == line
    assert run(storage, 'scope', '--version', '1') == line.replace('version 2', 'version 1')
    assert run(storage, 'scope', '--profile', 'ann') == nothing
    assert 'no version 7' in run(storage, 'scope', '--version', '7', code=1)
    run(storage, 'delete', 'corrections', 'k1')
    assert run(storage, 'scope') == nothing
    with Journal(storage / JOURNAL) as journal:
        for name, profile in (('k3', ''), ('k4', 'bob')):       # no version had to learn it
            journal.accept(correction(name, 'What is 1 + 1?', profile=profile))
            journal.set_correction(name, LEARNED)
    shown = [line.split('\t')[:3] for line in run(storage, 'scope').splitlines()]
    assert shown == [['', 'version 0', 'k3'], ['bob', 'version 0', 'k4']]


def test_scope_names_each_correction_once_with_the_version_that_answers_it(
        tmp_path: Path) -> None:
    """Two versions are live together, one of which continues an earlier one."""
    with Journal(tmp_path / JOURNAL) as journal:
        for version, continues in ((1, 0), (2, 0), (3, 1)):
            journal.accept(correction(f'k{version}', f'Question {version}?', corrected='Yes.'))
            journal.publish(VersionRecord(
                '', version, version - 1, continues=continues,
                correction_ids=(f'k{version}',), path=f'v{version}', sha256='0'))
    shown = [line.split('\t')[1:3] for line in run(tmp_path, 'scope').splitlines()]
    assert shown == [['version 3', 'k1'], ['version 2', 'k2'], ['version 3', 'k3']]
    shown = [line.split('\t')[1:3]
             for line in run(tmp_path, 'scope', '--version', '2').splitlines()]
    assert shown == [['version 1', 'k1'], ['version 2', 'k2']]


def test_a_command_that_fails_says_why_and_changes_nothing(storage: Path) -> None:
    """Exit code 2 for an unknown command, 1 for one that can't be carried out."""
    assert 'invalid choice' in run(storage, 'burn', code=2)
    assert 'no storage folder' in run(storage / 'nowhere', 'list', 'answers', code=1)
    assert not (storage / 'nowhere').exists()
    assert 'not on record: unknown;' in run(
        storage, 'delete', 'corrections', 'k1', 'unknown', code=1)
    assert 'no version 7' in run(storage, 'delete', 'versions', '7', code=1)
    assert '~/rollback' in run(storage, 'delete', 'versions', '1', '2', code=1)
    assert len(run(storage, 'list', 'corrections').splitlines()) == 2
    assert on_disk(storage) == ['_robot/v000001', '_robot/v000002']


def test_options_may_follow_the_command(storage: Path, tmp_path: Path) -> None:
    """The last one counts, as with any option that is given twice."""
    nowhere = tmp_path / 'nowhere'
    assert run(nowhere, 'list', 'answers', '--folder', str(storage)).startswith('q1')
    assert 'nowhere' in run(storage, 'export', '--folder', str(nowhere), code=1)


def test_deleted_texts_are_in_no_file(storage: Path) -> None:
    """Neither the correction nor the answers to its question."""
    def found(text: str) -> list[str]:
        return [path.name for path in storage.rglob('*')
                if path.is_file() and text.encode() in path.read_bytes()]

    assert found(SECRET) and found('In a house.')
    assert run(storage, 'delete', 'corrections', 'k1') == '1 correction deleted\n'
    assert not found(SECRET) and not found('In a house.')
    assert found('In a flat.')      # of another profile
    run(storage, 'delete', 'answers', 'q3')
    assert not found('In a flat.')
    with Journal(storage / JOURNAL) as journal:
        assert [a.query_id for a in journal.answers()] == ['q2']
        assert [c.id for c in journal.corrections()] == ['k2']


def test_deleting_a_version_deletes_its_files_and_keeps_its_record(storage: Path) -> None:
    assert 'is live' in run(storage, 'delete', 'versions', '2', code=1)
    run(storage, 'delete', 'versions', '1')
    assert on_disk(storage) == ['_robot/v000002']
    assert 'no files' in run(storage, 'list', 'versions', '--profile', '').splitlines()[0]


def test_beside_a_running_node_only_reading_is_allowed(storage: Path) -> None:
    """The refusal names the process."""
    with JournalWriter(storage / JOURNAL) as writer:
        assert len(run(storage, 'list', 'corrections').splitlines()) == 2
        lines = run(storage, 'export')
        for arguments in (['delete', 'corrections', 'k1'], ['import']):
            assert 'is used by process' in run(storage, *arguments, code=1, text=lines)
        assert writer.submit(lambda journal: journal.correction('k1')).result(60) is not None


def test_an_export_is_imported_by_another_robot_to_be_learned(
        storage: Path, tmp_path: Path) -> None:
    """A second import changes nothing."""
    file = tmp_path / 'export.jsonl'
    run(storage, 'export', str(file))
    kinds = [json.loads(line)['kind'] for line in file.read_text().splitlines()]
    assert kinds == ['model', *['answer'] * 3, *['correction'] * 2, *['version'] * 2]
    assert run(storage, 'export', '--only', 'correction', '--profile', 'ann').count('\n') == 2
    other = tmp_path / 'other'
    with Journal(other / JOURNAL) as journal:
        journal.accept(correction('mine', 'Who am I?', profile='ann'))
    (other / MODEL).write_text('a model\n')
    assert run(other, 'import', str(file)) == (
        '2 corrections, 3 answers and 0 versions imported, 0 known already\n')
    assert run(other, 'import', text=file.read_text()) == (
        '0 corrections, 0 answers and 0 versions imported, 5 known already\n')
    with Journal(storage / JOURNAL) as journal, Journal(other / JOURNAL) as new:
        assert new.answers() == journal.answers()
        assert [c.scope for c in new.corrections()] == ['', 'everywhere', '']
        assert [c.id for c in new.pending()] == ['k1', 'k2']
        # The imported correction is not older than the one it contradicts.
        mine, theirs = new.correction('mine'), new.correction('k1')
        assert mine is not None and mine.state is CorrectionState.SUPERSEDED
        assert theirs is not None and theirs.corrected == SECRET
        assert not new.versions()


def test_an_import_does_not_supersede_later_corrections(
        storage: Path, tmp_path: Path) -> None:
    other = tmp_path / 'other'
    with Journal(other / JOURNAL) as journal:
        journal.accept(correction('mine', 'Where do I live?', received=1.0))
    (other / MODEL).write_text('a model\n')
    run(other, 'import', text=run(storage, 'export', '--only', 'correction'))
    with Journal(other / JOURNAL) as journal:
        assert [c.id for c in journal.pending()] == ['mine', 'k2']
        old = journal.correction('k1')
        assert old is not None
        assert (old.state, old.reason) == (CorrectionState.SUPERSEDED, 'by correction mine')


def test_a_token_id_outside_the_vocabulary_is_refused(storage: Path) -> None:
    """Every job that replays it would fail."""
    model = 'llama, 2 layers of 8, vocabulary of 100'
    (storage / MODEL).write_text(f'{model}\n')
    first = json.dumps({'kind': 'model', 'model': model}) + '\n'
    line = ('{"kind": "answer", "query_id": "q9", "prompt_ids": [99], "messages": [], '
            '"text": "b", "output_ids": [TOKEN]}')
    said = run(storage, 'import', text=first + line.replace('TOKEN', '100'), code=1)
    assert 'line 2: output_ids: token ids are whole numbers below 100' in said
    run(storage, 'import', text=first + line.replace('TOKEN', '99'))


def test_an_import_deletes_no_answers(storage: Path, tmp_path: Path) -> None:
    """The limit is a parameter of the node, which mace_journal does not know."""
    other = tmp_path / 'other'
    with Journal(other / JOURNAL, max_answers=10**6) as journal, journal.transaction():
        for i in range(MAX_ANSWERS + 1):
            journal.record_answer(answer(f'old{i}', 'Who am I?'))
    (other / MODEL).write_text('a model\n')
    run(other, 'import', text=run(storage, 'export'))
    with Journal(other / JOURNAL) as journal:
        assert journal.answer('old0') is not None and journal.answer('q3') is not None


def test_versions_are_imported_with_their_weights_under_new_numbers(
        storage: Path, tmp_path: Path) -> None:
    """Beside a live version, a rollback makes one live; a second import changes nothing."""
    export = run(storage, 'export', '--weights')
    other = tmp_path / 'other'
    with Journal(other / JOURNAL) as journal:
        publish(journal, AdapterStore(other), '', 'mine')
    (other / MODEL).write_text('a model\n')
    spoilt = export.replace('"sha256": "', '"sha256": "0')
    assert 'checksum' in run(other, 'import', text=spoilt, code=1)
    assert '2 versions imported, 0 known' in run(other, 'import', text=export)
    assert '0 versions imported, 7 known' in run(other, 'import', text=export)
    with Journal(storage / JOURNAL) as journal, Journal(other / JOURNAL) as new:
        mine, *theirs = new.versions('')
        assert [v.correction_ids for v in theirs] == [
            v.correction_ids for v in journal.versions('')]
        assert [v.parent for v in theirs] == [0, theirs[0].version]
        assert [v.continues for v in theirs] == [0, theirs[0].version]
        assert {c.state for c in new.corrections()} == {CorrectionState.ACCEPTED}
        assert new.newest('') == mine
        store = AdapterStore(other)
        for here, there in zip(theirs, journal.versions(''), strict=True):
            assert torch.equal(store.load(here.path, here.sha256)['weight'],
                               AdapterStore(storage).load(there.path, there.sha256)['weight'])
        roll_back(new, '', theirs[-1].version, 'better')
        assert new.newest('') == theirs[-1]


@pytest.mark.parametrize('occupied', [False, True])
def test_imported_versions_do_not_answer_a_deleted_question(
        storage: Path, tmp_path: Path, occupied: bool) -> None:
    """They may have learned it; the versions that a robot had before have not."""
    run(storage, 'delete', 'corrections', 'k1')
    exported = run(storage, 'export', '--weights')
    assert SECRET not in exported and 'Where do I live' not in exported
    other = tmp_path / 'other'
    with Journal(other / JOURNAL) as journal:
        if occupied:
            publish(journal, AdapterStore(other), '', 'mine')
    (other / MODEL).write_text('a model\n')
    run(other, 'import', text=exported)
    with Journal(storage / JOURNAL) as theirs, Journal(other / JOURNAL) as journal:
        deleted = theirs.deleted_questions('')
        assert deleted and journal.deleted_questions('') == (set() if occupied else deleted)
    assert 'deleted question' not in run(storage, 'export')
    broken = exported.replace('"kind": "deleted question", "profile": ""',
                              '"kind": "deleted question", "profile": 1')
    assert 'profile' in run(other, 'import', text=broken, code=1)


def test_a_robot_without_a_live_version_answers_with_imported_ones(
        storage: Path, tmp_path: Path) -> None:
    """Version 3, whose files are not kept any more, leaves no gap in the lineage."""
    store = AdapterStore(storage)
    with Journal(storage / JOURNAL) as journal:
        for name, continues in (('k3', 0), ('k4', 0), ('k5', 4)):
            journal.accept(correction(name))
            version = journal.next_version('')
            saved = store.save('', version, {'weight': torch.full((2,), version)}, {})
            journal.publish(VersionRecord(
                '', version, version - 1, continues=continues, correction_ids=(name,),
                path=saved.path, sha256=saved.sha256))
        journal.forget_corrections(['k3'])
        journal.forget_old_versions(2)
        remove_files(journal, store)
    assert on_disk(storage) == [f'_robot/v00000{version}' for version in (2, 4, 5)]
    other = tmp_path / 'other'
    with Journal(other / JOURNAL) as journal:
        publish(journal, AdapterStore(other), '', 'mine')
        roll_back(journal, '', 0, '')
    (other / MODEL).write_text('a model\n')
    said = run(other, 'import', text=run(storage, 'export', '--weights'))
    assert '3 versions imported, 0 known' in said
    with Journal(other / JOURNAL) as journal:
        assert [v.version for v in journal.live_lineage('').live] == [4, 2]
        assert [(c.id, c.adapter_version) for c in journal.learned('')] == [
            ('k1', 2), ('k4', 4), ('k5', 4)]
        assert [c.id for c in journal.pending()] == ['k2']
        assert journal.versions_in_use() == {('', 2), ('', 4)}
        roll_back(journal, '', 2, '')
        assert [c.id for c in journal.scope('')] == ['k1']


@pytest.mark.parametrize(('line', 'why'), [
    ('{"kind": "version", "profile": "", "version": 1, "parent": 0, "weights": "!"}', 'base64'),
    ('{"kind": "version", "profile": "", "version": 1, "parent": 0, "weights": "aaaa"}',
     'checksum'),
    ('no JSON', 'Expecting value'), ('[]', 'not the line of an export'),
    ('{"kind": "secret"}', 'secret'),
    ('{"kind": "correction", "id": "a"}', 'prompt_ids, messages, corrected missing'),
    ('{"kind": "answer", "query_id": "q", "prompt_ids": [], "messages": [], "text": "b", '
     '"output_ids": [], "profile": "' + 129 * 'x' + '"}', 'profile: longer'),
    ('{"kind": "correction", "id": "a", "prompt_ids": [1], "messages": [], "corrected": ""}',
     'empty'),
    ('{"kind": "correction", "id": "a", "prompt_ids": ["x"], "messages": [], "corrected": "b"}',
     'whole numbers'),
    ('{"kind": "correction", "id": "a", "prompt_ids": [], "messages": [], "corrected": "b", '
     '"weight": NaN}', 'weight'),
    ('{"kind": "correction", "id": "a", "prompt_ids": [1], "messages": [{"role": "user", '
     '"content": "\\ud800"}], "corrected": "b"}', 'messages'),
    ('{"kind": "correction", "id": "a", "prompt_ids": [1], "messages": [{"role": "robot", '
     '"content": "c"}], "corrected": "b"}', 'role'),
    ('{"kind": "answer", "query_id": 7, "prompt_ids": [], "messages": [], "text": "b", '
     '"output_ids": []}', 'query_id'),
    ('{"kind": "correction", "id": "a", "prompt_ids": [], "messages": [], "corrected": "b", '
     '"received": 1' + 400 * '0' + '}', 'OverflowError'),
    (100_000 * '[', 'RecursionError'),
    ('{"kind": "model", "model": "a second one"}', 'base model'),
    ('{"kind": "model", "model": "another"}', 'another')])
def test_an_import_is_all_or_nothing(storage: Path, line: str, why: str) -> None:
    """The error names the bad line, and the lines before it are not imported."""
    first = '{"kind": "model", "model": "a model"}\n'
    good = ('{"kind": "correction", "id": "new", "prompt_ids": [1], "messages": [], '
            '"corrected": "b"}\n')
    lines = line if why == 'another' else first + good + line
    said = run(storage, 'import', text=lines, code=1)
    assert ('line 1' if why == 'another' else 'line 3') in said
    if why != 'another':
        assert why in said
    with Journal(storage / JOURNAL) as journal:
        assert journal.correction('new') is None


def test_a_line_that_is_not_utf_8_is_refused_by_its_number(storage: Path, tmp_path: Path) -> None:
    file = tmp_path / 'lines.jsonl'
    file.write_bytes(b'{"kind": "model", "model": "a model"}\n'
                     b'{"kind": "correction", "id": "a", "prompt_ids": [1], "messages": [], '
                     b'"corrected": "\xff"}\n')
    assert 'line 2' in run(storage, 'import', str(file), code=1)
    done = subprocess.run(
        [sys.executable, '-m', 'mace_ros.cli.journal_admin', '--folder', storage, 'import'],
        cwd=ROOT, input=file.read_bytes(), capture_output=True, timeout=100)
    assert done.returncode == 1 and b'line 2' in done.stderr


def test_a_rejected_version_has_no_files_to_delete(storage: Path) -> None:
    with Journal(storage / JOURNAL) as journal:
        journal.record_version(VersionRecord(
            '', journal.next_version(''), 2, VersionState.REJECTED, 'worse'))
    assert 'on disk' in run(storage, 'delete', 'versions', '3', code=1)
