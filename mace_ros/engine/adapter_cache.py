# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Keeps the adapter versions that running queries use in the device's slots."""

from __future__ import annotations

from mace_ros.learning.live_versions import LiveVersions
from mace_ros.memory.adapter_slots import AdapterSlots, ServedVersion
from mace_ros.model.lora_manager import LoRAManager


class AdapterCache:
    """Loads a version into a slot when a query needs it, which takes milliseconds."""

    def __init__(self, slots: AdapterSlots, lora: LoRAManager, live: LiveVersions) -> None:
        """Load the versions of ``live`` into ``slots``, whose weights ``lora`` writes."""
        self._slots, self._lora, self._live = slots, lora, live

    def pin(self, version: ServedVersion) -> int | None:
        """Pin a version and return its slot; None if running queries have pinned all slots."""
        slot = self._slots.slot_of(version)
        if slot is None:
            slot = self._slots.assign(version)
            if slot is None:
                return None
            try:
                self._lora.write_slot(slot, self._live.weights(version))
            except BaseException:
                self._slots.discard(version)
                raise
        self._slots.pin(version)
        return slot

    def unpin(self, version: ServedVersion) -> None:
        """Undo one :meth:`pin`."""
        self._slots.unpin(version)
