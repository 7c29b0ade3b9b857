# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
What is kept, and how it is forgotten, by a rule or because somebody wants it so.

Nothing that is still to be learned is ever forgotten by the rule, nor what is live.
"""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING

from mace_ros.api.events import CorrectionState, InvalidCorrection
from mace_ros.store.journal import as_json, Journal, PENDING_SQL, VersionRecord
from mace_ros.store.journal_file import JournalError
from mace_ros.store.journal_writer import JournalWriter

if TYPE_CHECKING:
    from mace_ros.store.adapter_store import AdapterStore

VERSION_RECORDS = 1000      # of each profile; without files they are a few hundred bytes each


def make_room(journal: Journal, max_corrections: int) -> None:
    """
    Forget the oldest corrections, so that there are no more than that.

    First those that are in no version, then the learned ones. Raises
    :class:`InvalidCorrection` if nothing but pending ones are left.
    """
    row = journal.one('SELECT count(*) FROM corrections')
    surplus = (row[0] if row is not None else 0) - max_corrections
    if surplus <= 0:
        return
    finished = [row['id'] for row in journal.rows(
        f'SELECT id FROM corrections WHERE state NOT IN {PENDING_SQL} '
        'ORDER BY state = ?, number LIMIT ?', int(CorrectionState.LEARNED), surplus)]
    if len(finished) < surplus:
        raise InvalidCorrection(
            f'{max_corrections} corrections wait already (storage.max_corrections)')
    forget_corrections(journal, finished, keep_corrected=True)


def forget_corrections(journal: Journal, ids: Collection[str], *,
                       keep_corrected: bool = False) -> int:
    """
    Delete corrections, and all answers to their questions; return how many were there.

    The answers go, too: without the correction, a wrong one would count as one to keep.
    ``keep_corrected`` keeps those that another correction refers to which is to be learned yet.
    """
    with journal.transaction():
        journal.execute(
            'DELETE FROM answers WHERE number IN (SELECT a.number FROM answers AS a '
            'JOIN corrections AS c ON c.id IN (SELECT value FROM json_each(?1)) '
            'AND (a.query_id = c.query_id OR (a.profile = c.profile AND a.question = c.question))) '
            'AND NOT (?2 AND query_id IN (SELECT query_id FROM corrections '
            f'WHERE state IN {PENDING_SQL} AND id NOT IN (SELECT value FROM json_each(?1))))',
            as_json(list(ids)), keep_corrected)
        return journal.execute(
            'DELETE FROM corrections WHERE id IN (SELECT value FROM json_each(?))',
            as_json(list(ids))).rowcount


def forget_answers(journal: Journal, query_ids: Collection[str]) -> int:
    """Delete answers; return how many were there."""
    with journal.transaction():
        return journal.execute(
            'DELETE FROM answers WHERE query_id IN (SELECT value FROM json_each(?))',
            as_json(list(query_ids))).rowcount


def needed_versions(journal: Journal) -> set[tuple[str, int]]:
    """Return profile and number of the versions that are live, or that a profile begins from."""
    needed = {(record.profile, record.version) for record in journal.lives()}
    return needed | {('', row['fork']) for row in journal.rows(
        'SELECT fork FROM profiles WHERE live_version = 0 AND fork > 0')}


def forget_version(journal: Journal, record: VersionRecord) -> None:
    """Have :func:`remove_files` delete a version's files; what is told of it stays."""
    journal.execute("UPDATE versions SET sha256 = '' WHERE profile = ? AND version = ?",
                    record.profile, record.version)


def forget_old_versions(journal: Journal, max_versions: int) -> None:
    """Keep the files of the newest versions of each profile, and of those that are needed."""
    with journal.transaction():
        needed = needed_versions(journal)
        kept: dict[str, int] = {}
        seen: dict[str, int] = {}
        for record in reversed(journal.versions()):     # newest first
            profile = record.profile
            seen[profile] = seen.get(profile, 0) + 1
            if (profile, record.version) in needed:
                continue
            if record.sha256:
                kept[profile] = kept.get(profile, 0) + 1
                if kept[profile] >= max_versions:       # the live one is one of them
                    forget_version(journal, record)
            elif seen[profile] > VERSION_RECORDS:
                journal.execute('DELETE FROM versions WHERE profile = ? AND version = ?',
                                profile, record.version)


def remove_files(journal: Journal, store: AdapterStore) -> None:
    """Delete the files of forgotten versions; not in the transaction that forgot them."""
    for record in journal.versions():
        if record.path and not record.sha256:
            store.remove(record.path)
            journal.execute("UPDATE versions SET path = '' WHERE profile = ? AND version = ?",
                            record.profile, record.version)


def tidy(writer: JournalWriter, store: AdapterStore, max_versions: int) -> None:
    """Forget old versions in the journal's thread, where they are saved as well."""
    def remove(forgotten: Future[None]) -> None:
        # After its commit: files must not be gone before the journal says so for good.
        if forgotten.exception() is None:
            with suppress(JournalError):    # closed meanwhile; the next start removes them
                writer.submit(lambda journal: remove_files(journal, store))

    writer.submit(
        lambda journal: forget_old_versions(journal, max_versions)).add_done_callback(remove)
