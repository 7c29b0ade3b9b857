# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Rollbacks on their way.

What is to serve is read from disk in the journal's thread, and put into its slot in the
device's, between two iterations, to which everything here belongs that does not say else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from mace_ros.api.events import AdapterVersion, CorrectionStatus, Event, VersionState
from mace_ros.learning.rollback import (
    roll_back,
    rollback_target,
    RollbackRefused,
    RolledBack,
)
from mace_ros.memory.adapter_slots import AdapterSlots, NO_SLOT
from mace_ros.model.lora import LoRAManager
from mace_ros.store.adapter_store import AdapterStore
from mace_ros.store.journal import Journal
from mace_ros.store.journal_writer import JournalWriter
from mace_ros.store.version_info import check_same_adapter, version_event

MAX_FAILURES = 3        # of the device, one after the other

_Decided: TypeAlias = tuple[RolledBack, Mapping[str, Tensor] | None]


@dataclass
class _Wanted:
    profile: str
    version: int
    reason: str
    done: Future[RolledBack]
    decided: Future[_Decided] | None = None     # by the journal, with what to serve
    failures: int = 0


class RollbackQueue:
    """Takes one version back after the other; what runs ends on the version it began with."""

    def __init__(self, *, bank: LoRAManager, slots: AdapterSlots, journal: JournalWriter,
                 store: AdapterStore, wake: Callable[[], None]) -> None:
        """``wake`` is called, in any thread, when :meth:`advance` can go on."""
        self._bank, self._slots, self._journal, self._store = bank, slots, journal, store
        self._wake = wake
        self._wanted: deque[_Wanted] = deque()

    def add(self, profile: str, version: int, reason: str, done: Future[RolledBack]) -> None:
        """
        Queue a rollback; version 0 is the base model, or for a profile the robot's.

        ``done`` ends once queries are served that version: with :class:`RollbackRefused`,
        ``CorruptVersion`` or ``JournalError`` if they are not.
        """
        self._wanted.append(_Wanted(profile, version, reason, done))

    @property
    def profile(self) -> str | None:
        """The profile whose version is being taken back now: nothing may be published to it."""
        return self._wanted[0].profile if self._wanted else None

    def advance(self, *, may_begin: Callable[[str], bool]) -> list[Event]:
        """
        Go on as far as possible without waiting; return what happened.

        ``may_begin`` stops the learning of a profile, and returns whether it has stopped.
        """
        if not self._wanted:
            return []
        wanted = self._wanted[0]
        if wanted.decided is None:
            if not may_begin(wanted.profile):
                return []
            return self._begin(wanted)
        if not wanted.decided.done():
            return []
        error = wanted.decided.exception()
        if error is not None:
            return self._refuse(error)
        outcome, tensors = wanted.decided.result()
        try:
            if not self._serve(outcome, tensors):
                return []   # asked again: a slot becomes free when a request ends
        except Exception as broken:      # of the device
            wanted.failures += 1
            if wanted.failures < MAX_FAILURES:
                self._wake()
                return []
            # It is decided, and on disk: only this process goes on with the other one.
            return self._refuse(RollbackRefused(
                f'version {wanted.version} serves from the next start on; it could not be put '
                f'into its slot now: {type(broken).__name__}: {broken}'))
        self._wanted.popleft()
        wanted.done.set_result(outcome)
        return self._told(outcome)

    def close(self, reason: str) -> None:
        """AnswerRecord those who wait; what the journal has decided stays decided."""
        while self._wanted:
            self._refuse(RollbackRefused(reason))

    def _begin(self, wanted: _Wanted) -> list[Event]:
        profile, version = wanted.profile, wanted.version
        if version and not self._slots.has_room(profile):
            return self._refuse(RollbackRefused(NO_SLOT))

        def decide(journal: Journal) -> _Decided:
            record = rollback_target(journal, profile, version)
            # Read first: a version that can't be read must not become the live one.
            tensors = None
            if record is not None:
                tensors = self._store.load(record.path, record.sha256)
                check_same_adapter(record, self._store, self._bank)
                self._bank.checked(tensors)
            return roll_back(journal, profile, version, wanted.reason), tensors

        try:
            wanted.decided = self._journal.submit(decide)
        except Exception as error:      # the journal is closed
            return self._refuse(error)
        if version:
            self._slots.expect(profile)
        wanted.decided.add_done_callback(lambda _: self._wake())
        return []

    def _serve(self, outcome: RolledBack, tensors: Mapping[str, Tensor] | None) -> bool:
        """Let the next query be served so; return False if there is no slot yet."""
        profile, live = outcome.profile, outcome.live
        if live is None:
            self._slots.withdraw(profile)
            return True
        assert tensors is not None
        # A request that began with it may still hold it.
        slot = self._slots.held(profile, live.version)
        if slot is None:
            slot = self._slots.reserve()
            if slot is None:
                return False
            try:
                self._bank.write_slot(slot, tensors)
            except BaseException:
                self._slots.give_back(slot)
                raise
        self._slots.publish(profile, live.version, slot)
        return True

    def _refuse(self, error: BaseException) -> list[Event]:
        wanted = self._wanted.popleft()
        self._slots.expect_no_more(wanted.profile)
        wanted.done.set_exception(error)
        return []

    def _told(self, outcome: RolledBack) -> list[Event]:
        if not outcome.changed:
            return []
        live = AdapterVersion(outcome.profile, 0, 0, VersionState.PUBLISHED)
        return [
            *(version_event(taken, self._store) for taken in outcome.taken_back),
            live if outcome.live is None else version_event(outcome.live, self._store),
            *(CorrectionStatus(c.id, c.state, c.reason, c.adapter_version)
              for c in outcome.corrections)]
