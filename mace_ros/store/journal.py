# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The robot's durable memory of answers, corrections and adapter versions.

One SQLite file: what a method of :class:`Journal` has written is on disk when it returns. ROS
callbacks and the engine must not wait for that; they use
:class:`mace_ros.store.journal_writer.JournalWriter`.

Order is that of insertion, never of time stamps: the clock of a robot without a battery may
start in 1970 and jump.
"""

from __future__ import annotations

from mace_ros.api.events import VersionState
from mace_ros.store.answers import AnswerTable
from mace_ros.store.corrections import CorrectionTable
from mace_ros.store.records import CorrectionRecord, VersionRecord
from mace_ros.store.versions import VersionTable


class Journal(AnswerTable, CorrectionTable, VersionTable):
    """
    The journal, for use by one thread; a context manager.

    Every method raises :class:`JournalError` if the disk fails, and has then changed nothing.
    """

    def __enter__(self) -> Journal:
        """Return the journal itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the journal."""
        self.close()

    def publish(self, record: VersionRecord) -> tuple[str, ...]:
        """
        Record a version, make it live and its corrections LEARNED, all or nothing.

        Returns the ids of the corrections that became LEARNED: a correction that was
        superseded during training stays SUPERSEDED.
        """
        if record.state is not VersionState.PUBLISHED:
            raise ValueError(f'version {record.version} is {record.state.name}, not PUBLISHED')
        with self.transaction():
            self.record_version(record)
            self.make_live(record.profile, record.version)
            return self.mark_learned(record.correction_ids, record.version)

    def scope(self, profile: str) -> tuple[CorrectionRecord, ...]:
        """
        Return the corrections that define the scope of the profile's live version.

        One that is superseded stays until its replacement is learned.
        """
        lineage = self.live_lineage(profile)
        return *(c for c in self.replaced_later(profile) if lineage.holds(c.adapter_version)), *(
            self.learned(profile))

    def scope_of(self, version: VersionRecord) -> tuple[CorrectionRecord, ...]:
        """Return what the scope of a version is, or would be after a rollback to it."""
        profile, newest = version.profile, self.newest(version.profile)
        if newest is not None and newest.version == version.version:
            return self.scope(profile)
        lineage = self.lineage(profile, version.version)
        held = [c for c in self.trained(profile) if lineage.holds(c.adapter_version)]
        replaced = {c.replaces for c in held}
        return tuple({c.prompt_ids: c for c in held if c.id not in replaced}.values())
