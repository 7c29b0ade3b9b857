# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The journal's thread commits functions in groups; an error undoes one of them."""

from __future__ import annotations

from concurrent.futures import CancelledError, Future
from contextlib import closing
from functools import partial
from pathlib import Path
import sqlite3
import threading

import pytest
from support.records import accepting, correction

from mace_ros.store.journal import Journal
from mace_ros.store.journal_file import JournalError
from mace_ros.store.journal_writer import JournalWriter


def test_functions_run_in_order_and_share_commits(journal_path: Path) -> None:
    """Those queued during a commit form one transaction, and are resolved after it."""
    with JournalWriter(journal_path) as writer:
        started, go = threading.Event(), threading.Event()

        def hold(journal: Journal) -> None:
            started.set()
            go.wait(60)

        first = writer.submit(hold)
        assert started.wait(60)
        order: list[int] = []
        resolved: list[int] = []
        visible: set[int] = set()

        def on_disk() -> int:
            with closing(sqlite3.connect(f'file:{journal_path}?mode=ro', uri=True)) as other:
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
        assert first.result(60) is None
        # No other connection saw any of them before the last one had run.
        assert [future.result(60) for future in futures] == [(n, 0) for n in range(50)]
        assert len(writer.submit(lambda journal: journal.pending()).result(60)) == 50
    assert order == resolved == list(range(50))
    assert visible == {50}  # by the time the first one was resolved


def test_an_error_undoes_only_its_own_function(journal_path: Path) -> None:
    """The other functions of its group are committed; a cancelled one never runs."""
    with JournalWriter(journal_path) as writer:
        started, go = threading.Event(), threading.Event()

        def hold(journal: Journal) -> None:
            started.set()
            go.wait(60)

        def fail(journal: Journal) -> None:
            journal.accept(correction('bad'))
            raise LookupError('mine')

        writer.submit(hold)
        assert started.wait(60)
        good = writer.submit(accepting('good'))
        bad = writer.submit(fail)
        cancelled = writer.submit(accepting('cancelled'))
        assert cancelled.cancel()
        late = writer.submit(accepting('late'))
        go.set()
        assert good.result(60) and late.result(60)
        with pytest.raises(LookupError, match='mine'):
            bad.result(60)
        with pytest.raises(CancelledError):
            cancelled.result(60)
        pending = writer.submit(lambda journal: journal.pending()).result(60)
        assert [record.id for record in pending] == ['good', 'late']


def test_close_finishes_submitted_functions(journal_path: Path) -> None:
    """Later submissions are refused; closing again does nothing."""
    writer = JournalWriter(journal_path)
    futures = [writer.submit(accepting(f'k{number}')) for number in range(200)]
    writer.close()
    assert all(future.done() and future.result() for future in futures)
    with pytest.raises(JournalError, match='closed'):
        writer.submit(lambda journal: None)
    writer.close()
    with Journal(journal_path) as journal:
        assert len(journal.pending()) == 200


def test_functions_of_each_thread_run_in_its_order(journal_path: Path) -> None:
    with JournalWriter(journal_path) as writer:
        def work(name: str) -> None:
            for number in range(40):
                writer.submit(accepting(f'{name}{number:03d}'))

        threads = [threading.Thread(target=work, args=(name,)) for name in 'abcd']
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ids = [r.id for r in writer.submit(lambda journal: journal.pending()).result(60)]
    for name in 'abcd':
        assert [i for i in ids if i[0] == name] == [f'{name}{n:03d}' for n in range(40)]
