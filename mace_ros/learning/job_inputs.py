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
from mace_ros.store.records import AnswerRecord, CorrectionRecord, PENDING, VersionRecord

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


def read_records(disk: Disk, store: AdapterStore, profile: str, start: VersionRecord | None,
                 ids: Collection[str], replaced: Collection[str], answers: int,
                 ) -> Task[tuple[Weights | None, JobRecords]]:
    """
    Read what the job of a profile needs; raises :class:`Unreadable`, or :class:`Damaged`.

    That is: the version that it starts from, corrections of that version, by their ``ids``, tool
    calls, and up to ``answers`` other answers. Corrections that are ``replaced`` by the job's are
    superseded, and read as well.
    """
    def read(journal: Journal) -> tuple[Weights | None, JobRecords]:
        return (
            store.load(start.path, start.sha256) if start else None,
            JobRecords(
                tuple(r for r in journal.corrections_by_id(ids) if (
                    r.state is CorrectionState.LEARNED or r.id in replaced)),
                journal.replay_candidates(profile, TOOL_CALLS, calls_tool=True),
                journal.replay_candidates(profile, answers) if answers else ()))

    return (yield from _read(disk, read, 'the corrections'))


def supersede(disk: Disk, newer: CorrectionRecord) -> Task[bool]:
    """
    Supersede the correction that ``newer`` replaces; raises :class:`Unreadable`.

    Returns False if that one came later than ``newer``, or if ``newer`` is superseded itself.
    """
    def write(journal: Journal) -> bool:
        stored = journal.correction(newer.id)
        if stored is None or stored.state not in PENDING:
            return False
        journal.supersede(newer)
        stored = journal.correction(newer.id)
        return stored is not None and stored.replaces == newer.replaces

    return (yield from _read(disk, write, 'the corrections'))


def _read(disk: Disk, read: Callable[[Journal], T], what: str) -> Task[T]:
    reading = disk.submit(read)
    try:
        return (yield from on_disk(reading))
    except CorruptVersion as error:
        raise Damaged(f'the live version could not be read: {error}') from error
    except Exception as error:
        raise Unreadable(f'{what} could not be read: {error}') from error
