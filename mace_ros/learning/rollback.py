# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Rollback in the journal: the live version, and the states of versions and corrections.

Which corrections are LEARNED follows from the live version: it holds those that its lineage
was trained on. A rollback can therefore be undone by another one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mace_ros.api.events import CorrectionState, VersionState
from mace_ros.store.journal import Journal
from mace_ros.store.lineage import Lineage
from mace_ros.store.records import as_json, CorrectionRecord, VersionRecord


class RollbackRefused(ValueError):
    """A rollback to that version is impossible; the message says why."""


@dataclass(frozen=True)
class RolledBack:
    """
    The changes of a rollback.

    ``live`` is the newest live version; None is the base model, or for a profile the robot's.
    ``changed`` is False if it was live before. ``taken_back`` are the versions that were rolled
    back, newest first, and ``corrections`` those whose state has changed, oldest first.
    """

    profile: str
    live: VersionRecord | None
    changed: bool
    taken_back: tuple[VersionRecord, ...] = ()
    corrections: tuple[CorrectionRecord, ...] = ()


def rollback_lineage(
        journal: Journal, profile: str, version: int, *, withdraw: bool = False) -> Lineage:
    """
    Return what would be live after a rollback; raise :class:`RollbackRefused`.

    It is ``version``, with those before it. With ``withdraw``, it is what is live now, without
    ``version`` and those that continue it.
    """
    if withdraw:
        lineage = journal.live_lineage(profile)
        if version not in lineage.numbers:
            raise RollbackRefused(f'version {version} is not live any more')
        lineage = lineage.without(version)
    else:
        lineage = _lineage_of(journal, profile, version)
    answering = journal.answering(profile, lineage)
    for live in lineage.live:
        if live.version in answering and not live.sha256:
            raise RollbackRefused(f'the files of version {live.version} are not kept any more '
                                  '(storage.max_versions)')
    return lineage


def _lineage_of(journal: Journal, profile: str, version: int) -> Lineage:
    """Return a version with those before it; raise :class:`RollbackRefused` if it never served."""
    lineage = journal.lineage(profile, version)
    if version == 0:
        return lineage
    owner = f'profile {profile!r}' if profile else 'the robot'
    record = journal.version(profile, version)
    if record is None:
        raise RollbackRefused(f'{owner} has no version {version} on record')
    if record.state is VersionState.REJECTED:
        raise RollbackRefused(f'version {version} never served: {record.reason}')
    return lineage


def roll_back(journal: Journal, profile: str, version: int, reason: str, *,
              withdraw: bool = False) -> RolledBack:
    """
    Make an earlier version the newest live one; 0 is the base model, or for a profile the robot's.

    What was live beside it is live again. With ``withdraw``, take only this version back, and
    those that continue it: the newer ones beside it stay.

    Corrections learned in the versions rolled back become FAILED: learning them again from the
    same version would lead to the same result. Corrections that those had superseded become
    LEARNED again. The caller must first check that the version's files can be read. Raises
    :class:`RollbackRefused`, having changed nothing.
    """
    with journal.transaction():
        new = rollback_lineage(journal, profile, version, withdraw=withdraw)
        old = journal.live_lineage(profile)
        taken_back = tuple(
            replace(record, state=VersionState.ROLLED_BACK, reason=reason)
            for record in reversed(journal.versions_numbered(
                profile, old.numbers - new.numbers)))
        journal.make_live(profile, new.newest)
        for record in taken_back:
            journal.set_version_state(profile, record.version, record.state, reason)
        parents = {link.version: link.parent for link in old.versions}
        for link in new.versions:
            if link.parent != parents.get(link.version, link.parent):
                journal.set_parent(profile, link.version, link.parent)
            if link.state is not VersionState.PUBLISHED:        # an earlier rollback is undone
                journal.set_version_state(profile, link.version, VersionState.PUBLISHED)
        target = journal.version(profile, new.newest)
        live = None if target is None else replace(
            target, state=VersionState.PUBLISHED,
            reason='' if target.state is VersionState.ROLLED_BACK else target.reason)
        return RolledBack(
            profile, live, bool(taken_back) or new.newest != old.newest, taken_back,
            _update_corrections(journal, profile, new, reason))


def _update_corrections(journal: Journal, profile: str, live: Lineage,
                        reason: str) -> tuple[CorrectionRecord, ...]:
    """Set the states that follow from the live lineage; return the changed corrections."""
    pending = journal.pending(profile)
    # Of the pending corrections, and of the live ones seen so far.
    prompts = {as_json(record.prompt_ids) for record in pending}
    replaced = {record.replaces for record in pending}
    changed = []
    for record in reversed(journal.trained_links(profile)):      # newest first
        if live.holds(record.adapter_version):
            newest = record.prompt not in prompts and record.id not in replaced
            prompts.add(record.prompt)
            replaced.add(record.replaces)
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
            changed.append(record.id)
    return journal.corrections_by_id(changed)
