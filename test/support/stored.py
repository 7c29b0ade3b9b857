# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Adapter versions on disk and in the journal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from mace_ros.store.adapter_store import AdapterStore
from mace_ros.store.journal import Journal
from mace_ros.store.records import VersionRecord


def publish(journal: Journal, store: AdapterStore, profile: str = '', *corrections: str,
            **fields: object) -> int:
    """Save and publish a version, which continues the newest one; return its number."""
    version = journal.next_version(profile)
    live = journal.newest(profile)
    parent = live.version if live else 0
    saved = store.save(profile, version, {'weight': torch.ones(2)}, {})
    record = VersionRecord(profile, version, parent, continues=parent, correction_ids=corrections,
                           path=saved.path, sha256=saved.sha256)
    journal.publish(replace(record, **fields))  # type: ignore[arg-type]
    return version


def on_disk(folder: Path) -> list[str]:
    """Return the versions whose files are on disk."""
    return sorted(f'{v.parent.name.split("-")[0]}/{v.name}' for v in folder.glob('adapters/*/v*'))
