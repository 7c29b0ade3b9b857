# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""How candidates become versions: to the disk, on record, and live in a slot."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
import math
import time
from typing import Any

from mace_ros.api.events import (
    AdapterVersion,
    CorrectionState,
    CorrectionStatus,
    Event,
    VersionState,
)
from mace_ros.learning.job import Job
from mace_ros.memory.adapter_slots import AdapterSlots
from mace_ros.model.lora import LoRAManager
from mace_ros.store.adapter_store import AdapterStore, CorruptVersion
from mace_ros.store.journal import Journal, VersionRecord
from mace_ros.store.journal_writer import JournalWriter
from mace_ros.store.version_info import (
    check_same_adapter,
    OtherAdapter,
    peft_config,
    version_event,
)


class Publisher:
    """Never blocks but in :meth:`restore`: disk work goes to the journal's thread."""

    def __init__(self, *, model_name: str, bank: LoRAManager, slots: AdapterSlots,
                 journal: JournalWriter, store: AdapterStore, wake: Callable[[], None]) -> None:
        """``wake`` is called from another thread when something is on disk."""
        self._model_name, self._bank, self._slots = model_name, bank, slots
        self._journal, self._store, self._wake = journal, store, wake
        self._rejections: deque[Future[VersionRecord]] = deque()

    def submit(self, function: Callable[[Journal], object]) -> Future[Any]:
        """Let the journal's thread do something, and wake the engine after it."""
        future = self._journal.submit(function)
        future.add_done_callback(lambda _: self._wake())
        return future

    def restore(self) -> list[Event]:
        """
        Load the live versions from disk; return an event for each (the base model's, if none).

        A version that can't be read is passed over for the base model, and its event
        says so. What was learned last is told again: maybe there was no time to tell it before
        the last stop. Blocks; for configuration only. Raises ``OtherAdapter``.
        """
        events: list[Event] = []
        lives = self._journal.submit(lambda j: [
            (record, [c.id for c in j.learned(record.profile)
                      if c.adapter_version == record.version])
            for record in j.live_versions()]).result()
        for record, learned in lives:
            slot = self._slots.reserve() if self._slots.has_room(record.profile) else None
            if slot is None:
                events.append(version_event(
                    record, self._store, VersionState.REJECTED,
                    'no adapter slot is left; raise adapter.slots'))
                continue
            try:
                check_same_adapter(record, self._store, self._bank)
                self._bank.load(self._store.load(record.path, record.sha256))
            except OtherAdapter:    # a wrong setting, of which none should lose its version
                raise
            except (CorruptVersion, ValueError) as error:
                self._slots.give_back(slot)
                events.append(version_event(
                    record, self._store, VersionState.REJECTED, str(error)))
                continue
            self._bank.write_slot(slot)
            self._slots.publish(record.profile, record.version, slot)
            events += self._published(record, learned)
        if not self._slots.live('').version:
            events.append(AdapterVersion('', 0, 0, VersionState.PUBLISHED))
        return events

    def versions(self, profile: str) -> Future[list[AdapterVersion]]:
        """Read all versions of a profile from the journal, oldest first."""
        return self._journal.submit(lambda journal: [
            version_event(record, self._store) for record in journal.versions(profile)])

    def save(self, job: Job) -> None:
        """
        Begin to write what a job has trained to disk, if there is a slot for it.

        Asked again otherwise: publication waits for a request to end, never the reverse.
        """
        job.slot = self._slots.reserve()
        if job.slot is None:
            return
        tensors, config = self._bank.export(), peft_config(self._bank, self._model_name)
        record = self._record(job)

        def save(journal: Journal) -> tuple[VersionRecord, tuple[str, ...]]:
            while True:
                version = journal.next_version(job.profile)
                try:
                    saved = self._store.save(job.profile, version, tensors, config)
                except FileExistsError:   # left by a crash before it was recorded
                    continue
                done = replace(record, version=version, path=saved.path, sha256=saved.sha256)
                return done, journal.publish(done)

        job.saving = self.submit(save)
        self._slots.expect(job.profile)

    def publish(self, job: Job) -> tuple[VersionRecord, list[Event]]:
        """
        Make live what is saved; return its record, and what there is to tell.

        Where the device fails nothing has changed, and it may be asked again.
        """
        assert job.saving is not None and job.slot is not None
        record, learned = job.saving.result()
        self._bank.write_slot(job.slot)
        self._slots.publish(job.profile, record.version, job.slot)
        return record, self._published(record, learned)

    def _published(self, record: VersionRecord, learned: Iterable[str]) -> list[Event]:
        return [version_event(record, self._store), *(
            CorrectionStatus(i, CorrectionState.LEARNED, adapter_version=record.version)
            for i in learned)]

    def save_later(self, job: Job, now: float) -> None:
        """Keep what was learned until the disk takes it, however long that is."""
        assert job.slot is not None
        self._slots.give_back(job.slot)
        self._slots.expect_no_more(job.profile)
        job.slot = job.saving = None
        job.publication.failed(now)

    def reject(self, job: Job, reason: str) -> None:
        """Put a candidate on record that is not published."""
        record = replace(self._record(job), state=VersionState.REJECTED, reason=reason)

        def write(journal: Journal) -> VersionRecord:
            numbered = replace(record, version=journal.next_version(job.profile))
            journal.record_version(numbered)
            return numbered

        self._rejections.append(self.submit(write))

    def rejected(self) -> list[Event]:
        """Return what there is to tell of a rejection that is on record by now."""
        while self._rejections and self._rejections[0].done():
            written = self._rejections.popleft()
            if written.exception() is None:     # else it is not on record; nothing else is lost
                return [version_event(written.result(), self._store)]
        return []

    @staticmethod
    def _record(job: Job) -> VersionRecord:
        return VersionRecord(
            profile=job.profile, version=0, parent=job.parent,
            correction_ids=tuple(w.record.id for w in job.corrections),
            score_before=job.score_before,
            score_after=math.nan if job.score_after is None else job.score_after,
            train_tokens=job.train_tokens, train_seconds=job.train_seconds, created=time.time())
