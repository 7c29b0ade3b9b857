# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""How a candidate becomes a version: on disk, in the journal, and live in a slot."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from mace_ros.api.events import (
    AdapterVersion,
    CorrectionState,
    CorrectionStatus,
    Event,
    VersionState,
)
from mace_ros.learning.backoff import Backoff
from mace_ros.learning.disk import Disk
from mace_ros.learning.job import Job, JobState
from mace_ros.learning.scope import Scopes
from mace_ros.learning.task import Pause, RetryNotice, Task, Until
from mace_ros.memory.adapter_slots import AdapterSlots
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.store.adapter_store import AdapterStore, CorruptVersion
from mace_ros.store.journal import Journal
from mace_ros.store.records import CorrectionRecord, VersionRecord
from mace_ros.store.version_info import (
    check_same_adapter,
    OtherAdapter,
    peft_config,
    version_event,
)


@dataclass(frozen=True)
class SavedVersion:
    """A version on disk and in the journal, and the corrections that it learned."""

    record: VersionRecord
    learned: tuple[CorrectionRecord, ...]


class Publisher:
    """
    Saves versions, and puts them live together with their scopes; only :meth:`restore` blocks.

    A version's slot and its scope change between the same two queries.
    """

    def __init__(self, *, model_name: str, lora: LoRAManager, slots: AdapterSlots,
                 scopes: Scopes, disk: Disk, store: AdapterStore,
                 clock: Callable[[], float]) -> None:
        """``model_name`` is written into the configuration of each version."""
        self._model_name, self._lora = model_name, lora
        self._slots, self._scopes = slots, scopes
        self._disk, self._store, self._clock = disk, store, clock
        self._rejections: deque[Future[VersionRecord]] = deque()

    def restore(self) -> list[Event]:
        """
        Load the live versions from disk; return an event for each, or for the base model.

        A version that cannot be read is reported as REJECTED and the base model serves in its
        place. The corrections of live versions are reported again, because the last stop may have
        come before the report. Blocks; for configuration only. Raises ``OtherAdapter``.
        """
        events: list[Event] = []
        lives, scopes = self._disk.submit(lambda j: (j.live_versions(), j.scopes())).result()
        for record in lives:
            scope = scopes.pop(record.profile, ())
            slot = self._slots.reserve() if self._slots.has_room(record.profile) else None
            if slot is None:
                events.append(version_event(
                    record, self._store, VersionState.REJECTED,
                    'no adapter slot is left; raise adapter.slots'))
                continue
            try:
                check_same_adapter(record, self._store, self._lora)
                self._lora.load(self._store.load(record.path, record.sha256))
            except OtherAdapter:    # a wrong setting must not cost a profile its version
                raise
            except (CorruptVersion, ValueError) as error:
                self._slots.give_back(slot)
                events.append(version_event(
                    record, self._store, VersionState.REJECTED, str(error)))
                continue
            self._scopes.replace(record.profile, scope)
            events += self._put_live(record, [c for c in scope if (
                c.adapter_version, c.state) == (record.version, CorrectionState.LEARNED)], slot)
        for profile, scope in scopes.items():       # which have no version of their own
            self._scopes.replace(profile, scope)
        if not self._slots.live('').version:
            events.append(AdapterVersion('', 0, 0, VersionState.PUBLISHED))
        return events

    def versions(self, profile: str) -> Future[list[AdapterVersion]]:
        """Read all versions of a profile from the journal, oldest first."""
        return self._disk.submit(lambda journal: [
            version_event(record, self._store) for record in journal.versions(profile)])

    # -- a candidate that passed the gate --------------------------------------------

    def publish(self, job: Job, record: Callable[[], VersionRecord],
                ) -> Task[VersionRecord | None]:
        """
        Save and publish, retrying while the disk or device fails.

        ``record`` describes the version, without its number. Returns its record; None if no
        slot is left for the profile. From ``JobState.SAVING`` on, a version may be in the
        journal that is not live yet, so the job must not be cancelled.
        """
        retry = Backoff()
        while True:
            job.state = JobState.PUBLISHING
            slot = yield from self._reserve_slot(job.profile, retry)
            if slot is None:
                return None
            try:
                saving = self._save(record())
                job.state = JobState.SAVING
                self._slots.expect(job.profile)
                while not saving.done():
                    yield saving
                error = saving.exception()
                if error is None:
                    saved = saving.result()
                    events = yield from self._retry_put_live(saved, slot, retry)
            except BaseException:
                self._give_back(job.profile, slot)
                raise
            if error is None:
                yield from events
                return saved.record
            self._give_back(job.profile, slot)
            retry.failed(self._clock())
            yield RetryNotice(f'the new version could not be saved: {error}')

    def _reserve_slot(self, profile: str, retry: Backoff) -> Task[int | None]:
        """Wait for a slot; return None if a rollback has taken the profile's last one."""
        while self._slots.has_room(profile):
            if self._clock() < retry.until:
                yield Until(retry.until)
                continue
            # Publication waits for a request to end, never the reverse.
            slot = self._slots.reserve()
            if slot is not None:
                return slot
            yield Pause.SLOT
        return None

    def _give_back(self, profile: str, slot: int) -> None:
        self._slots.give_back(slot)
        self._slots.expect_no_more(profile)

    def _save(self, record: VersionRecord) -> Future[SavedVersion]:
        """Write the weights in training to disk, then the version to the journal."""
        tensors, config = self._lora.export(), peft_config(self._lora, self._model_name)

        def save(journal: Journal) -> SavedVersion:
            while True:
                version = journal.next_version(record.profile)
                try:
                    files = self._store.save(record.profile, version, tensors, config)
                except FileExistsError:   # left by a crash before it was recorded
                    continue
                done = replace(record, version=version, path=files.path, sha256=files.sha256)
                learned = [journal.correction(i) for i in journal.publish(done)]
                return SavedVersion(done, tuple(c for c in learned if c is not None))

        return self._disk.submit(save)

    def _retry_put_live(self, saved: SavedVersion, slot: int, retry: Backoff,
                        ) -> Task[list[AdapterVersion | CorrectionStatus]]:
        """Put a saved version live, which the device may refuse for a while."""
        while True:
            try:
                return self._put_live(saved.record, saved.learned, slot)
            except Exception as broken:
                error = f'the new version could not be put into its slot: {broken}'
            retry.failed(self._clock())
            yield RetryNotice(error)
            while self._clock() < retry.until:
                yield Until(retry.until)

    def _put_live(self, record: VersionRecord, learned: Sequence[CorrectionRecord], slot: int,
                  ) -> list[AdapterVersion | CorrectionStatus]:
        """Put the weights in training into a slot and serve them; return the events."""
        self._lora.write_slot(slot)
        self._slots.publish(record.profile, record.version, slot)
        self._scopes.learned(record.profile, learned)
        return [version_event(record, self._store), *(
            CorrectionStatus(c.id, CorrectionState.LEARNED, adapter_version=record.version)
            for c in learned)]

    # -- corrections without a version of their own ----------------------------------

    def already_learned(self, record: CorrectionRecord, version: int) -> CorrectionStatus:
        """Let the live version answer the question of a correction, since it does so right."""
        self._scopes.learned(record.profile, [record])
        return self._disk.set_state(
            record, CorrectionState.LEARNED, 'the live version already answers so', version)

    def failed(self, record: CorrectionRecord, reason: str) -> CorrectionStatus:
        """Give up a correction."""
        self._scopes.failed(record)
        return self._disk.set_state(record, CorrectionState.FAILED, reason)

    # -- and one that did not --------------------------------------------------------

    def reject(self, record: VersionRecord, reason: str) -> None:
        """Record a candidate that is not published, under the next version number."""
        rejected = replace(record, state=VersionState.REJECTED, reason=reason)

        def write(journal: Journal) -> VersionRecord:
            numbered = replace(rejected, version=journal.next_version(record.profile))
            journal.record_version(numbered)
            return numbered

        self._rejections.append(self._disk.submit(write))

    def rejected(self) -> list[AdapterVersion]:
        """Return the events of rejections that are in the journal by now."""
        events = []
        while self._rejections and self._rejections[0].done():
            written = self._rejections.popleft()
            if written.exception() is None:     # else it is in no record: nothing to report
                events.append(version_event(written.result(), self._store))
        return events
