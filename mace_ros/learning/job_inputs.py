# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The inputs that a job of learning reads from disk."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from mace_ros.learning.disk import Disk
from mace_ros.learning.task import on_disk, Task
from mace_ros.store.adapter_store import AdapterStore
from mace_ros.store.journal import Journal
from mace_ros.store.records import AnswerRecord, CorrectionRecord, VersionRecord


class Unreadable(Exception):
    """A job cannot begin because the disk fails; the corrections are not at fault."""


@dataclass(frozen=True)
class JobInputs:
    """The live version, None for the base model, and the records to replay."""

    live: VersionRecord | None
    answers: tuple[AnswerRecord, ...]
    learned: tuple[CorrectionRecord, ...]
    tensors: dict[str, Tensor] | None


def read_inputs(disk: Disk, store: AdapterStore, profile: str, answers: int) -> Task[JobInputs]:
    """Read the live version and up to ``answers`` answers; raises :class:`Unreadable`."""
    def read(journal: Journal) -> JobInputs:
        # A profile without a version begins from the robot's at its first correction.
        live = journal.next_parent(profile)
        return JobInputs(
            live, journal.replay_candidates(profile, answers), journal.held_by(live),
            store.load(live.path, live.sha256) if live else None)

    reading = disk.submit(read)
    try:
        return (yield from on_disk(reading))
    except Exception as error:
        raise Unreadable(f'the live version could not be read: {error}') from error


def read_learned(disk: Disk, profile: str,
                 ids: Collection[str]) -> Task[tuple[CorrectionRecord, ...]]:
    """Read corrections that a profile has learned; raises :class:`Unreadable`."""
    reading = disk.submit(lambda journal: tuple(
        record for record in journal.learned(profile) if record.id in ids))
    try:
        return (yield from on_disk(reading))
    except Exception as error:
        raise Unreadable(f'the corrections could not be read: {error}') from error
