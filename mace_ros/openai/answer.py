# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""An answer that arrives over ROS, awaited on the event loop of the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from mace_ros.msg import Response, ResponseChunk
from mace_ros.openai.errors import ApiError, error_of
from mace_ros.ros.client import MaceClient


class Answer:
    """The answer to a query; closing it before the response has arrived cancels the query."""

    def __init__(self, client: MaceClient, query_id: str, timeout_s: float,
                 fields: dict[str, Any]) -> None:
        """``timeout_s`` is how long to wait for a message; ``fields`` are those of the query."""
        self.id = query_id
        self._timeout_s = timeout_s
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
        self._known = 0     # chunks that :meth:`chunks` has yielded
        self._handle = client.ask(query_id=query_id, watch=self._wake, **fields)

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
        """Yield the chunks up to the response; raises :class:`ApiError`."""
        while True:
            await self._wait(self._known)
            done = self._handle.response is not None
            for chunk in self._handle.chunks[self._known:]:
                self._known += 1
                yield chunk
            if done:
                return

    async def response(self) -> Response:
        """Wait for the response; raises :class:`ApiError`."""
        while self._handle.response is None:
            await self._wait(len(self._handle.chunks))
        return self._handle.response

    async def _wait(self, known: int) -> None:
        """Wait until more than ``known`` chunks or the response have arrived."""
        while self._handle.response is None and len(self._handle.chunks) <= known:
            if self._handle.lost:
                raise ApiError(503, self._handle.lost, kind='server_error', code='node_ended')
            self._changed.clear()    # a message that has arrived since sets it during the wait
            try:
                await asyncio.wait_for(self._changed.wait(), self._timeout_s)
            except (TimeoutError, asyncio.TimeoutError) as error:
                raise ApiError(
                    408, f'nothing arrived for {self._timeout_s:g} s', kind='server_error',
                    code='timeout') from error

    def _wake(self) -> None:
        """Wake the event loop; in the client's thread."""
        with suppress(RuntimeError):    # the loop has ended
            self._loop.call_soon_threadsafe(self._changed.set)
