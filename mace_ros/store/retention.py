# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Deletion of old adapter versions from the disk, after the journal has forgotten them."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING

from mace_ros.store.journal import Journal
from mace_ros.store.journal_file import JournalError
from mace_ros.store.journal_writer import JournalWriter

if TYPE_CHECKING:
    from mace_ros.store.adapter_store import AdapterStore


def remove_files(journal: Journal, store: AdapterStore) -> None:
    """Delete the files of forgotten versions, after the transaction that forgot them."""
    for record in journal.forgotten_files():
        store.remove(record.path)
        journal.version_files_deleted(record)


def tidy(writer: JournalWriter, store: AdapterStore, max_versions: int) -> None:
    """Forget old versions and delete their files, in the journal's thread."""
    def remove(forgotten: Future[None]) -> None:
        # Only after the commit: the journal must never name files that are deleted.
        if forgotten.exception() is None:
            with suppress(JournalError):    # closed meanwhile; the next start deletes them
                writer.submit(lambda journal: remove_files(journal, store))

    writer.submit(
        lambda journal: journal.forget_old_versions(max_versions)).add_done_callback(remove)
