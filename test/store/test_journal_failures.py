# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Records that the journal has acknowledged survive killed processes and failing disks."""

from __future__ import annotations

from pathlib import Path
import random
import sqlite3
import subprocess
import sys
import threading

import pytest
from support.records import accepting, correction

from mace_ros.store.journal import Journal
from mace_ros.store.journal_file import JournalError
from mace_ros.store.journal_writer import JournalWriter

ROOT = Path(__file__).resolve().parents[2]


def fill_disk(journal: Journal) -> None:
    """Let the file of the journal grow no more."""
    [pages] = journal.rows('PRAGMA page_count')[0]
    journal.execute(f'PRAGMA max_page_count = {pages}')


# Disks

def test_the_error_of_a_full_disk_has_advice(journal: Journal) -> None:
    """Nothing is half-written, and the journal works again once there is space."""
    journal.accept(correction('k1'))
    fill_disk(journal)
    with pytest.raises(JournalError, match='disk is full; free space'):
        journal.accept(correction('k2', 'long ' * 20000))
    assert journal.correction('k2') is None and not journal.in_transaction
    journal.execute('PRAGMA max_page_count = 1000000')
    assert journal.accept(correction('k2'))


def test_a_full_disk_fails_every_function_that_is_rolled_back(journal_path: Path) -> None:
    """SQLite may roll the whole group back: none of its futures may report success then."""
    with JournalWriter(journal_path) as writer:
        started, go = threading.Event(), threading.Event()

        def hold(journal: Journal) -> None:
            fill_disk(journal)
            started.set()
            go.wait(60)

        writer.submit(hold)
        assert started.wait(60)
        small = writer.submit(accepting('small'))
        large = writer.submit(accepting('large', 'l ' * 50000))
        go.set()
        with pytest.raises(JournalError, match='free space'):
            large.result(60)
        kept = small.exception(60) is None
        ids = [r.id for r in writer.submit(lambda journal: journal.pending()).result(60)]
        assert ids == (['small'] if kept else [])
        # The next group opened the file anew, without the limit.
        assert writer.submit(accepting('large', 'l ' * 50000)).result(60)


DISK_FAILS = """
import resource, sys
sys.path.insert(0, 'test')
from mace_ros.store.journal_file import JournalError
from mace_ros.store.journal_writer import JournalWriter
from support.records import accepting, correction

with JournalWriter(sys.argv[1]) as writer:
    def accept(name):
        return writer.submit(lambda j: j.accept(correction(name, 'word ' * 2000))).result(60)
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
    print([r.id for r in writer.submit(lambda j: j.pending()).result(60)])
"""


def test_write_errors_become_errors_of_the_futures(journal_path: Path) -> None:
    """In a process whose files may not grow for a while; it recovers afterwards."""
    done = subprocess.run(
        [sys.executable, '-c', DISK_FAILS, journal_path], cwd=ROOT, text=True, capture_output=True,
        timeout=100)
    assert done.returncode == 0, done.stderr
    *failures, kept = done.stdout.splitlines()
    assert len(failures) == 3 and kept == "['before', 'after']"
    for failure in failures:
        assert failure.startswith(f'journal {journal_path}: ')
        assert 'send again what was not acknowledged' in failure


def test_an_unusable_journal_is_refused_with_advice(journal_path: Path) -> None:
    """The file is left unchanged."""
    journal_path.parent.mkdir()
    journal_path.write_bytes(b'My diary. ' * 1000)
    with pytest.raises(JournalError, match=r'not a database.*put back a backup'):
        JournalWriter(journal_path)
    assert journal_path.read_bytes() == b'My diary. ' * 1000
    with pytest.raises(JournalError, match=r'storage\.folder|its folder'):
        JournalWriter(journal_path / 'a file is no folder')
    newer = journal_path.with_name('newer.sqlite')
    with Journal(newer) as journal:
        journal.execute('PRAGMA user_version = 99')
    with pytest.raises(JournalError, match='newer mace_ros'):
        JournalWriter(newer)


def test_a_journal_that_vanishes_is_not_replaced_by_an_empty_one(journal_path: Path) -> None:
    """As when a disk is unplugged; it is used again once it is back."""
    def fail(journal: Journal) -> None:
        raise JournalError('disk I/O error')

    with JournalWriter(journal_path) as writer:
        assert writer.submit(accepting('before')).result(60)
        with pytest.raises(JournalError, match='I/O'):
            writer.submit(fail).result(60)
        away = journal_path.parent.rename(journal_path.parent.with_name('unplugged'))
        for _ in range(2):
            with pytest.raises(JournalError, match='vanished; mount its disk again'):
                writer.submit(accepting('during')).result(60)
        assert not journal_path.parent.exists()
        away.rename(journal_path.parent)
        assert writer.submit(accepting('after')).result(60)
        pending = writer.submit(lambda journal: journal.pending()).result(60)
        assert [record.id for record in pending] == ['before', 'after']


def test_a_lock_of_another_process_is_an_error_with_advice_until_it_ends(
    journal_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr('mace_ros.store.journal_file._BUSY_SECONDS', 0.05)
    with JournalWriter(journal_path) as writer:
        other = sqlite3.connect(journal_path, isolation_level=None)
        other.execute('BEGIN IMMEDIATE')
        with pytest.raises(JournalError, match='another process holds it'):
            writer.submit(accepting('k')).result(60)
        other.execute('ROLLBACK')
        other.close()
        assert writer.submit(accepting('k')).result(60)


# kill -9

WRITE_UNTIL_KILLED = """
import sys
sys.path.insert(0, 'test')
from mace_ros.store.journal_writer import JournalWriter
from mace_ros.store.records import VersionRecord
from support.records import accepting, answer, correction

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


def test_kill_9_loses_nothing_that_was_acknowledged(journal_path: Path) -> None:
    """Processes killed at random moments of accepting and publishing, all on one file."""
    chance = random.Random(20260726)
    accepted: set[str] = set()
    published: list[int] = []
    for attempt in range(6):
        before = len(accepted)
        process = subprocess.Popen(
            [sys.executable, '-c', WRITE_UNTIL_KILLED, journal_path, str(attempt)], cwd=ROOT,
            text=True, stdout=subprocess.PIPE)
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

        with Journal(journal_path) as journal:
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
