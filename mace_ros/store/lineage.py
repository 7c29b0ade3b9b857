# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The history of an adapter version, and which of its versions are live together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from mace_ros.api.events import VersionState


class VersionLink(NamedTuple):
    """The fields of a :class:`VersionRecord` that a lineage needs; they are read much faster."""

    profile: str
    version: int
    parent: int
    continues: int
    state: VersionState
    path: str
    sha256: str
    everywhere: bool


class Lineage:
    """A version and those that were the newest ones before it, newest first, of one profile."""

    def __init__(self, records: Iterable[VersionLink], version: int) -> None:
        """Follow ``version`` to what was before it, as far as that is among ``records``."""
        by_number = {record.version: record for record in records}
        numbers = set()
        while version in by_number:
            numbers.add(version)
            version = by_number[version].parent
        self._oldest_unrecorded = version    # the records of this one and its parents are deleted
        for number in tuple(numbers):       # some may continue versions that were withdrawn since
            while (number := by_number[number].continues) in by_number and number not in numbers:
                numbers.add(number)
        self.numbers = frozenset(numbers)
        self.versions = tuple(by_number[number] for number in sorted(numbers, reverse=True))

    def holds(self, version: int) -> bool:
        """Return whether ``version`` is in this lineage, so that its corrections are learned."""
        return version in self.numbers or 0 < version <= self._oldest_unrecorded

    def continuing(self, version: int) -> set[int]:
        """Return the version and those of this lineage that continue it, one after the other."""
        found = {version}
        for record in reversed(self.versions):
            if record.continues in found:
                found.add(record.version)
        return found

    def without(self, version: int) -> Lineage:
        """Return what is left without a version and those that continue it."""
        withdrawn, left = self.continuing(version), self._oldest_unrecorded
        kept: list[VersionLink] = []
        for record in reversed(self.versions):
            if record.version not in withdrawn:
                kept.append(record._replace(parent=left))
                left = record.version
        return Lineage(kept, left)

    @property
    def newest(self) -> int:
        """The newest version, 0 if there is none."""
        return self.versions[0].version if self.versions else 0

    @property
    def live(self) -> tuple[VersionLink, ...]:
        """The versions that no other one continues, newest first: all of them answer queries."""
        continued = {record.continues for record in self.versions}
        return tuple(r for r in self.versions if r.version not in continued)

    @property
    def on_disk(self) -> tuple[VersionLink, ...]:
        """The live versions whose files are kept; no correction on record needs the others."""
        return tuple(record for record in self.live if record.sha256)

    @property
    def everywhere(self) -> int:
        """The newest of them that was trained to answer every question, 0 if none was."""
        return next((record.version for record in self.on_disk if record.everywhere), 0)

    @property
    def successors(self) -> dict[int, int]:
        """The live version that has what each version has learned, by its number."""
        found: dict[int, int] = {}
        for record in self.versions:        # a version comes before the one that it continues
            found.setdefault(record.version, record.version)
            if record.continues:
                found[record.continues] = found[record.version]
        if len(self.live) == 1:     # which continues all that were ever in this lineage
            found |= dict.fromkeys(range(1, self._oldest_unrecorded + 1), self.live[0].version)
        return found
