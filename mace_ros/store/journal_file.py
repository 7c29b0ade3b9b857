# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The SQLite file of the journal: opening, migration, transactions, errors with advice.

WAL mode with ``synchronous=FULL``: a transaction is on disk when it ends. Deleted content is
overwritten (``secure_delete``), and leaves the write-ahead log with
:meth:`JournalFile.compact`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import math
import os
from pathlib import Path
import shutil
import sqlite3
import time

from mace_ros.store.schema import MIGRATIONS, SCHEMA_VERSION

_BUSY_SECONDS = 5.0

# Parts of SQLite's messages (sqlite_errorcode needs Python 3.11), and what to do about each.
_ADVICE = {
    'disk is full': 'free space on its file system, then send again what was not acknowledged',
    'disk I/O error': 'check its file system (full, unplugged, damaged?), then send again what '
                      'was not acknowledged',
    'readonly': 'make the file and its folder writable, or set storage.folder to one that is',
    'unable to open': 'make its folder writable, or set storage.folder to one that is',
    'locked': 'another process holds it; stop that process, or set another storage.folder',
    'malformed': 'it is damaged: put back a backup, or move it away to start with an empty one',
    'not a database': 'it is damaged or not a journal: put back a backup, or move it away to '
                      'start with an empty one',
}


class JournalError(RuntimeError):
    """The journal could not be read or written; the message says what to do."""


class JournalFile:
    """
    The journal's SQLite connection, for use by one thread.

    Every method raises :class:`JournalError` if the disk fails, and has then changed nothing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the file at ``path``, creating it and its folder if necessary."""
        self.path = Path(path).absolute()
        try:
            make_folder(self.path.parent)
            # isolation_level None: transaction() begins and ends all transactions.
            self._db = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise journal_error(self.path, error) from error
        try:
            self._configure()
            self._migrate()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the file; everything written is on disk already."""
        self._db.close()

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return self._db.in_transaction

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """
        Run the body as one transaction: all or nothing, on disk at the end.

        A nested call is a savepoint: an error undoes only the nested part, and the outermost
        transaction is the one that reaches the disk.
        """
        outermost = not self._db.in_transaction
        # IMMEDIATE takes the write lock now; a deferred one could fail half-way because of
        # another process.
        self.execute('BEGIN IMMEDIATE' if outermost else 'SAVEPOINT nested')
        try:
            yield
            self.execute('COMMIT' if outermost else 'RELEASE nested')
        except BaseException:
            # After some errors (disk full) SQLite has already rolled everything back.
            if self._db.in_transaction:
                if outermost:
                    self.execute('ROLLBACK')
                else:
                    self.execute('ROLLBACK TO nested')
                    self.execute('RELEASE nested')
            raise

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read a consistent state while another process may write; do not write inside."""
        self.execute('BEGIN')
        try:
            yield
        finally:
            self.execute('COMMIT')

    def compact(self) -> bool:
        """
        Move the write-ahead log into the file, so that no deleted content remains on disk.

        Must not be called inside a transaction. Returns False, keeping the log, if another
        process reads the file for longer than a few seconds.
        """
        end = time.monotonic() + _BUSY_SECONDS
        while True:
            row = self.one('PRAGMA wal_checkpoint(TRUNCATE)')
            if row is not None and row[0] == 0:
                return True
            if time.monotonic() > end:
                return False
            time.sleep(0.05)

    # For the modules of mace_ros.store only: no SQL is written outside this package.

    def execute(self, statement: str, *values: object) -> sqlite3.Cursor:
        """Run a statement."""
        try:
            return self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise journal_error(self.path, error) from error

    def rows(self, statement: str, *values: object) -> list[sqlite3.Row]:
        """Run a query; return all its rows."""
        cursor = self.execute(statement, *values)
        try:
            return cursor.fetchall()
        except sqlite3.Error as error:
            raise journal_error(self.path, error) from error

    def one(self, statement: str, *values: object) -> sqlite3.Row | None:
        """Run a query; return its first row, None if it has none."""
        return next(iter(self.rows(statement, *values)), None)

    def insert(self, verb: str, table: str, **columns: object) -> int:
        """Insert (or replace) a row; return its row id."""
        names, marks = ', '.join(columns), ', '.join('?' * len(columns))
        cursor = self.execute(
            f'{verb} INTO {table} ({names}) VALUES ({marks})', *columns.values())
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def _configure(self) -> None:
        self._db.row_factory = sqlite3.Row
        row = self.one('PRAGMA journal_mode = WAL')
        if row is None or row[0] != 'wal':
            raise JournalError(
                f'journal {self.path}: its file system cannot share memory between processes '
                '(a network drive?); set storage.folder to a local one')
        # In WAL mode the default, NORMAL, may lose the last commits in a power failure.
        self.execute('PRAGMA synchronous = FULL')
        self.execute('PRAGMA secure_delete = ON')

    def _migrate(self) -> None:
        with self.transaction():
            row = self.one('PRAGMA user_version')
            found = row[0] if row is not None else 0
            if found > SCHEMA_VERSION:
                raise JournalError(
                    f'journal {self.path}: written by a newer mace_ros (schema {found}, this one '
                    f'knows {SCHEMA_VERSION}); update mace_ros, or set another storage.folder')
            for migration in MIGRATIONS[found:]:
                for statement in migration:
                    self.execute(statement)
            self.execute(f'PRAGMA user_version = {SCHEMA_VERSION}')


def make_folder(folder: Path) -> None:
    """Create a folder and its parents durably: they survive a power failure."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for created in missing:
        sync_folder(created.parent)


def low_space(folder: Path, min_free_mb: float) -> str:
    """Return why nothing more must be written to a folder; '' if its disk has enough space."""
    free = free_mb(folder)
    return '' if not free < min_free_mb else (
        f'{free:.0f} MB are free on the disk of {folder}, less than storage.min_free_mb '
        f'({min_free_mb:g}): free some space')


def free_mb(folder: Path) -> float:
    """Return the free space on the disk of a folder; NaN if it cannot be read."""
    try:
        return shutil.disk_usage(folder).free / 1e6
    except OSError:
        return math.nan


def sync_folder(folder: Path) -> None:
    """Wait until the folder's entries are on disk, as fsync does for the content of a file."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def journal_error(path: Path, error: Exception) -> JournalError:
    """Return a :class:`JournalError` that says what to do about ``error``."""
    advice = next(
        (advice for part, advice in _ADVICE.items() if part in str(error)),
        'check that its folder can be written and is not full')
    return JournalError(f'journal {path}: {error}; {advice}')
