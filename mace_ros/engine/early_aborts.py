# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Cancellations that arrive before their query: topics are not ordered among each other."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

T = TypeVar('T')

KEPT_S = 10.0     # a query with the same id that arrives later is a new one
KEPT = 1000       # cancellations, and as many ids of queries that have ended


class EarlyAborts:
    """
    Remembers cancellations of unknown queries for a while.

    A cancellation that arrives after its query has ended is ignored: it must not abort a later
    query that uses the id again.
    """

    def __init__(self) -> None:
        """Begin without a cancellation."""
        self._cancelled: OrderedDict[str, float] = OrderedDict()
        self._ended: OrderedDict[str, None] = OrderedDict()

    def cancelled(self, query_id: str, now: float) -> None:
        """Note the cancellation of a query that is not active."""
        if query_id not in self._ended:
            _put(self._cancelled, query_id, now)

    def ended(self, query_id: str) -> None:
        """Note that a query has ended."""
        _put(self._ended, query_id, None)

    def take(self, query_id: str, now: float) -> bool:
        """Return whether an arriving query was cancelled already, and forget that."""
        at = self._cancelled.pop(query_id, None)
        return at is not None and now - at <= KEPT_S


def _put(kept: OrderedDict[str, T], key: str, value: T) -> None:
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > KEPT:
        kept.popitem(last=False)
