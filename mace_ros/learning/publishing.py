# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""How a candidate becomes a version: on disk, in the journal, and live."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import NamedTuple

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
from mace_ros.learning.live_versions import LiveSet, LiveVersions
from mace_ros.learning.task import RetryNotice, Task, Until
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.store.adapter_store import AdapterStore, CorruptVersion
from mace_ros.store.journal import Journal
from mace_ros.store.journal_file import low_space
from mace_ros.store.lineage import Lineage
from mace_ros.store.records import CorrectionRecord, VersionRecord
from mace_ros.store.version_info import check_same_adapter, peft_config, version_event


@dataclass(frozen=True)
class SavedVersion:
    """A version on disk and in the journal, and the corrections that it learned."""

    record: VersionRecord
    learned: tuple[CorrectionRecord, ...]


class _Restored(NamedTuple):
    """What the journal says about a profile; ``versions`` are the live ones, oldest first."""

    versions: tuple[VersionRecord, ...]
    lineage: Lineage
    scope: tuple[CorrectionRecord, ...]
    deleted_questions: set[str]

    @classmethod
    def read(cls, journal: Journal, profile: str) -> _Restored:
        lineage = journal.live_lineage(profile)
        return cls(
            journal.versions_numbered(profile, [link.version for link in lineage.on_disk]),
            lineage, journal.scope(profile), journal.deleted_questions(profile))


class Publisher:
    """
    Saves versions, and puts them live together with their scopes; only :meth:`restore` blocks.

    A version and its scope change between the same two queries.
    """

    def __init__(self, *, model_name: str, lora: LoRAManager, live: LiveVersions, disk: Disk,
                 store: AdapterStore, min_free_mb: float, clock: Callable[[], float]) -> None:
        """
        ``model_name`` is written into the configuration of each version.

        Nothing is saved while the disk has less than ``min_free_mb`` of free space.
        """
        self._model_name, self._lora, self._live = model_name, lora, live
        self.min_free_mb = min_free_mb
        self._disk, self._store, self._clock = disk, store, clock
        self._rejections: deque[Future[VersionRecord]] = deque()

    def restore(self) -> list[Event]:
        """
        Put the recorded live versions into force; return an event for each profile's newest one.

        If the robot has none, an event announces the base model. A version that cannot be read is
        reported as REJECTED, and the base model serves in its place. The weights of a version are
        read, and their checksum verified, when a query needs it: those of a thousand versions
        would take seconds. The corrections of the newest versions are reported again, because the
        last stop may have come before the report. Blocks; for configuration only. Raises
        ``OtherAdapter``.
        """
        events: list[Event] = []
        restored = self._disk.submit(lambda journal: {
            profile: _Restored.read(journal, profile) for profile in journal.profiles()}).result()
        for profile, (versions, lineage, scope, deleted) in restored.items():
            live, newest = LiveSet(
                successors=lineage.successors, everywhere=lineage.everywhere), None
            for record in versions:     # the newest one comes last
                try:
                    # A wrong setting must not cost a profile its version: OtherAdapter is raised.
                    check_same_adapter(record, self._store, self._lora)
                except CorruptVersion as error:
                    live.drop(record.version)
                    events.append(version_event(
                        record, self._store, VersionState.REJECTED, str(error)))
                    continue
                live.newest, live.records[record.version] = record.version, record
                newest = record
            if newest is not None:
                events += self._published(newest, [c for c in scope if (
                    c.adapter_version, c.state) == (newest.version, CorrectionState.LEARNED)])
            self._live.replace(profile, live, scope)
            self._live.exclude(profile, deleted)
        if not self._live.newest(''):
            events.append(AdapterVersion('', 0, 0, VersionState.PUBLISHED))
        return events

    def versions(self, profile: str) -> Future[list[AdapterVersion]]:
        """Read all versions of a profile from the journal, oldest first."""
        return self._disk.submit(lambda journal: [
            version_event(record, self._store) for record in journal.versions(profile)])

    # -- a candidate that passed the gate --------------------------------------------

    def publish(self, job: Job, record: Callable[[], VersionRecord]) -> Task[VersionRecord]:
        """
        Save and publish, retrying while the disk fails; return the version's record.

        ``record`` describes the version, without its number. In ``JobState.SAVING``, a version may
        be in the journal that is not live yet, so the job must not be cancelled.
        """
        retry = Backoff()
        while True:
            job.state = JobState.PUBLISHING
            while self._clock() < retry.until:
                yield Until(retry.until)
            saving = self._save(record())
            job.state = JobState.SAVING
            while not saving.done():
                yield saving
            error = saving.exception()
            if error is None:
                saved = saving.result()
                self._live.publish(saved.record, saved.learned)
                yield from self._published(saved.record, saved.learned)
                return saved.record
            retry.failed(self._clock())
            yield RetryNotice(f'the new version could not be saved: {error}')

    def _save(self, record: VersionRecord) -> Future[SavedVersion]:
        """Write the weights in training to disk, then the version to the journal."""
        weights = self._lora.export()
        config, min_free_mb = peft_config(self._lora, self._model_name), self.min_free_mb

        def save(journal: Journal) -> SavedVersion:
            if problem := low_space(journal.path.parent, min_free_mb):
                raise OSError(problem)
            while True:
                version = journal.next_version(record.profile)
                try:
                    files = self._store.save(record.profile, version, weights, config)
                except FileExistsError:   # left by a crash before it was recorded
                    continue
                # Read back first: what is in the journal must be readable.
                self._store.load(files.path, files.sha256)
                done = replace(record, version=version, path=files.path, sha256=files.sha256)
                learned = [journal.correction(i) for i in journal.publish(done)]
                return SavedVersion(done, tuple(c for c in learned if c is not None))

        return self._disk.submit(save)

    def _published(self, record: VersionRecord, learned: Sequence[CorrectionRecord],
                   ) -> list[AdapterVersion | CorrectionStatus]:
        return [version_event(record, self._store), *(
            CorrectionStatus(c.id, CorrectionState.LEARNED, adapter_version=record.version)
            for c in learned)]

    # -- corrections without a version of their own ----------------------------------

    def already_learned(self, record: CorrectionRecord, version: int) -> CorrectionStatus:
        """Let a version answer a correction's question, because it already answers it right."""
        self._live.learned(record.profile, [replace(record, adapter_version=version)])
        return self._disk.set_state(
            record, CorrectionState.LEARNED, 'the live version already answers so', version)

    def failed(self, record: CorrectionRecord, reason: str) -> CorrectionStatus:
        """Give up a correction."""
        self._live.failed(record)
        return self._disk.set_state(record, CorrectionState.FAILED, reason)

    # -- a candidate that the gate rejected ------------------------------------------

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
        events: list[AdapterVersion] = []
        while self._rejections and self._rejections[0].done():
            written = self._rejections.popleft()
            if written.exception() is None:     # else it is in no record: nothing to report
                events.append(version_event(written.result(), self._store))
        return events
