# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Incoming requests while no engine serves.

Before the first activation they wait; later they are refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
import threading
from typing import TYPE_CHECKING
import uuid

from mace_ros.api.events import (
    Cancel,
    Correction,
    CorrectionState,
    CorrectionStatus,
    ErrorCode,
    Event,
    FinishReason,
    Input,
    Query,
    Response,
)
from mace_ros.ros.parameters import ParameterServer

if TYPE_CHECKING:
    from mace_ros.engine.engine import Engine

NOT_ACTIVE = 'the node is not active'


class RequestGate:
    """Passes queries, corrections and cancellations to the engine in their order."""

    def __init__(self, parameters: ParameterServer, *,
                 publish: Callable[[list[Event]], None]) -> None:
        """
        Let requests wait, up to ``scheduler.max_queue`` of them.

        ``publish`` gets the events of refused requests, in the thread that calls :meth:`put` or
        :meth:`close`.
        """
        self._parameters, self._publish = parameters, publish
        self._lock = threading.Lock()
        self._waiting: deque[Input] = deque()
        self._engine: Engine | None = None
        self._closed_reason = ''

    @property
    def engine(self) -> Engine | None:
        """The engine that serves; None before :meth:`open` and after :meth:`close`."""
        return self._engine

    def put(self, item: Input) -> None:
        """Pass an input to the engine, let it wait, or refuse it; return at once."""
        with self._lock:
            if self._engine is not None:
                _pass_on(item, self._engine)
                return
            limit = self._parameters.settings.scheduler.max_queue
            if isinstance(item, Cancel):
                limit *= 2      # cancellations are small, and must not be lost behind queries
            if not self._closed_reason and len(self._waiting) < limit:
                self._waiting.append(item)
                return
            reason = self._closed_reason
        self._publish(_refusal(item, reason))

    def open(self, engine: Engine) -> None:
        """Pass waiting requests to the engine, and all later ones."""
        with self._lock:
            self._engine, self._closed_reason = engine, ''
            while self._waiting:
                _pass_on(self._waiting.popleft(), engine)

    def close(self, reason: str) -> None:
        """Refuse waiting requests, and all later ones until :meth:`open`, for this reason."""
        with self._lock:
            self._engine, self._closed_reason = None, reason
            waiting, self._waiting = self._waiting, deque()
        for item in waiting:
            self._publish(_refusal(item, reason))


def _pass_on(item: Input, engine: Engine) -> None:
    match item:
        case Query():
            engine.submit(item)
        case Correction():
            engine.correct(item)
        case Cancel(query_id):
            engine.cancel(query_id)


def _refusal(item: Input, closed_reason: str) -> list[Event]:
    code = ErrorCode.NOT_SERVING if closed_reason else ErrorCode.OVERLOADED
    reason = closed_reason or 'the model is being loaded, and too many requests wait already'
    if isinstance(item, Query):
        query_id = item.id or str(uuid.uuid4())
        return [Response(query_id, item.conversation_id, '', FinishReason.REJECTED, code, reason,
                         origin=item.origin)]
    if isinstance(item, Correction):
        return [CorrectionStatus(item.id, CorrectionState.REJECTED, reason)]
    return []
