# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What comes in while no engine serves: it waits for the first one, or is refused."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
import threading
from typing import TYPE_CHECKING
import uuid

from mace_ros.api.events import (
    Correction,
    CorrectionState,
    CorrectionStatus,
    ErrorCode,
    Event,
    FinishReason,
    Query,
    Response,
)

if TYPE_CHECKING:
    from mace_ros.engine.engine import Engine


class RequestGate:
    """Hands queries, corrections and cancellations to the engine, in their order."""

    def __init__(self, *, limit: Callable[[], int], refuse: Callable[[list[Event]], None]) -> None:
        """
        ``limit`` says how many may wait; ``refuse`` publishes the answer to one that may not.

        It is called from the thread that brought what is refused.
        """
        self._limit, self._refuse = limit, refuse
        self._lock = threading.Lock()
        self._waiting: deque[Query | Correction | str] = deque()
        self._engine: Engine | None = None
        self._closed = ''

    def put(self, item: Query | Correction | str) -> None:
        """Take a query, a correction, or the id of a query to cancel; returns at once."""
        with self._lock:
            if self._engine is not None:
                _hand_over(item, self._engine)
                return
            # A cancellation is short, and must not be lost for the number of queries.
            most = self._limit() * (2 if isinstance(item, str) else 1)
            if not self._closed and len(self._waiting) < most:
                self._waiting.append(item)
                return
            closed = self._closed
        self._refuse(_refusal(item, closed))

    def open(self, engine: Engine) -> None:
        """Hand over what has waited, and from now on all that comes."""
        with self._lock:
            self._engine, self._closed = engine, ''
            while self._waiting:
                _hand_over(self._waiting.popleft(), engine)

    def close(self, reason: str) -> None:
        """Refuse what waits, and all that comes until it is opened, for this reason."""
        with self._lock:
            self._engine, self._closed = None, reason
            waiting, self._waiting = self._waiting, deque()
        for item in waiting:
            self._refuse(_refusal(item, reason))


def _hand_over(item: Query | Correction | str, engine: Engine) -> None:
    if isinstance(item, Query):
        engine.submit(item)
    elif isinstance(item, Correction):
        engine.correct(item)
    else:
        engine.cancel(item)


def _refusal(item: Query | Correction | str, closed: str) -> list[Event]:
    code = ErrorCode.NOT_SERVING if closed else ErrorCode.OVERLOADED
    reason = closed or 'the model is still being loaded, and too much waits for it already'
    if isinstance(item, Query):
        query_id = item.id or str(uuid.uuid4())
        return [Response(query_id, item.conversation_id, '', FinishReason.REJECTED, code, reason,
                         origin=item.origin)]
    if isinstance(item, Correction):
        return [CorrectionStatus(item.id, CorrectionState.REJECTED, reason)]
    return []
