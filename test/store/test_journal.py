# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The journal keeps everything it has acknowledged, when processes or disks fail, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain
import math
from pathlib import Path
import random
import sqlite3
import subprocess
import sys
import threading

import pytest
from support.records import answer, correction

from mace_ros.api.events import CorrectionState, VersionState
from mace_ros.learning.rollback import roll_back
from mace_ros.store import answers
from mace_ros.store.journal import Journal
from mace_ros.store.journal_file import JournalError
from mace_ros.store.journal_writer import JournalWriter
from mace_ros.store.records import AnswerRecord, VersionRecord
from mace_ros.store.schema import MIGRATIONS

ROOT = Path(__file__).resolve().parents[2]
LEARNED, TRAINING = CorrectionState.LEARNED, CorrectionState.TRAINING


def accepting(name: str, question: str = '') -> Callable[[Journal], bool]:
    """Return a function that accepts a correction, for the writer."""
    return lambda journal: journal.accept(correction(name, question))


def fill_disk(journal: Journal) -> None:
    """Let the file of the journal grow no more."""
    [pages] = journal.rows('PRAGMA page_count')[0]
    journal.execute(f'PRAGMA max_page_count = {pages}')


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of the journal, in a folder that does not exist yet."""
    return tmp_path / 'storage' / 'journal.sqlite'


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    """Return an empty journal."""
    with Journal(path) as opened:
        yield opened


# Answers and corrections

def test_all_records_survive_a_restart(path: Path) -> None:
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
    with Journal(path) as journal:
        journal.record_answer(given)
        assert journal.accept(record)
        assert journal.set_correction('k1', TRAINING)
        assert journal.publish(version) == ('k1',)
    with Journal(path) as journal:
        assert journal.answer('q1') == given
        assert journal.correction('k1') == replace(record, state=LEARNED, adapter_version=1)
        live = journal.newest('Zoë')
        assert live is not None and math.isnan(live.score_after)
        assert replace(live, score_after=0.0) == replace(version, score_after=0.0)
        assert journal.live_versions() == (live,)
        assert journal.newest('') is None
        assert journal.answer('q2') is None and journal.correction('k2') is None


def test_the_file_is_set_up_for_power_failures(journal: Journal, path: Path) -> None:
    """WAL with synchronous=FULL, which kill -9 can't tell from NORMAL."""
    settings = {name: journal.rows(f'PRAGMA {name}')[0][0]
                for name in ('journal_mode', 'synchronous', 'user_version')}
    assert settings == {'journal_mode': 'wal', 'synchronous': 2, 'user_version': 10}


def test_a_journal_of_schema_1_is_migrated(path: Path) -> None:
    """Its rows are kept, and the new columns have their defaults."""
    path.parent.mkdir()
    with closing(sqlite3.connect(path, isolation_level=None)) as old:
        for statement in MIGRATIONS[0]:
            old.execute(statement)
        old.execute('PRAGMA user_version = 1')
        old.execute("INSERT INTO answers VALUES (1, 'q', '', 'ann', '[1]', '[]', 'a', '[2]', 3, 0, "
                    "4.5, 'key')")
        old.execute("INSERT INTO profiles VALUES ('ann', 0, 2)")
    with Journal(path) as journal:
        assert journal.answer('q') == AnswerRecord(
            'q', (1,), (), 'a', (2,), profile='ann', adapter_version=3, time=4.5)
        assert journal.next_version('ann') == 3
    with Journal(path) as journal:
        assert journal.answer('q') is not None


def test_migration_keeps_where_the_lineage_of_a_profile_started(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path, isolation_level=None)) as old:
        for statement in chain.from_iterable(MIGRATIONS[:4]):
            old.execute(statement)
        old.execute('PRAGMA user_version = 4')
        for profile, version in (('', 1), ('', 2), ('ann', 1)):
            old.execute("INSERT INTO versions VALUES (?, ?, 0, ?, '', '[]', 0, 0, 0, 0, '', 'ab', "
                        '0)', (profile, version, int(VersionState.PUBLISHED)))
        old.execute("INSERT INTO profiles VALUES ('', 2, 2, NULL), ('ann', 1, 1, 1)")
    with Journal(path) as journal:
        roll_back(journal, 'ann', 0, '')
        parent = journal.next_parent('ann')
        assert parent is not None and (parent.profile, parent.version) == ('', 2)
        roll_back(journal, 'ann', 1, '')
        assert journal.rows("SELECT fork FROM profiles WHERE profile = 'ann'")[0]['fork'] == 1


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


def test_old_answers_are_deleted_unless_a_pending_correction_needs_them(path: Path) -> None:
    with Journal(path, max_answers=5) as journal:
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

    def found(*exclude: str, profile: str = '', limit: int = 9) -> list[str]:
        return [a.query_id for a in journal.replay_candidates(profile, limit, exclude)]

    assert found() == ['sum', 'sky2']
    assert found(limit=1) == ['sum'] and found(limit=0) == []
    assert found('sky2') == ['sum', 'sky1']
    assert found('sky2', 'sky1', 'sum') == []
    assert found(profile='ann') == ['other']


# Versions

def test_publishing_is_all_or_nothing(journal: Journal, path: Path) -> None:
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


def test_a_version_number_is_never_reused(path: Path) -> None:
    """Neither that of a rejected version nor that of one lost in a crash."""
    with Journal(path) as journal:
        assert journal.next_version('') == 1
        journal.record_version(VersionRecord('', 1, 0, VersionState.REJECTED, 'worse'))
        assert journal.newest('') is None
        assert journal.next_version('') == 2  # the process ends before it is recorded
    with Journal(path) as journal:
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


# The writer

def test_functions_run_in_order_and_share_commits(path: Path) -> None:
    """Those queued during a commit form one transaction, and are resolved after it."""
    with JournalWriter(path) as writer:
        started, go = threading.Event(), threading.Event()

        def hold(journal: Journal) -> None:
            started.set()
            go.wait(5)

        first = writer.submit(hold)
        assert started.wait(5)
        order: list[int] = []
        resolved: list[int] = []
        visible: set[int] = set()

        def on_disk() -> int:
            with closing(sqlite3.connect(f'file:{path}?mode=ro', uri=True)) as other:
                return int(other.execute('SELECT count(*) FROM corrections').fetchone()[0])

        def accept(number: int, journal: Journal) -> tuple[int, int]:
            order.append(number)
            journal.accept(correction(f'k{number}'))
            return number, on_disk()

        def note(future: Future[tuple[int, int]]) -> None:
            resolved.append(future.result()[0])
            visible.add(on_disk())

        futures = [writer.submit(partial(accept, n)) for n in range(50)]
        for future in futures:
            future.add_done_callback(note)
        assert not any(future.done() for future in futures)
        go.set()
        assert first.result(5) is None
        # No other connection saw any of them before the last one had run.
        assert [future.result(5) for future in futures] == [(n, 0) for n in range(50)]
        assert len(writer.submit(lambda journal: journal.pending()).result(5)) == 50
    assert order == resolved == list(range(50))
    assert visible == {50}  # by the time the first one was resolved


def test_an_error_undoes_only_its_own_function(path: Path) -> None:
    """The other functions of its group are committed; a cancelled one never runs."""
    with JournalWriter(path) as writer:
        started, go = threading.Event(), threading.Event()

        def hold(journal: Journal) -> None:
            started.set()
            go.wait(5)

        def fail(journal: Journal) -> None:
            journal.accept(correction('bad'))
            raise LookupError('mine')

        writer.submit(hold)
        assert started.wait(5)
        good = writer.submit(accepting('good'))
        bad = writer.submit(fail)
        cancelled = writer.submit(accepting('cancelled'))
        assert cancelled.cancel()
        late = writer.submit(accepting('late'))
        go.set()
        assert good.result(5) and late.result(5)
        with pytest.raises(LookupError, match='mine'):
            bad.result(5)
        with pytest.raises(CancelledError):
            cancelled.result(5)
        pending = writer.submit(lambda journal: journal.pending()).result(5)
        assert [record.id for record in pending] == ['good', 'late']


def test_close_finishes_submitted_functions(path: Path) -> None:
    """Later submissions are refused; closing again does nothing."""
    writer = JournalWriter(path)
    futures = [writer.submit(accepting(f'k{number}')) for number in range(200)]
    writer.close()
    assert all(future.done() and future.result() for future in futures)
    with pytest.raises(JournalError, match='closed'):
        writer.submit(lambda journal: None)
    writer.close()
    with Journal(path) as journal:
        assert len(journal.pending()) == 200


def test_functions_of_each_thread_run_in_its_order(path: Path) -> None:
    with JournalWriter(path) as writer:
        def work(name: str) -> None:
            for number in range(40):
                writer.submit(accepting(f'{name}{number:03d}'))

        threads = [threading.Thread(target=work, args=(name,)) for name in 'abcd']
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ids = [r.id for r in writer.submit(lambda journal: journal.pending()).result(5)]
    for name in 'abcd':
        assert [i for i in ids if i[0] == name] == [f'{name}{n:03d}' for n in range(40)]


# Failures

def test_the_error_of_a_full_disk_has_advice(journal: Journal) -> None:
    """Nothing is half-written, and the journal works again once there is space."""
    journal.accept(correction('k1'))
    fill_disk(journal)
    with pytest.raises(JournalError, match='disk is full; free space'):
        journal.accept(correction('k2', 'long ' * 20000))
    assert journal.correction('k2') is None and not journal.in_transaction
    journal.execute('PRAGMA max_page_count = 1000000')
    assert journal.accept(correction('k2'))


def test_a_full_disk_fails_every_function_that_is_rolled_back(path: Path) -> None:
    """SQLite may roll the whole group back: none of its futures may report success then."""
    with JournalWriter(path) as writer:
        started, go = threading.Event(), threading.Event()

        def hold(journal: Journal) -> None:
            fill_disk(journal)
            started.set()
            go.wait(5)

        writer.submit(hold)
        assert started.wait(5)
        small = writer.submit(accepting('small'))
        large = writer.submit(accepting('large', 'l ' * 50000))
        go.set()
        with pytest.raises(JournalError, match='free space'):
            large.result(5)
        kept = small.exception(5) is None
        ids = [r.id for r in writer.submit(lambda journal: journal.pending()).result(5)]
        assert ids == (['small'] if kept else [])
        # The next group opened the file anew, without the limit.
        assert writer.submit(accepting('large', 'l ' * 50000)).result(5)


DISK_FAILS = """
import resource, sys
sys.path.insert(0, 'test')
from mace_ros.store.journal_file import JournalError
from mace_ros.store.journal_writer import JournalWriter
from support.records import correction

with JournalWriter(sys.argv[1]) as writer:
    def accept(name):
        return writer.submit(lambda j: j.accept(correction(name, 'word ' * 2000))).result(5)
    assert accept('before')
    # No file may grow from here on (Python ignores the signal, so that write() fails).
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, resource.RLIM_INFINITY))
    for attempt in range(3):
        try:
            accept(f'during{attempt}')
        except JournalError as error:
            print(error)
        else:
            print('acknowledged', attempt)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert accept('after')
    print([r.id for r in writer.submit(lambda j: j.pending()).result(5)])
"""


def test_write_errors_become_errors_of_the_futures(path: Path) -> None:
    """In a process whose files may not grow for a while; it recovers afterwards."""
    done = subprocess.run(
        [sys.executable, '-c', DISK_FAILS, path], cwd=ROOT, text=True, capture_output=True,
        timeout=30)
    assert done.returncode == 0, done.stderr
    *failures, kept = done.stdout.splitlines()
    assert len(failures) == 3 and kept == "['before', 'after']"
    for failure in failures:
        assert failure.startswith(f'journal {path}: ')
        assert 'send again what was not acknowledged' in failure


def test_an_unusable_journal_is_refused_with_advice(path: Path) -> None:
    """The file is left unchanged."""
    path.parent.mkdir()
    path.write_bytes(b'My diary. ' * 1000)
    with pytest.raises(JournalError, match=r'not a database.*put back a backup'):
        JournalWriter(path)
    assert path.read_bytes() == b'My diary. ' * 1000
    with pytest.raises(JournalError, match=r'storage\.folder|its folder'):
        JournalWriter(path / 'a file is no folder')
    newer = path.with_name('newer.sqlite')
    with Journal(newer) as journal:
        journal.execute('PRAGMA user_version = 99')
    with pytest.raises(JournalError, match='newer mace_ros'):
        JournalWriter(newer)


def test_a_journal_that_vanishes_is_not_replaced_by_an_empty_one(path: Path) -> None:
    """As when a disk is unplugged; it is used again once it is back."""
    def fail(journal: Journal) -> None:
        raise JournalError('disk I/O error')

    with JournalWriter(path) as writer:
        assert writer.submit(accepting('before')).result(5)
        with pytest.raises(JournalError, match='I/O'):
            writer.submit(fail).result(5)
        away = path.parent.rename(path.parent.with_name('unplugged'))
        for _ in range(2):
            with pytest.raises(JournalError, match='vanished; mount its disk again'):
                writer.submit(accepting('during')).result(5)
        assert not path.parent.exists()
        away.rename(path.parent)
        assert writer.submit(accepting('after')).result(5)
        pending = writer.submit(lambda journal: journal.pending()).result(5)
        assert [record.id for record in pending] == ['before', 'after']


def test_a_lock_of_another_process_is_an_error_with_advice_until_it_ends(
    path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr('mace_ros.store.journal_file._BUSY_SECONDS', 0.05)
    with JournalWriter(path) as writer:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute('BEGIN IMMEDIATE')
        with pytest.raises(JournalError, match='another process holds it'):
            writer.submit(accepting('k')).result(5)
        other.execute('ROLLBACK')
        other.close()
        assert writer.submit(accepting('k')).result(5)


# kill -9

WRITE_UNTIL_KILLED = """
import sys
sys.path.insert(0, 'test')
from mace_ros.store.journal_writer import JournalWriter
from mace_ros.store.records import VersionRecord
from support.records import answer, correction

path, prefix = sys.argv[1:]
writer = JournalWriter(path, max_answers=50)

def publish(journal):
    ids = tuple(record.id for record in journal.pending('')[:8])
    version = journal.next_version('')
    live = journal.newest('')
    journal.publish(VersionRecord(
        '', version, live.version if live else 0, correction_ids=ids, path=f'v{version}'))
    return version

for number in range(1000000):
    names = [f'{prefix}-{number}-{i}' for i in range(4)]
    accepted = [
        (name, writer.submit(lambda j, n=name: (j.record_answer(answer(n)), j.accept(
            correction(n, query_id=n)))))
        for name in names]
    version = writer.submit(publish)
    for name, future in accepted:
        future.result()
        print('accepted', name, flush=True)
    print('published', version.result(), flush=True)
"""


def test_kill_9_loses_nothing_that_was_acknowledged(path: Path) -> None:
    """Processes killed at random moments of accepting and publishing, all on one file."""
    chance = random.Random(20260726)
    accepted: set[str] = set()
    published: list[int] = []
    for attempt in range(6):
        before = len(accepted)
        process = subprocess.Popen(
            [sys.executable, '-c', WRITE_UNTIL_KILLED, path, str(attempt)], cwd=ROOT, text=True,
            stdout=subprocess.PIPE)
        assert process.stdout is not None
        timer: threading.Timer | None = None
        for line in process.stdout:
            if not line.endswith('\n'):
                break  # killed while it was printed
            word, name = line.split()
            if word == 'accepted':
                accepted.add(name)
            else:
                published.append(int(name))
            if timer is None:
                timer = threading.Timer(chance.uniform(0.0, 0.25), process.kill)
                timer.start()
        assert process.wait() == -9
        process.stdout.close()
        assert len(accepted) > before

        with Journal(path) as journal:
            assert journal.rows('PRAGMA integrity_check')[0][0] == 'ok'
            assert not [name for name in accepted if journal.correction(name) is None]
            versions = journal.versions('')
            # A version is recorded and live with its corrections LEARNED, or not at all.
            assert {record.version for record in versions} >= set(published)
            live = journal.newest('')
            assert (live.version if live else 0) == max((v.version for v in versions), default=0)
            learned = {record.id: record.adapter_version for record in journal.learned('')}
            assert learned == {i: v.version for v in versions for i in v.correction_ids}
    assert published == sorted(set(published))
