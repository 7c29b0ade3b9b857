# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The SQLite file below the journal: opening, schema, transactions, errors with advice.

WAL mode with ``synchronous=FULL``: what a transaction has written is on disk when it ends.
What is deleted is overwritten (``secure_delete``), and gone once :meth:`JournalFile.compact`
has emptied the log, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import os
from pathlib import Path
import sqlite3
import time

_BUSY_SECONDS = 5.0

# What made each version of the schema out of the one before it.
_STEPS = (
    (
        """
        CREATE TABLE answers (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            query_id TEXT NOT NULL UNIQUE,
            conversation_id TEXT NOT NULL,
            profile TEXT NOT NULL,
            prompt_ids TEXT NOT NULL,
            messages TEXT NOT NULL,
            text TEXT NOT NULL,
            output_ids TEXT NOT NULL,
            adapter_version INTEGER NOT NULL,
            no_learn INTEGER NOT NULL,
            time REAL NOT NULL,
            question TEXT NOT NULL)
        """,
        "CREATE INDEX answers_conversation ON answers (conversation_id) "
        "WHERE conversation_id <> ''",
        'CREATE INDEX answers_replay ON answers (profile, question, query_id) WHERE no_learn = 0',
        """
        CREATE TABLE corrections (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            query_id TEXT NOT NULL,
            conversation_id TEXT NOT NULL,
            profile TEXT NOT NULL,
            prompt_ids TEXT NOT NULL,
            messages TEXT NOT NULL,
            rejected TEXT NOT NULL,
            corrected TEXT NOT NULL,
            weight REAL NOT NULL,
            source TEXT NOT NULL,
            received REAL NOT NULL,
            state INTEGER NOT NULL,
            reason TEXT NOT NULL,
            adapter_version INTEGER NOT NULL,
            question TEXT NOT NULL)
        """,
        'CREATE INDEX corrections_state ON corrections (state, profile)',
        'CREATE INDEX corrections_query ON corrections (query_id)',
        'CREATE INDEX corrections_question ON corrections (profile, question)',
        """
        CREATE TABLE versions (
            profile TEXT NOT NULL,
            version INTEGER NOT NULL,
            parent INTEGER NOT NULL,
            state INTEGER NOT NULL,
            reason TEXT NOT NULL,
            correction_ids TEXT NOT NULL,
            score_before REAL,
            score_after REAL,
            train_tokens INTEGER NOT NULL,
            train_seconds REAL NOT NULL,
            path TEXT NOT NULL,
            sha256 TEXT NOT NULL,
            created REAL NOT NULL,
            PRIMARY KEY (profile, version))
        """,
        # last_version is the highest number ever given out, so that none is given out twice.
        """
        CREATE TABLE profiles (
            profile TEXT PRIMARY KEY,
            live_version INTEGER NOT NULL DEFAULT 0,
            last_version INTEGER NOT NULL DEFAULT 0)
        """,
    ),
    (
        # Whose version gave the answer, which may be the robot's for a profile of a person.
        "ALTER TABLE answers ADD COLUMN lineage TEXT NOT NULL DEFAULT ''",
        'CREATE INDEX answers_question ON answers (profile, question)',
        # The robot's version that the profile's own line begins from; NULL: not yet chosen.
        'ALTER TABLE profiles ADD COLUMN fork INTEGER',
    ),
    (
        # The newest answers of a line of versions, each time that one of them is corrected.
        'CREATE INDEX answers_lineage ON answers (lineage, number)',
    ),
    (
        # To the questions that learning must not change.
        """
        CREATE TABLE base_answers (
            prompt_ids TEXT PRIMARY KEY,
            output_ids TEXT NOT NULL,
            model TEXT NOT NULL)
        """,
    ),
    (
        # The robot's version that the line of a profile's version has begun from.
        'ALTER TABLE versions ADD COLUMN fork INTEGER',
        'UPDATE versions SET fork = '
        '(SELECT fork FROM profiles WHERE profiles.profile = versions.profile)',
    ),
)
_SCHEMA_VERSION = len(_STEPS)

# What SQLite says (sqlite_errorcode needs Python 3.11), and what a person can do about it.
_REMEDIES = {
    'disk is full': 'free space on its file system, then send again what was not acknowledged',
    'disk I/O error': 'check its file system (full, unplugged, damaged?), then send again what '
                      'was not acknowledged',
    'readonly': 'make the file and its folder writable, or set storage.folder to one that is',
    'unable to open': 'make its folder writable, or set storage.folder to one that is',
    'locked': 'another process holds it; stop that process, or set another storage.folder',
    'malformed': 'it is damaged: put back a backup, or move it away to start with an empty one',
    'not a database': 'it is damaged or not ours: put back a backup, or move it away to start '
                      'with an empty one',
}


class JournalError(RuntimeError):
    """The journal could not be read or written; the message says what to do."""


class JournalFile:
    """
    The file at ``path``, opened or made; for one thread.

    Every method raises :class:`JournalError` if the disk fails; it has then changed nothing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the file, making it and its folder if need be."""
        self.path = Path(path).absolute()
        try:
            make_folder(self.path.parent)
            # Transactions are ours (isolation_level None), see transaction().
            self._db = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise journal_error(self.path, error) from error
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the file; nothing is lost, whatever was written is on disk already."""
        self._db.close()

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return self._db.in_transaction

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """
        Make what happens inside one transaction: all or nothing, on disk at the end.

        Inside another one it is a savepoint: an error undoes only what came after it, and
        the outermost transaction is the one that reaches the disk.
        """
        outermost = not self._db.in_transaction
        # IMMEDIATE: take the write lock now, rather than fail half-way because of another
        # process.
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

    def _prepare(self) -> None:
        self._db.row_factory = sqlite3.Row
        row = self.one('PRAGMA journal_mode = WAL')
        if row is None or row[0] != 'wal':
            raise JournalError(
                f'journal {self.path}: its file system cannot share memory between processes '
                '(a network drive?); set storage.folder to a local one')
        # In WAL mode the default, NORMAL, may lose the last commits when power fails.
        self.execute('PRAGMA synchronous = FULL')
        self.execute('PRAGMA secure_delete = ON')
        with self.transaction():
            row = self.one('PRAGMA user_version')
            found = row[0] if row is not None else 0
            if found > _SCHEMA_VERSION:
                raise JournalError(
                    f'journal {self.path}: written by a newer mace_ros (schema {found}, this one '
                    f'knows {_SCHEMA_VERSION}); update mace_ros, or set another storage.folder')
            for step in _STEPS[found:]:
                for statement in step:
                    self.execute(statement)
            self.execute(f'PRAGMA user_version = {_SCHEMA_VERSION}')

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """See the file as it is now, while others may write it; only read inside."""
        self.execute('BEGIN')
        try:
            yield
        finally:
            self.execute('COMMIT')

    def compact(self) -> bool:
        """
        Empty the write-ahead log into the file, so that no trace of what was deleted is left.

        Not inside a transaction. Returns False if another process reads the file for longer
        than a few seconds, and keeps the log.
        """
        end = time.monotonic() + _BUSY_SECONDS
        while True:
            row = self.one('PRAGMA wal_checkpoint(TRUNCATE)')
            if row is not None and row[0] == 0:
                return True
            if time.monotonic() > end:
                return False
            time.sleep(0.05)

    # For the modules of this package that say in SQL what they want.

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
        """Run a query; return its first row, if there is one."""
        return next(iter(self.rows(statement, *values)), None)

    def insert(self, verb: str, table: str, **columns: object) -> int:
        """Insert (or replace) a row; return its number."""
        names, marks = ', '.join(columns), ', '.join('?' * len(columns))
        cursor = self.execute(
            f'{verb} INTO {table} ({names}) VALUES ({marks})', *columns.values())
        assert cursor.lastrowid is not None
        return cursor.lastrowid


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, in such a way that they survive a power failure."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in that folder are on disk, as fsync does for a file's content."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def journal_error(path: Path, error: Exception) -> JournalError:
    """Return an error that says what to do."""
    advice = next(
        (advice for said, advice in _REMEDIES.items() if said in str(error)),
        'check that its folder can be written and is not full')
    return JournalError(f'journal {path}: {error}; {advice}')
