# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What a job of learning reads from disk."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeVar

from mace_ros.api.events import CorrectionState
from mace_ros.learning.disk import Disk
from mace_ros.learning.live_versions import Weights
from mace_ros.learning.task import on_disk, Task
from mace_ros.store.adapter_store import AdapterStore, CorruptVersion
from mace_ros.store.journal import Journal
from mace_ros.store.records import AnswerRecord, CorrectionRecord, VersionRecord

T = TypeVar('T')

TOOL_CALLS = 16     # answers that call a tool and are guarded in one job, the newest ones


class Unreadable(Exception):
    """A job cannot begin because the disk fails; the corrections are not at fault."""


class Damaged(Unreadable):
    """The files of the version that a job is to continue are damaged."""


@dataclass(frozen=True)
class JobRecords:
    """
    The records that a training set is made of, beside the corrections of the job.

    ``learned`` are corrections of the version that the job trains on, ``tool_calls`` answers that
    call a tool, which a version must not change, and ``answers`` those to replay.
    """

    learned: tuple[CorrectionRecord, ...] = ()
    tool_calls: tuple[AnswerRecord, ...] = ()
    answers: tuple[AnswerRecord, ...] = ()


@dataclass(frozen=True)
class NewestVersion:
    """The version that answers all queries, with its weights; None is the base model."""

    record: VersionRecord | None
    weights: Weights | None


def read_newest(disk: Disk, store: AdapterStore, profile: str,
                answers: int) -> Task[tuple[NewestVersion, JobRecords]]:
    """Read the newest version and up to ``answers`` answers; raises :class:`Unreadable`."""
    def read(journal: Journal) -> tuple[NewestVersion, JobRecords]:
        # A profile without a version begins from the robot's at its first correction.
        live = journal.next_parent(profile)
        return (
            NewestVersion(live, store.load(live.path, live.sha256) if live else None),
            JobRecords(journal.held_by(live),
                       journal.replay_candidates(profile, TOOL_CALLS, calls_tool=True),
                       journal.replay_candidates(profile, answers)))

    return (yield from _read(disk, read, 'the records of answers'))


def read_scoped(disk: Disk, store: AdapterStore, profile: str, continues: VersionRecord | None,
                ids: Collection[str], replaced: Collection[str],
                ) -> Task[tuple[Weights | None, JobRecords]]:
    """
    Read the version that a job continues, corrections that it has learned, and tool calls.

    The corrections are read by their ``ids``. Those that are ``replaced`` by the job's corrections
    are superseded, and read as well. Raises :class:`Unreadable`, or :class:`Damaged`.
    """
    def read(journal: Journal) -> tuple[Weights | None, JobRecords]:
        return (
            store.load(continues.path, continues.sha256) if continues else None,
            JobRecords(
                tuple(r for r in journal.corrections_by_id(ids) if (
                    r.state is CorrectionState.LEARNED or r.id in replaced)),
                journal.replay_candidates(profile, TOOL_CALLS, calls_tool=True)))

    return (yield from _read(disk, read, 'the corrections'))


def _read(disk: Disk, read: Callable[[Journal], T], what: str) -> Task[T]:
    reading = disk.submit(read)
    try:
        return (yield from on_disk(reading))
    except CorruptVersion as error:
        raise Damaged(f'the live version could not be read: {error}') from error
    except Exception as error:
        raise Unreadable(f'{what} could not be read: {error}') from error
