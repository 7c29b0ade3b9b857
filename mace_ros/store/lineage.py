# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The history of an adapter version, and which of its versions are live together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, NamedTuple, Protocol, TypeVar

from mace_ros.api.events import VersionState


class Descendant(Protocol):
    """What a lineage needs to know of a version; see :class:`VersionRecord`."""

    @property
    def version(self) -> int:
        """Its number."""

    @property
    def parent(self) -> int:
        """The newest version before it."""

    @property
    def continues(self) -> int:
        """The version whose place it takes."""

    @property
    def sha256(self) -> str:
        """Empty if its files are not kept."""


class VersionLink(NamedTuple):
    """The fields of a :class:`VersionRecord` that a lineage needs; they are read much faster."""

    profile: str
    version: int
    parent: int
    continues: int
    state: VersionState
    path: str
    sha256: str


V = TypeVar('V', bound=Descendant)


class Lineage(Generic[V]):
    """A version and those that were the newest ones before it, newest first, of one profile."""

    def __init__(self, records: Iterable[V], version: int) -> None:
        """Follow the parents of ``version`` as far as they are among ``records``."""
        by_number = {record.version: record for record in records}
        line = []
        while version in by_number:
            line.append(by_number[version])
            version = by_number[version].parent
        self.versions = tuple(line)
        self.numbers = frozenset(record.version for record in line)
        self._oldest_unrecorded = version    # the records of this one and its parents are deleted

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

    @property
    def live(self) -> tuple[V, ...]:
        """The versions that no other one continues, newest first: all of them answer queries."""
        continued = {record.continues for record in self.versions}
        return tuple(r for r in self.versions if r.version not in continued)

    @property
    def on_disk(self) -> tuple[V, ...]:
        """The live versions whose files are kept; no correction on record needs the others."""
        return tuple(record for record in self.live if record.sha256)

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
