# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Rollback in the journal: the states of versions and corrections afterwards.

The live version determines which corrections are LEARNED: those of its own line of parents, and
no others. So a rollback can itself be undone by another one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mace_ros.api.events import CorrectionState, VersionState
from mace_ros.store.journal import (
    as_json,
    correction_from,
    CorrectionRecord,
    Journal,
    PENDING_SQL,
    VersionRecord,
)
from mace_ros.store.lineage import Lineage


class RollbackRefused(ValueError):
    """A rollback is impossible; the message says why."""


@dataclass(frozen=True)
class RolledBack:
    """
    What a rollback has changed.

    ``live`` serves now; None is the base model, or for a profile the robot's version.
    ``changed`` is False if it served before. ``taken_back`` are the versions that serve no more,
    newest first, and ``corrections`` those whose state has changed, oldest first.
    """

    profile: str
    live: VersionRecord | None
    changed: bool
    taken_back: tuple[VersionRecord, ...] = ()
    corrections: tuple[CorrectionRecord, ...] = ()


def version_to_return_to(journal: Journal, profile: str, version: int) -> VersionRecord | None:
    """Return the record of that version, None for 0; raises :class:`RollbackRefused`."""
    if version == 0:
        return None
    whose = f'profile {profile!r}' if profile else 'the robot'
    record = next((r for r in journal.versions(profile) if r.version == version), None)
    if record is None:
        raise RollbackRefused(f'{whose} has no version {version} on record')
    if record.state is VersionState.REJECTED:
        raise RollbackRefused(f'version {version} never served: {record.reason}')
    if not record.sha256:
        raise RollbackRefused(
            f'the files of version {version} are not kept any more (storage.max_versions)')
    return record


def roll_back(journal: Journal, profile: str, version: int, reason: str) -> RolledBack:
    """
    Make an earlier version live again; 0 is the base model, or for a profile the robot's.

    What was learned in the versions taken back is FAILED: to learn it again at once, from
    the same version, would lead to the same one. What it had superseded is LEARNED again.
    Whether the version's files can be read is for the caller to see first. Raises
    :class:`RollbackRefused`, and has changed nothing then.
    """
    with journal.transaction():
        target = version_to_return_to(journal, profile, version)
        records = journal.versions(profile)
        before = journal.live(profile)
        old = Lineage(records, before.version if before else 0)
        new = Lineage(records, version)
        taken_back = tuple(
            replace(record, state=VersionState.ROLLED_BACK, reason=reason)
            for record in old.versions if record.version not in new.numbers)
        journal.execute(
            'INSERT INTO profiles (profile, live_version) VALUES (?, ?) '
            'ON CONFLICT (profile) DO UPDATE SET live_version = excluded.live_version',
            profile, version)
        # What it holds of the robot's is what its first version began from.
        journal.execute(
            'UPDATE profiles SET fork = coalesce((SELECT fork FROM versions '
            'WHERE profile = ?1 AND version = ?2), fork) WHERE profile = ?1', profile, version)
        if not profile:
            # A person's lineage that has not begun yet must not begin with a bad version.
            journal.execute(
                'UPDATE profiles SET fork = ? WHERE live_version = 0 '
                'AND fork IN (SELECT value FROM json_each(?))',
                version, as_json([record.version for record in taken_back]))
        elif version == 0:
            # It has no version of its own any more: its next one begins where it is now.
            journal.execute('UPDATE profiles SET fork = NULL WHERE profile = ?', profile)
        for record in taken_back:
            _set_version(journal, record)
        for record in new.versions:
            if record.state is not VersionState.PUBLISHED:      # taken back by mistake
                _set_version(journal, replace(record, state=VersionState.PUBLISHED, reason=''))
        live = None if target is None else replace(
            target, state=VersionState.PUBLISHED,
            reason='' if target.state is VersionState.ROLLED_BACK else target.reason)
        return RolledBack(
            profile, live, version != (before.version if before else 0), taken_back,
            _retell(journal, profile, new, reason))


def _retell(journal: Journal, profile: str, live: Lineage,
            reason: str) -> tuple[CorrectionRecord, ...]:
    """Bring the states of all corrections in line with what is live; return the changed ones."""
    pending = {record.prompt_ids for record in journal.pending(profile)}
    records = map(correction_from, journal.rows(
        'SELECT * FROM corrections WHERE profile = ? AND adapter_version > 0 '
        f'AND state NOT IN {PENDING_SQL} ORDER BY number DESC', profile))
    told: set[tuple[int, ...]] = set()      # prompts of which a newer correction is live
    changed = []
    for record in records:      # newest first
        if live.holds(record.adapter_version):
            newest = record.prompt_ids not in told | pending
            told.add(record.prompt_ids)
            state = CorrectionState.LEARNED if newest else CorrectionState.SUPERSEDED
            why = '' if newest else record.reason
        elif record.state is CorrectionState.LEARNED:
            state = CorrectionState.FAILED
            why = f'version {record.adapter_version}, which had learned it, was rolled back'
            why += f': {reason}' if reason else ''
        else:
            continue
        if state is not record.state:
            journal.set_correction(record.id, state, why, record.adapter_version)
            changed.append(replace(record, state=state, reason=why))
    return tuple(reversed(changed))


def _set_version(journal: Journal, record: VersionRecord) -> None:
    journal.execute(
        'UPDATE versions SET state = ?, reason = ? WHERE profile = ? AND version = ?',
        int(record.state), record.reason, record.profile, record.version)
