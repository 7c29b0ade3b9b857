# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""An answer that arrives over ROS, awaited on the event loop of the server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from mace_ros.msg import Response, ResponseChunk
from mace_ros.openai.arrivals import Arrivals
from mace_ros.openai.errors import ApiError, error_of
from mace_ros.ros.client import MaceClient

MAX_UNREAD = 1000       # chunks of a stream that its client has not read


class Answer:
    """The answer to a query; closing it before the response has arrived cancels the query."""

    def __init__(self, client: MaceClient, query_id: str, timeout_s: float,
                 fields: dict[str, Any]) -> None:
        """``timeout_s`` is how long to wait for a message; ``fields`` are those of the query."""
        self.id = query_id
        self._timeout_s = timeout_s
        self._arrivals = Arrivals()
        self._read: int | None = None       # chunks that :meth:`chunks` has yielded
        self._is_slow = False               # whether too many waited to be read
        self._handle = client.ask(query_id=query_id, watch=self._on_message, **fields)

    def close(self) -> None:
        """Cancel the query unless it has ended."""
        if self._handle.response is None and not self._handle.lost:
            self._handle.cancel()

    async def begin(self) -> None:
        """Wait for the first chunk or the response; raises :class:`ApiError`."""
        await self._wait(0)

    @property
    def refused(self) -> ApiError | None:
        """Why the query ended without an answer; None if it is running or was answered."""
        response = self._handle.response
        return None if response is None else error_of(response)

    async def chunks(self) -> AsyncIterator[ResponseChunk]:
        """
        Yield the chunks up to the response; raises :class:`ApiError`.

        The query is cancelled once more than ``MAX_UNREAD`` of them wait to be taken.
        """
        self._read = 0
        while True:
            await self._wait(self._read)
            done = self._handle.response is not None
            for chunk in self._handle.chunks[self._read:]:
                self._read += 1
                yield chunk
            if done and self._is_slow and self.refused:
                raise ApiError(408, f'more than {MAX_UNREAD} chunks of the answer were not read',
                               code='slow_reader')
            if done:
                return

    async def response(self) -> Response:
        """Wait for the response; raises :class:`ApiError`."""
        while self._handle.response is None:
            await self._wait(len(self._handle.chunks))
        return self._handle.response

    async def _wait(self, known: int) -> None:
        """Wait until more than ``known`` chunks or the response have arrived."""
        def arrived() -> bool:
            handle = self._handle
            return handle.response is not None or len(handle.chunks) > known

        if not await self._arrivals.wait_for(lambda: arrived() or self._handle.lost,
                                             self._timeout_s):
            raise ApiError(408, f'nothing arrived for {self._timeout_s:g} s', kind='server_error',
                           code='timeout')
        if not arrived():
            raise ApiError(503, self._handle.lost, kind='server_error', code='node_ended')

    def _on_message(self) -> None:
        """Let the event loop look; end an answer that is not read; in the client's thread."""
        if self._read is not None and not self._is_slow and (
                len(self._handle.chunks) > self._read + MAX_UNREAD):
            self._is_slow = True
            self.close()
        self._arrivals.announce()
