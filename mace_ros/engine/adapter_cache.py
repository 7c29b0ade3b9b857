# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Keeps the adapter versions that running queries use in the device's slots."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
import threading

from mace_ros.api.events import AdapterVersion, VersionState
from mace_ros.engine.inbox import AdapterRead, Inbox
from mace_ros.learning.live_versions import LiveVersions, Weights
from mace_ros.memory.adapter_slots import AdapterSlots, ServedVersion
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.store.adapter_store import AdapterStore, CorruptVersion
from mace_ros.store.records import VersionRecord
from mace_ros.store.version_info import version_event

DAMAGED = (CorruptVersion, ValueError)      # what reading damaged files raises


class AdapterCache:
    """
    Loads a version into a slot when a query needs it.

    A thread of its own reads the file and verifies its checksum, so that other queries do not wait
    for the disk. The weights are kept in slots only.
    """

    def __init__(self, slots: AdapterSlots, lora: LoRAManager, live: LiveVersions,
                 store: AdapterStore, inbox: Inbox) -> None:
        """
        Load versions of ``live`` from ``store`` into ``slots``, whose weights ``lora`` writes.

        ``inbox`` receives :class:`AdapterRead` when a file was read.
        """
        self._slots, self._lora, self._live = slots, lora, live
        self._store, self._inbox = store, inbox
        self._reader = ThreadPoolExecutor(1, 'adapters')
        self._reading: dict[ServedVersion, Future[Weights]] = {}
        self._read_one = threading.Event()      # a file since the last one was asked for

    def pin(self, version: ServedVersion) -> int | None:
        """
        Pin a live version and return its slot.

        Returns None if running queries have pinned all slots, or while the version is read. Raises
        what the device raises.
        """
        slot = self._slots.slot_of(version)
        if slot is None:
            slot = self._load(version)
        if slot is not None:
            self._slots.pin(version)
        return slot

    def unpin(self, version: ServedVersion) -> None:
        """Undo one :meth:`pin`."""
        self._slots.unpin(version)

    def damaged(self, version: ServedVersion) -> list[AdapterVersion]:
        """
        Return the event of a version that was read, if it is damaged.

        From then on the base model answers in its place.
        """
        error = self._reading[version].exception()
        if not isinstance(error, DAMAGED):     # :meth:`pin` raises any other error
            return []
        self.forget(version)
        record = self._live.drop(version)
        # The files of a version that is not live any more may be deleted.
        return [] if record is None else [
            version_event(record, self._store, VersionState.REJECTED, str(error))]

    def wait(self, seconds: float) -> None:
        """Wait until a version was read, if one is being read."""
        if self._reading:
            self._read_one.wait(seconds)

    def forget(self, version: ServedVersion) -> None:
        """Free the weights that were read; they are in a slot, or no query needs them."""
        self._reading.pop(version, None)

    def close(self) -> None:
        """Read nothing more."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _load(self, version: ServedVersion) -> int | None:
        """Write a version into a slot, or begin to read it if a slot is free."""
        if not self._slots.has_room:
            return None
        reading = self._reading.get(version)
        if reading is None:
            self._read(version, self._live.records(version.profile)[version.version])
        if reading is None or not reading.done():
            return None
        if isinstance(reading.exception(), DAMAGED):
            return None         # until the event of the read is handled, by :meth:`damaged`
        slot = self._slots.assign(version)
        assert slot is not None
        try:
            self._lora.write_slot(slot, reading.result())
        except BaseException:
            self._slots.discard(version)
            raise
        return slot

    def _read(self, version: ServedVersion, record: VersionRecord) -> None:
        def read() -> Weights:
            weights = self._store.load(record.path, record.sha256)
            self._lora.checked(weights)
            return weights

        def done(reading: Future[Weights]) -> None:
            if not reading.cancelled():
                self._inbox.put(AdapterRead(version))
                self._read_one.set()

        self._read_one.clear()
        self._reading[version] = self._reader.submit(read)
        self._reading[version].add_done_callback(done)
