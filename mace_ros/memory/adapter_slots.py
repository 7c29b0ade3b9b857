# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Assignment of adapter versions to slots, with reference counts (no tensors here)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

BASE_VERSION = 0
BASE_IDENTITY = ''
NO_SLOT = 'every adapter slot has the live version of a profile; raise adapter.slots'


@dataclass(frozen=True, order=True)
class LiveVersion:
    """A version that is in a slot; version 0 is the base model."""

    profile: str
    version: int
    slot: int

    @property
    def identity(self) -> str:
        """The permanent identity of the weights; a slot number is not, as it is reused."""
        return f'{self.profile}\n{self.version}' if self.version else BASE_IDENTITY


class AdapterSlots:
    """
    Assigns the slots ``first .. first + count - 1`` to adapter versions.

    A request pins the version that it started with. A slot becomes free when its version is
    neither live nor pinned. A profile without a version of its own has the robot's version
    (profile ''), or else the base model in ``base_slot``.
    """

    def __init__(self, *, base_slot: int, first: int, count: int) -> None:
        self._count = count
        self._base = LiveVersion('', BASE_VERSION, base_slot)
        self._free = list(range(first + count - 1, first - 1, -1))
        self._live: dict[str, LiveVersion] = {}
        self._expected: set[str] = set()      # profiles whose next version is being published
        self._pins: Counter[LiveVersion] = Counter()

    @property
    def free(self) -> int:
        """Slots that a new version could use."""
        return len(self._free)

    @property
    def profiles(self) -> int:
        """Profiles that have a live version of their own."""
        return len(self._live)

    def has_room(self, profile: str) -> bool:
        """Return whether the profile may have a version of its own, perhaps after a request."""
        # One slot is reserved for the next version of a profile that has one already.
        profiles = self._live.keys() | self._expected
        return profile in profiles or len(profiles) < self._count - 1

    def expect(self, profile: str) -> None:
        """Count the profile in :meth:`has_room` until its version is published."""
        self._expected.add(profile)

    def expect_no_more(self, profile: str) -> None:
        """Undo :meth:`expect`: the version will not be published."""
        self._expected.discard(profile)

    def live(self, profile: str) -> LiveVersion:
        """Return the version that a query of the profile uses now."""
        return self._live.get(profile) or self._live.get('') or self._base

    def pin(self, profile: str | None) -> LiveVersion:
        """
        Return the live version and keep it in its slot until :meth:`unpin`.

        None is no profile, but the base model.
        """
        version = self._base if profile is None else self.live(profile)
        self._pins[version] += 1
        return version

    def unpin(self, version: LiveVersion) -> None:
        """Undo one :meth:`pin`."""
        self._pins[version] -= 1
        self._retire(version)

    def reserve(self) -> int | None:
        """Take a free slot; return None if there is none."""
        return self._free.pop() if self._free else None

    def give_back(self, slot: int) -> None:
        """Return a reserved slot that was not used."""
        self._free.append(slot)

    def publish(self, profile: str, version: int, slot: int) -> LiveVersion:
        """Make the version in a reserved slot the profile's live version."""
        before = self._live.get(profile)
        self._expected.discard(profile)
        self._live[profile] = LiveVersion(profile, version, slot)
        if before is not None:
            self._retire(before)
        return self._live[profile]

    def slot_of(self, profile: str, version: int) -> int | None:
        """Return the slot of a version that is live or pinned; otherwise None."""
        slots = (v.slot for v in (*self._live.values(), *self._pins)
                 if (v.profile, v.version) == (profile, version))
        return next(slots, None)

    def withdraw(self, profile: str) -> None:
        """Make the profile use no version of its own."""
        before = self._live.pop(profile, None)
        if before is not None:
            self._retire(before)

    def _retire(self, version: LiveVersion) -> None:
        if self._pins[version] == 0:
            del self._pins[version]
            if version != self._base and self._live.get(version.profile) != version:
                self._free.append(version.slot)
