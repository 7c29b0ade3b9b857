# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Rollbacks in progress.

The version to serve is read from disk in the journal's thread, and put live in the device's thread
between two iterations. Everything here runs in the device's thread unless it
says otherwise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from mace_ros.api.events import (
    AdapterVersion,
    CorrectionState,
    CorrectionStatus,
    Event,
    VersionState,
)
from mace_ros.learning.disk import Disk
from mace_ros.learning.live_versions import LiveSet, LiveVersions
from mace_ros.learning.rollback import (
    roll_back,
    rollback_lineage,
    RollbackRefused,
    RolledBack,
)
from mace_ros.learning.task import on_disk, Pause, Task
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.store.adapter_store import AdapterStore, CorruptVersion
from mace_ros.store.journal import Journal
from mace_ros.store.records import CorrectionRecord, VersionRecord
from mace_ros.store.version_info import check_same_adapter, version_event


@dataclass(frozen=True)
class _Request:
    profile: str
    version: int
    reason: str
    done: Future[RolledBack]
    withdraw: bool


@dataclass(frozen=True)
class _Decided:
    """
    A rollback that is in the journal.

    ``learned`` are the corrections of the live versions; None if corrections were taken back only.
    """

    outcome: RolledBack
    live: LiveSet
    learned: tuple[CorrectionRecord, ...] | None


class RollbackQueue:
    """Rolls back one request after the other; running requests keep their version."""

    def __init__(self, *, lora: LoRAManager, live: LiveVersions, disk: Disk,
                 store: AdapterStore, cancel_job: Callable[[str], bool],
                 wake: Callable[[], None]) -> None:
        """
        ``cancel_job`` cancels the job that trains a profile's version, or from it.

        It returns False while such a job saves a version: the rollback waits for that.
        ``wake`` requests another poll.
        """
        self._lora, self._live = lora, live
        self._disk, self._store = disk, store
        self._cancel_job, self._wake = cancel_job, wake
        self._requests: deque[_Request] = deque()
        self._running: Task[RolledBack] | None = None      # the first request's

    def add(self, profile: str, version: int, reason: str, done: Future[RolledBack], *,
            withdraw: bool = False) -> None:
        """
        Queue a rollback; version 0 is the base model, or for a profile the robot's version.

        See :func:`roll_back` for ``withdraw``.
        ``done`` ends once queries are served that version, or with the reason why not:
        :class:`RollbackRefused`, ``CorruptVersion`` or ``JournalError``.
        """
        self._requests.append(_Request(profile, version, reason, done, withdraw))

    @property
    def profile(self) -> str | None:
        """The profile that is being rolled back: no job may begin for it."""
        return self._requests[0].profile if self._requests else None

    def poll(self) -> list[Event]:
        """Proceed as far as possible without waiting; return the events."""
        events: list[Event] = []
        while self._requests:
            request = self._requests[0]
            if self._running is None:
                self._running = self._roll_back(request)
            try:
                waits_for = next(self._running)
            except StopIteration as end:
                self._next()
                request.done.set_result(end.value)
                events += self._events(end.value)
            except Exception as error:
                self._next()
                request.done.set_exception(error)
            else:
                if waits_for is Pause.NEXT_POLL:
                    self._wake()
                break
        return events

    def close(self, reason: str) -> None:
        """Refuse the waiting requests; a rollback that the journal has recorded stays recorded."""
        if self._running is not None:
            self._running.close()
        while self._requests:
            done = self._requests[0].done
            self._next()
            done.set_exception(RollbackRefused(reason))

    def _next(self) -> None:
        self._requests.popleft()
        self._running = None

    def _roll_back(self, request: _Request) -> Task[RolledBack]:
        while not self._cancel_job(request.profile):
            yield Pause.JOB
        # They stay as they are until then: no job of this profile runs.
        live = dict(self._live.records(request.profile))
        decided = yield from on_disk(
            self._disk.submit(lambda journal: self._decide(journal, request, live)))
        outcome = decided.outcome
        if decided.learned is None:
            self._live.roll_back(request.profile, decided.live, outcome.corrections)
        else:
            self._live.replace(request.profile, decided.live, decided.learned)
        return outcome

    def _decide(self, journal: Journal, request: _Request,
                live: Mapping[int, VersionRecord]) -> _Decided:
        """Read the version and record the rollback, in the journal's thread."""
        profile, withdraw = request.profile, request.withdraw
        lineage = rollback_lineage(journal, profile, request.version, withdraw=withdraw)
        newest, numbers = lineage.newest, {link.version for link in lineage.on_disk}
        # Of thousands of versions, only those that are not live already are looked at.
        returning = journal.versions_numbered(profile, {newest, *numbers} - live.keys())
        lost = [record.version for record in returning if not self._is_there(record, newest)]
        # A version that cannot be read must not become the newest one. Those beside it are read
        # when a query needs them, as after a restart.
        for record in journal.versions_numbered(profile, [newest]):
            self._lora.checked(self._store.load(record.path, record.sha256))
        outcome = roll_back(
            journal, profile, request.version, request.reason, withdraw=withdraw)
        known = {**live, **{record.version: record for record in returning}}
        only_taken_back = not journal.replaced_later(profile) and all(
            c.state is CorrectionState.FAILED for c in outcome.corrections)
        rolled_back = LiveSet(newest, {number: known[number] for number in sorted(numbers)},
                              lineage.successors, everywhere=lineage.everywhere)
        for version in lost:
            rolled_back.drop(version)
        return _Decided(
            outcome, rolled_back, None if only_taken_back else journal.scope(profile))

    def _is_there(self, record: VersionRecord, newest: int) -> bool:
        """Return whether a version's files are there; raise for those of the newest one."""
        try:
            check_same_adapter(record, self._store, self._lora)
        except CorruptVersion:
            if record.version == newest:
                raise
            return False
        return True

    def _events(self, outcome: RolledBack) -> list[Event]:
        if not outcome.changed:
            return []
        live = AdapterVersion(outcome.profile, 0, 0, VersionState.PUBLISHED)
        return [
            *(version_event(record, self._store) for record in outcome.taken_back),
            live if outcome.live is None else version_event(outcome.live, self._store),
            *(CorrectionStatus(c.id, c.state, c.reason, c.adapter_version)
              for c in outcome.corrections)]
