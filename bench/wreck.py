# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What a killed node has left in its storage folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
import shutil
import tempfile
from typing import Any


@dataclass(frozen=True)
class Wreck:
    """
    What lies in the folder.

    ``live`` has version and checksum of each profile that has versions; ``corrections`` are
    the ids of all of them but those that are called learned and are not, for the live version
    does not hold them. A half-written version is told from one that is whole by its name
    (``leftovers``); ``saved`` are whole, and not on record. ``damaged`` says what of all that
    has a version's name, or is on record, can't be loaded.
    """

    live: Mapping[str, tuple[int, str]]
    versions: Collection[tuple[str, int]]
    corrections: Collection[str]
    leftovers: Collection[str]
    saved: Collection[str]
    damaged: Collection[str]


def examine(folder: Path) -> Wreck:
    """
    Look at a storage folder that no node uses, and leave it as it is.

    To open a journal is to repair it, which is for the node to do: a copy is opened.
    """
    with tempfile.TemporaryDirectory(prefix='mace-wreck-') as name:
        copy = Path(name) / 'storage'
        shutil.copytree(folder, copy)
        return _examine(copy)


def _examine(folder: Path) -> Wreck:
    from safetensors.torch import load_file

    from mace_ros.api.events import CorrectionState
    from mace_ros.store.adapter_store import AdapterStore, CorruptVersion, WEIGHTS
    from mace_ros.store.journal import Journal
    from mace_ros.store.layout import JOURNAL
    from mace_ros.store.lineage import Lineage

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
    lines = {live.profile: Lineage([r for r in records if r.profile == live.profile], live.version)
             for live in lives}
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
        except (CorruptVersion, OSError, ValueError) as error:
            damaged.append(f'{path}: {error}')
        except Exception as error:      # safetensors has an error of its own
            damaged.append(f'{path}: {error}')
    return Wreck(
        live={r.profile: (r.version, r.sha256) for r in lives},
        versions={(r.profile, r.version) for r in records}, corrections=kept,
        leftovers=sorted(leftovers), saved=sorted(whole - {r.path for r in records}),
        damaged=damaged)


def lost(wreck: Wreck, acknowledged: Collection[str]) -> list[str]:
    """Return which acknowledged corrections are gone, or called learned and are not."""
    return sorted(set(acknowledged) - set(wreck.corrections))


def older(wreck: Wreck, announced: Mapping[str, tuple[int, str]]) -> list[str]:
    """Say of which profiles something older, or else, is live than was announced last."""
    found: list[str] = []
    for profile, (version, sha256) in announced.items():
        live: tuple[int, Any] = wreck.live.get(profile, (0, ''))
        if live[0] < version or (live[0] == version and live[1] != sha256):
            found.append(f'{profile!r}: version {live[0]} instead of {version}')
    return found
