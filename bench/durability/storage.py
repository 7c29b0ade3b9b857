# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The contents of the storage folder of a node that was killed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
import shutil
import tempfile
from typing import Any


@dataclass(frozen=True)
class StorageSnapshot:
    """
    What the folder holds.

    ``live`` maps each profile with versions to its live version and checksum. ``versions``
    are those in the journal. ``corrections`` are the ids of all corrections in the journal
    except those marked as learned whose learned weights the live version does not descend
    from. ``leftovers`` are folders of half-written versions, recognised by their names;
    ``unrecorded`` are folders of complete versions that the journal does not have.
    ``damaged`` lists recorded or complete versions that do not load, with the reason.
    """

    live: Mapping[str, tuple[int, str]]
    versions: Collection[tuple[str, int]]
    corrections: Collection[str]
    leftovers: Collection[str]
    unrecorded: Collection[str]
    damaged: Collection[str]


def inspect_storage(folder: Path) -> StorageSnapshot:
    """
    Inspect a storage folder that no node uses, without changing it.

    Opening a journal repairs it, which must be left to the node: a copy is opened.
    """
    with tempfile.TemporaryDirectory(prefix='mace-storage-') as name:
        copy = Path(name) / 'storage'
        shutil.copytree(folder, copy)
        return _inspect(copy)


def _inspect(folder: Path) -> StorageSnapshot:
    from safetensors.torch import load_file

    from mace_ros.api.events import CorrectionState
    from mace_ros.store.adapter_store import AdapterStore, WEIGHTS
    from mace_ros.store.journal import Journal
    from mace_ros.store.layout import JOURNAL

    def names(pattern: str) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.glob(pattern)}

    leftovers, whole = names('adapters/*/.tmp-*'), names('adapters/*/v*')
    damaged: list[str] = []
    with Journal(folder / JOURNAL) as journal:
        row = journal.one('PRAGMA integrity_check')
        if row is None or row[0] != 'ok':
            damaged.append(JOURNAL)
        records, lives = journal.versions(), journal.live_versions()
        corrections = journal.corrections()
        lines = {live.profile: journal.lineage(live.profile, live.version) for live in lives}
    kept = {c.id for c in corrections if c.state is not CorrectionState.LEARNED
            or c.adapter_version == 0
            or (c.profile in lines and lines[c.profile].holds(c.adapter_version))}
    store = AdapterStore(folder)
    on_record = {r.path: r.sha256 for r in records if r.sha256}
    for path in sorted(whole | on_record.keys()):
        try:
            store.config(path)
            if path in on_record:
                store.load(path, on_record[path])
            else:
                load_file(folder / path / WEIGHTS)
        except Exception as error:      # any way to fail counts, also safetensors' own
            damaged.append(f'{path}: {error}')
    return StorageSnapshot(
        live={r.profile: (r.version, r.sha256) for r in lives},
        versions={(r.profile, r.version) for r in records}, corrections=kept,
        leftovers=sorted(leftovers), unrecorded=sorted(whole - {r.path for r in records}),
        damaged=damaged)


def lost_corrections(snapshot: StorageSnapshot, acknowledged: Collection[str]) -> list[str]:
    """Return the acknowledged corrections that are missing or wrongly marked as learned."""
    return sorted(set(acknowledged) - set(snapshot.corrections))


def outdated_profiles(snapshot: StorageSnapshot,
                      announced: Mapping[str, tuple[int, str]]) -> list[str]:
    """Describe profiles whose live version is not the announced one or a newer one."""
    found: list[str] = []
    for profile, (version, sha256) in announced.items():
        live: tuple[int, Any] = snapshot.live.get(profile, (0, ''))
        if live[0] < version or (live[0] == version and live[1] != sha256):
            found.append(f'{profile!r}: version {live[0]} instead of {version}')
    return found
