# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The inputs that a job of learning reads from disk."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from mace_ros.api.events import CorrectionState
from mace_ros.learning.disk import Disk
from mace_ros.learning.task import on_disk, Task
from mace_ros.store.adapter_store import AdapterStore
from mace_ros.store.journal import Journal
from mace_ros.store.records import AnswerRecord, CorrectionRecord, VersionRecord

TOOL_CALLS = 16     # answers that call a tool and are guarded in one job, the newest ones


class Unreadable(Exception):
    """A job cannot begin because the disk fails; the corrections are not at fault."""


@dataclass(frozen=True)
class JobInputs:
    """
    The live version, None for the base model, and the records to replay.

    ``tool_calls`` are answers that call a tool, which a version must not change.
    """

    live: VersionRecord | None
    answers: tuple[AnswerRecord, ...]
    learned: tuple[CorrectionRecord, ...]
    tensors: dict[str, Tensor] | None
    tool_calls: tuple[AnswerRecord, ...] = ()


def read_inputs(disk: Disk, store: AdapterStore, profile: str, answers: int) -> Task[JobInputs]:
    """Read the live version and up to ``answers`` answers; raises :class:`Unreadable`."""
    def read(journal: Journal) -> JobInputs:
        # A profile without a version begins from the robot's at its first correction.
        live = journal.next_parent(profile)
        return JobInputs(
            live, journal.replay_candidates(profile, answers), journal.held_by(live),
            store.load(live.path, live.sha256) if live else None,
            journal.replay_candidates(profile, TOOL_CALLS, calls_tool=True))

    reading = disk.submit(read)
    try:
        return (yield from on_disk(reading))
    except Exception as error:
        raise Unreadable(f'the live version could not be read: {error}') from error


def read_scoped(disk: Disk, profile: str, ids: Collection[str],
                replaced: Collection[str]) -> Task[JobInputs]:
    """
    Read learned corrections by their ids, and tool calls; raises :class:`Unreadable`.

    Those that are ``replaced`` by the job's corrections are superseded, and read as well.
    """
    def read(journal: Journal) -> JobInputs:
        known = journal.scope(profile) if ids else ()
        return JobInputs(
            None, (), tuple(r for r in known if r.id in ids and (
                r.state is CorrectionState.LEARNED or r.id in replaced)), None,
            journal.replay_candidates(profile, TOOL_CALLS, calls_tool=True))

    reading = disk.submit(read)
    try:
        return (yield from on_disk(reading))
    except Exception as error:
        raise Unreadable(f'the corrections could not be read: {error}') from error
