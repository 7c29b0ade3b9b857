# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The thread that owns the journal, so that nobody else ever waits for the disk.

What queues up while one commit is on its way to the disk shares the next one (group
commit): the rate of acknowledgements is not bounded by the disk's fsync rate.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
import os
from pathlib import Path
from queue import Empty, SimpleQueue
import threading
from typing import Any, TypeVar

from mace_ros.store.journal import Journal, MAX_ANSWERS
from mace_ros.store.journal_file import journal_error, JournalError
from mace_ros.store.lock import StorageLock

T = TypeVar('T')
_Job = tuple[Callable[[Journal], Any], Future[Any]]
_Outcome = tuple[Any, BaseException | None]


class JournalWriter:
    """
    Runs functions on the journal at ``path``, in order, in a thread of its own.

    Nobody else may write the folder meanwhile. Raises :class:`JournalError` if the journal
    can't be opened, and :class:`StorageInUse` if another process has it.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_answers: int = MAX_ANSWERS) -> None:
        """Open the journal and start the thread."""
        self._path = Path(path).absolute()
        try:
            self._storage = StorageLock(self._path.parent)
        except OSError as error:
            raise journal_error(self._path, error) from error
        self._max_answers = max_answers
        self._journal: Journal | None = None  # only the thread touches it
        self._known = False  # whether it was open before
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()  # None: no job follows
        self._lock = threading.Lock()
        self._closed = False
        self._backlog = 0
        # A daemon: a node that dies of an error must not hang in here. What it leaves
        # behind was not acknowledged.
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
        Queue ``function``; its future has the result once its writes are on disk.

        Returns at once. An error that the function raises undoes its own writes only and
        is the future's exception. :class:`JournalError` says that the disk failed, for
        this function or for the whole group it shared a commit with; what is submitted
        later is tried afresh. Callbacks of the future run in the journal's thread: they
        must be short, and must not wait for another future of this writer.
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
        """How many functions wait for the disk, with those that it is busy with."""
        return self._backlog

    def close(self) -> None:
        """Finish what was submitted, then close the journal."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join()
        self._storage.release()

    def _work(self) -> None:
        open_ended = True
        while open_ended:
            group: list[_Job] = []
            job = self._jobs.get()
            try:
                while job is not None:
                    group.append(job)
                    job = self._jobs.get_nowait()
                open_ended = False
            except Empty:
                pass
            self._run([job for job in group if job[1].set_running_or_notify_cancel()])
            with self._lock:
                self._backlog -= len(group)
            # While this thread waits, it keeps no caller's objects alive.
            del group, job
        self._release()

    def _run(self, group: list[_Job]) -> None:
        try:
            outcomes = self._commit(group)
        except BaseException as error:
            # Also a MemoryError: a future that is never resolved is worse than any error.
            outcomes = [(None, error)] * len(group)
        if any(isinstance(failure, JournalError) for _, failure in outcomes):
            # A disk that was unplugged comes back as another one: open the file anew then.
            self._release()
        for (_, future), (result, failure) in zip(group, outcomes, strict=True):
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)

    def _commit(self, group: list[_Job]) -> list[_Outcome]:
        """Run the group in one transaction; return each one's result or error."""
        if not group:
            return []
        if self._journal is None:
            if self._known and not self._path.exists():
                # An empty one in its place would forget everything without a word.
                raise JournalError(
                    f'journal {self._path}: it has vanished; mount its disk again or put it '
                    'back, or restart the node to begin with an empty one')
            self._journal = Journal(self._path, max_answers=self._max_answers)
            self._known = True
        journal = self._journal
        outcomes: list[_Outcome] = []
        with journal.transaction():
            for function, _ in group:
                try:
                    with journal.transaction():
                        outcomes.append((function(journal), None))
                except BaseException as error:
                    if not journal.in_transaction:
                        # The disk failed so badly that SQLite took back the whole group.
                        raise
                    outcomes.append((None, error))
        return outcomes

    def _release(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
