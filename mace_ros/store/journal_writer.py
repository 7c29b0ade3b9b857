# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The thread that owns the journal, so that no other thread waits for the disk.

Functions that queue up during a commit share the next one (group commit), so the disk's fsync
rate does not bound the rate of acknowledgements.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
import os
from pathlib import Path
from queue import Empty, SimpleQueue
import threading
from typing import Any, TypeVar

from mace_ros.store.answers import MAX_ANSWERS
from mace_ros.store.journal import Journal
from mace_ros.store.journal_file import journal_error, JournalError
from mace_ros.store.lock import StorageLock

T = TypeVar('T')
_Job = tuple[Callable[[Journal], Any], Future[Any]]
_Outcome = tuple[Any, BaseException | None]


class JournalWriter:
    """
    Runs functions on the journal at ``path``, in order, in a thread of its own.

    It locks the storage folder against other processes. Raises :class:`JournalError` if the
    journal can't be opened, and :class:`StorageInUse` if another process holds the lock.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_answers: int = MAX_ANSWERS) -> None:
        """Open the journal and start the thread."""
        self._path = Path(path).absolute()
        try:
            self._storage = StorageLock(self._path.parent)
        except OSError as error:
            raise journal_error(self._path, error) from error
        self._max_answers = max_answers
        self._journal: Journal | None = None    # used by the thread only
        self._was_open = False
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()    # None: the last item
        self._lock = threading.Lock()
        self._closed = False
        self._backlog = 0
        # A daemon, so that a node that ends with an error does not hang here. Work left undone
        # was not acknowledged.
        self._thread = threading.Thread(target=self._work, name='journal', daemon=True)
        self._thread.start()
        try:
            self.submit(lambda journal: None).result()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> JournalWriter:
        """Return the writer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the writer."""
        self.close()

    def submit(self, function: Callable[[Journal], T]) -> Future[T]:
        """
        Queue ``function`` and return at once; the future is resolved once its writes are on disk.

        An exception of the function undoes its own writes only and becomes the future's
        exception. :class:`JournalError` means that the disk failed, for this function or for
        the whole group that shared its commit; later functions are tried again. Callbacks of
        the future run in the journal's thread: they must be short, and must not wait for
        another future of this writer.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise JournalError(f'journal {self._path}: it is closed; the node is stopping')
            self._backlog += 1
            self._jobs.put((function, future))
        return future

    @property
    def backlog(self) -> int:
        """Number of functions that are queued or being written."""
        return self._backlog

    def close(self) -> None:
        """Finish the submitted functions, then close the journal."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join()
        self._storage.release()

    def _work(self) -> None:
        running = True
        while running:
            group: list[_Job] = []
            job = self._jobs.get()
            try:
                while job is not None:
                    group.append(job)
                    job = self._jobs.get_nowait()
                running = False
            except Empty:
                pass
            self._run([job for job in group if job[1].set_running_or_notify_cancel()])
            with self._lock:
                self._backlog -= len(group)
            # While the thread waits, it must not keep the callers' objects alive.
            del group, job
        self._release()

    def _run(self, group: list[_Job]) -> None:
        try:
            outcomes = self._commit(group)
        except BaseException as error:
            # Includes MemoryError: a future that is never resolved is worse than any error.
            outcomes = [(None, error)] * len(group)
        if any(isinstance(failure, JournalError) for _, failure in outcomes):
            # A disk that was unplugged returns as another device: open the file anew then.
            self._release()
        for (_, future), (result, failure) in zip(group, outcomes, strict=True):
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)

    def _commit(self, group: list[_Job]) -> list[_Outcome]:
        """Run the group in one transaction; return the result or the error of each function."""
        if not group:
            return []
        if self._journal is None:
            if self._was_open and not self._path.exists():
                # An empty journal in its place would silently forget everything.
                raise JournalError(
                    f'journal {self._path}: it has vanished; mount its disk again or put it '
                    'back, or restart the node to begin with an empty one')
            self._journal = Journal(self._path, max_answers=self._max_answers)
            self._was_open = True
        journal = self._journal
        outcomes: list[_Outcome] = []
        with journal.transaction():
            for function, _ in group:
                try:
                    with journal.transaction():
                        outcomes.append((function(journal), None))
                except BaseException as error:
                    if not journal.in_transaction:
                        # SQLite has rolled back the whole group.
                        raise
                    outcomes.append((None, error))
        return outcomes

    def _release(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
