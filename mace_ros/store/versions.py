# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The adapter versions in the journal: their numbers, their lineages, and which ones are live."""

from __future__ import annotations

from collections.abc import Collection
import math
import sqlite3

from mace_ros.api.events import VersionState
from mace_ros.store.journal_file import JournalFile
from mace_ros.store.lineage import Lineage, VersionLink
from mace_ros.store.records import as_json, VersionRecord
from mace_ros.store.rows import record_fields

VERSION_RECORDS = 1000      # per profile; without files, a record takes a few hundred bytes


class VersionTable(JournalFile):
    """The tables ``versions`` and ``profiles``."""

    def next_version(self, profile: str) -> int:
        """
        Reserve and return a version number that this profile never had.

        It is not reused, whether its version is published, rejected or lost in a crash.
        """
        with self.transaction():
            self.execute(
                'INSERT INTO profiles (profile, last_version) VALUES (?, 1) '
                'ON CONFLICT (profile) DO UPDATE SET last_version = last_version + 1', profile)
            row = self.one('SELECT last_version FROM profiles WHERE profile = ?', profile)
            assert row is not None
            return int(row['last_version'])

    def record_version(self, record: VersionRecord) -> None:
        """Record a version without making it live, such as a rejected one."""
        if record.version < 1:
            raise ValueError(f'version {record.version}: 1 is the first after the base model')
        with self.transaction():
            if self.one('SELECT 1 FROM versions WHERE profile = ? AND version = ?',
                        record.profile, record.version) is not None:
                raise ValueError(
                    f'version {record.version} of profile {record.profile!r} is already in the '
                    'journal; take a new number from next_version()')
            self.insert(
                'INSERT', 'versions',
                profile=record.profile, version=record.version, parent=record.parent,
                continues=record.continues, everywhere=record.everywhere,
                state=int(record.state), reason=record.reason,
                correction_ids=as_json(record.correction_ids),
                score_before=record.score_before, score_after=record.score_after,
                train_tokens=record.train_tokens, train_seconds=record.train_seconds,
                path=record.path, sha256=record.sha256, created=record.created)
            self.execute(
                'INSERT INTO profiles (profile, last_version) VALUES (?, ?) '
                'ON CONFLICT (profile) DO UPDATE '
                'SET last_version = max(last_version, excluded.last_version)',
                record.profile, record.version)

    def set_version_state(self, profile: str, version: int, state: VersionState,
                          reason: str = '') -> None:
        """Set the state of a recorded version."""
        self.execute('UPDATE versions SET state = ?, reason = ? WHERE profile = ? AND version = ?',
                     int(state), reason, profile, version)

    def set_parent(self, profile: str, version: int, parent: int) -> None:
        """Note that another version was the newest one before this, of those that are live."""
        self.execute('UPDATE versions SET parent = ? WHERE profile = ? AND version = ?',
                     parent, profile, version)

    def make_live(self, profile: str, version: int) -> None:
        """Make a recorded version the newest live one; 0 is none."""
        self.execute(
            'INSERT INTO profiles (profile, live_version) VALUES (?, ?) '
            'ON CONFLICT (profile) DO UPDATE SET live_version = excluded.live_version',
            profile, version)

    def profiles(self) -> tuple[str, ...]:
        """Return all profiles that have had a correction or a version; '' is the robot."""
        return tuple(row['profile'] for row in self.rows(
            "SELECT profile FROM profiles UNION SELECT '' ORDER BY 1"))

    def newest(self, profile: str) -> VersionRecord | None:
        """Return the newest live version of a profile, None if it has none."""
        row = self.one(
            'SELECT versions.* FROM versions JOIN profiles USING (profile) '
            'WHERE version = live_version AND profile = ?', profile)
        return None if row is None else _version(row)

    def lineage(self, profile: str, version: int) -> Lineage:
        """Return a version of a profile with those before it."""
        return Lineage(self._links(profile), version)

    def live_lineage(self, profile: str) -> Lineage:
        """Return the newest live version of a profile with those before it."""
        newest = self.newest(profile)
        return self.lineage(profile, 0 if newest is None else newest.version)

    def live_versions(self) -> tuple[VersionRecord, ...]:
        """Return the live versions of all profiles, the oldest of each first."""
        return tuple(record for profile in self.profiles()
                     for record in self.versions_numbered(profile, [
                         live.version for live in self.live_lineage(profile).live]))

    def versions(self, profile: str | None = None) -> tuple[VersionRecord, ...]:
        """Return the recorded versions of a profile, or of all profiles, oldest first."""
        return tuple(map(_version, self.rows(
            'SELECT * FROM versions WHERE profile = coalesce(?, profile) '
            'ORDER BY profile, version', profile)))

    def versions_numbered(
            self, profile: str, numbers: Collection[int]) -> tuple[VersionRecord, ...]:
        """Return those of these versions that are on record, oldest first."""
        return tuple(map(_version, self.rows(
            'SELECT * FROM versions WHERE profile = ? '
            'AND version IN (SELECT value FROM json_each(?)) ORDER BY version',
            profile, as_json(list(numbers)))))

    def version(self, profile: str, number: int) -> VersionRecord | None:
        """Return a version, None if it is not on record."""
        return next(iter(self.versions_numbered(profile, [number])), None)

    def _links(self, profile: str) -> list[VersionLink]:
        states = {int(state): state for state in VersionState}
        return [VersionLink(profile, version, parent, continues, states[state], path, sha256,
                            bool(everywhere))
                for version, parent, continues, state, path, sha256, everywhere in self.rows(
                    'SELECT version, parent, continues, state, path, sha256, everywhere '
                    'FROM versions WHERE profile = ? ORDER BY version', profile)]

    def forgotten_files(self) -> list[VersionRecord]:
        """Return the versions whose files are to be deleted."""
        return list(map(_version, self.rows(
            "SELECT * FROM versions WHERE path <> '' AND sha256 = ''")))

    def versions_in_use(self) -> set[tuple[str, int]]:
        """
        Return (profile, version) of the live versions.

        One with a scope whose corrections are all deleted or superseded answers nothing any more.
        """
        return {(profile, version) for profile in self.profiles()
                for version in self.answering(profile, self.live_lineage(profile))}

    def answering(self, profile: str, lineage: Lineage) -> set[int]:
        """
        Return the versions of a lineage that answer a correction on record, or every question.

        The newest one is among them in any case.
        """
        return _answering(lineage, self._with_corrections(profile))

    def _with_corrections(self, profile: str) -> set[int]:
        """Return the versions that have learned a correction on record."""
        # Of the superseded ones too: they answer until the newer one is learned.
        return {row['version'] for row in self.rows(
            'SELECT DISTINCT adapter_version AS version FROM corrections '
            'WHERE profile = ? AND adapter_version > 0', profile)}

    def forget_version_files(self, record: VersionRecord | VersionLink) -> None:
        """Mark the files of a version for deletion; its record stays."""
        self.execute("UPDATE versions SET sha256 = '' WHERE profile = ? AND version = ?",
                     record.profile, record.version)

    def version_files_deleted(self, record: VersionRecord) -> None:
        """Note that the files of a forgotten version are no longer on disk."""
        self.execute("UPDATE versions SET path = '' WHERE profile = ? AND version = ?",
                     record.profile, record.version)

    def forget_old_versions(self, max_versions: int) -> None:
        """
        Mark surplus version files of each profile for deletion, and delete surplus records.

        The versions in use keep their files. So do the newest ``max_versions``, with all that a
        rollback to one of them would make live.
        """
        with self.transaction():
            for profile in self.profiles():
                # The live version counts as one.
                self._forget_old_versions(profile, max_versions - 1)

    def _forget_old_versions(self, profile: str, max_others: int) -> None:
        # With thousands of versions, each of these takes some milliseconds: read them once.
        records, learned = self._links(profile)[::-1], self._with_corrections(profile)
        newest = self.newest(profile)
        lineages = [Lineage(records, 0 if newest is None else newest.version)]
        in_use = _answering(lineages[0], learned)
        others = [r.version for r in records if r.sha256 and r.version not in in_use][:max_others]
        oldest = min(others, default=math.inf)
        for version in others:
            if not any(version in lineage.numbers for lineage in lineages):
                lineages.append(Lineage(records, version))
        kept = in_use.union(others)
        continued: set[int] = set()     # without their records, a correction's version is unknown
        for lineage in lineages:
            kept |= _answering(lineage, learned)
            # A rollback to one of the others makes what was continued since then live again.
            kept |= {r.continues for r in lineage.versions if r.version > oldest}
            if len(lineage.live) > 1:
                continued |= lineage.numbers
        for seen, record in enumerate(records, 1):
            if record.version in kept:
                continue
            if record.sha256:
                self.forget_version_files(record)
            elif seen > VERSION_RECORDS and record.version not in continued:
                self.execute('DELETE FROM versions WHERE profile = ? AND version = ?',
                             profile, record.version)


def _answering(lineage: Lineage, with_corrections: set[int]) -> set[int]:
    """Return the newest version of a lineage, and all that have what these have learned."""
    successors = lineage.successors
    learned = {successors.get(version, 0) for version in with_corrections} | {lineage.everywhere}
    return {record.version for i, record in enumerate(lineage.live)
            if i == 0 or record.version in learned}


def _version(row: sqlite3.Row) -> VersionRecord:
    values = record_fields(row)
    for name in ('score_before', 'score_after'):
        # SQLite stores NaN as NULL.
        values[name] = math.nan if values[name] is None else values[name]
    return VersionRecord(**values | {'state': VersionState(values['state']),
                                     'everywhere': bool(values['everywhere'])})
