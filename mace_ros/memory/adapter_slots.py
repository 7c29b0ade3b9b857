# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Which adapter versions are in the slots of the device (no tensors here)."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass

BASE_IDENTITY = ''


@dataclass(frozen=True, order=True)
class ServedVersion:
    """A version of a profile's adapter; version 0 is the base model."""

    profile: str
    version: int

    @property
    def identity(self) -> str:
        """The permanent identity of the weights; a slot number is not, as it is reused."""
        return f'{self.profile}\n{self.version}' if self.version else BASE_IDENTITY


BASE = ServedVersion('', 0)


class AdapterSlots:
    """
    Assigns the slots ``first .. first + count - 1`` to adapter versions.

    A request pins its version. A version that is not pinned stays in its slot until another one
    needs it; the least recently used one gives way. The base model is always in ``base_slot``.
    """

    def __init__(self, *, base_slot: int, first: int, count: int) -> None:
        """Begin with empty slots."""
        self._base_slot = base_slot
        self._free = list(range(first + count - 1, first - 1, -1))
        self._slots: OrderedDict[ServedVersion, int] = OrderedDict()    # in the order of use
        self._pins: Counter[ServedVersion] = Counter()

    @property
    def versions(self) -> tuple[ServedVersion, ...]:
        """The versions in slots, the least recently used one first."""
        return tuple(self._slots)

    @property
    def has_room(self) -> bool:
        """Whether :meth:`assign` has a slot to give."""
        return bool(self._free) or any(not self._pins[version] for version in self._slots)

    def slot_of(self, version: ServedVersion) -> int | None:
        """Return the slot of a version; None if it is in none."""
        return self._base_slot if version == BASE else self._slots.get(version)

    def assign(self, version: ServedVersion) -> int | None:
        """
        Give a slot to a version that is in none; return None if all are pinned.

        The caller must write the weights before the version is pinned.
        """
        if not self._free:
            unused = next((v for v in self._slots if not self._pins[v]), None)
            if unused is None:
                return None
            self.discard(unused)
        slot = self._slots[version] = self._free.pop()
        return slot

    def discard(self, version: ServedVersion) -> None:
        """Empty the slot of a version that is not pinned."""
        self._free.append(self._slots.pop(version))

    def pin(self, version: ServedVersion) -> None:
        """Keep a version in its slot until :meth:`unpin`."""
        if version != BASE:
            self._pins[version] += 1
            self._slots.move_to_end(version)

    def unpin(self, version: ServedVersion) -> None:
        """Undo one :meth:`pin`."""
        if version != BASE:
            self._pins[version] -= 1
            if not self._pins[version]:
                del self._pins[version]
