# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The ancestry of an adapter version."""

from __future__ import annotations

from collections.abc import Iterable

from mace_ros.store.records import VersionRecord


class Lineage:
    """A version and the parents that it was trained from, newest first, all of one profile."""

    def __init__(self, records: Iterable[VersionRecord], version: int) -> None:
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
