# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Messages of the ROS client's thread, awaited on the event loop of the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress


class Arrivals:
    """Lets coroutines of the running event loop wait for what another thread announces."""

    def __init__(self) -> None:
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()

    def announce(self) -> None:
        """Let the waiting coroutines look again; from any thread."""
        with suppress(RuntimeError):    # the loop has ended
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait_for(self, condition: Callable[[], object], timeout_s: float) -> bool:
        """Return whether the condition comes true within ``timeout_s``."""
        try:
            await asyncio.wait_for(self._until(condition), timeout_s)
        except (TimeoutError, asyncio.TimeoutError):
            return False
        return True

    async def _until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self._event.clear()     # an announcement since the look sets it during the wait
            await self._event.wait()
