# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Cancellations that come before their query: topics keep no order among each other."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

T = TypeVar('T')

KEPT_S = 10.0     # a query that comes later is another one
KEPT = 1000       # cancellations, and as many ids of queries that have ended


class EarlyAborts:
    """
    Remembers for a while who was cancelled without being there.

    One that comes too late names a query that has ended; it must not hit another one that
    uses the id again.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self._cancelled: OrderedDict[str, float] = OrderedDict()
        self._ended: OrderedDict[str, None] = OrderedDict()

    def cancelled(self, query_id: str, now: float) -> None:
        """Note that somebody was cancelled who is not there."""
        if query_id not in self._ended:
            _put(self._cancelled, query_id, now)

    def ended(self, query_id: str) -> None:
        """Note that a query has ended."""
        _put(self._ended, query_id, None)

    def take(self, query_id: str, now: float) -> bool:
        """Whether a query that comes in was cancelled already; asked once."""
        at = self._cancelled.pop(query_id, None)
        return at is not None and now - at <= KEPT_S


def _put(kept: OrderedDict[str, T], key: str, value: T) -> None:
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > KEPT:
        kept.popitem(last=False)
