# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Which adapter version lies in which slot, and who still uses it (no tensors here)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

BASE_VERSION = 0
BASE_IDENTITY = ''
NO_SLOT = 'every adapter slot has the live version of a profile; raise adapter.slots'


@dataclass(frozen=True, order=True)
class LiveVersion:
    """A version that is held in a slot; version 0 is the base model."""

    profile: str
    version: int
    slot: int

    @property
    def identity(self) -> str:
        """What names its weights for ever; a slot is overwritten."""
        return f'{self.profile}\n{self.version}' if self.version else BASE_IDENTITY


class AdapterSlots:
    """
    Hands out the slots ``first .. first + count - 1`` to adapter versions.

    A request pins the version it began with; a slot is free again when its version is
    no longer live and no request pins it. A profile without a version of its own is
    served the robot's (profile ''), or the base model in ``base_slot``.
    """

    def __init__(self, *, base_slot: int, first: int, count: int) -> None:
        self._count = count
        self._base = LiveVersion('', BASE_VERSION, base_slot)
        self._free = list(range(first + count - 1, first - 1, -1))
        self._live: dict[str, LiveVersion] = {}
        self._coming: set[str] = set()      # profiles a version of which is about to be live
        self._pins: Counter[LiveVersion] = Counter()

    @property
    def free(self) -> int:
        """Slots that a new version could take."""
        return len(self._free)

    @property
    def profiles(self) -> int:
        """Profiles that have a live version of their own."""
        return len(self._live)

    def has_room(self, profile: str) -> bool:
        """Whether that profile may have a version of its own, now or after some request."""
        # One slot is for the next version of a profile that has one already.
        profiles = self._live.keys() | self._coming
        return profile in profiles or len(profiles) < self._count - 1

    def expect(self, profile: str) -> None:
        """Let others have the room that is left beside a version, until that is live, ..."""
        self._coming.add(profile)

    def expect_no_more(self, profile: str) -> None:
        """... or will not be."""
        self._coming.discard(profile)

    def live(self, profile: str) -> LiveVersion:
        """Return the version that a query of that profile is served now."""
        return self._live.get(profile) or self._live.get('') or self._base

    def pin(self, profile: str) -> LiveVersion:
        """Return the live version and keep it in its slot until :meth:`unpin`."""
        version = self.live(profile)
        self._pins[version] += 1
        return version

    def unpin(self, version: LiveVersion) -> None:
        """End one :meth:`pin`."""
        self._pins[version] -= 1
        self._retire(version)

    def reserve(self) -> int | None:
        """Take a free slot, or return None if there is none yet."""
        return self._free.pop() if self._free else None

    def give_back(self, slot: int) -> None:
        """Return a reserved slot unused."""
        self._free.append(slot)

    def publish(self, profile: str, version: int, slot: int) -> LiveVersion:
        """Make the version in that reserved slot the profile's live one."""
        before = self._live.get(profile)
        self._coming.discard(profile)
        self._live[profile] = LiveVersion(profile, version, slot)
        if before is not None:
            self._retire(before)
        return self._live[profile]

    def held(self, profile: str, version: int) -> int | None:
        """Return the slot that still holds a version, because it is live or pinned."""
        slots = (v.slot for v in (*self._live.values(), *self._pins)
                 if (v.profile, v.version) == (profile, version))
        return next(slots, None)

    def withdraw(self, profile: str) -> None:
        """Serve the profile no version of its own any more."""
        before = self._live.pop(profile, None)
        if before is not None:
            self._retire(before)

    def _retire(self, version: LiveVersion) -> None:
        if self._pins[version] == 0:
            del self._pins[version]
            if version != self._base and self._live.get(version.profile) != version:
                self._free.append(version.slot)
