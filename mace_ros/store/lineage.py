# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Where a version comes from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mace_ros.store.journal import VersionRecord


class Lineage:
    """A version and the parents that it was trained from, newest first; all of one profile."""

    def __init__(self, records: Iterable[VersionRecord], version: int) -> None:
        """Follow the parents of ``version`` as far as they are among ``records``."""
        by_number = {record.version: record for record in records}
        line = []
        while version in by_number:
            line.append(by_number[version])
            version = by_number[version].parent
        self.versions = tuple(line)
        self.numbers = frozenset(record.version for record in line)
        self._forgotten = version       # this one and its parents are on record no more

    def holds(self, version: int) -> bool:
        """Whether what was learned in that version is part of it."""
        return version in self.numbers or 0 < version <= self._forgotten
