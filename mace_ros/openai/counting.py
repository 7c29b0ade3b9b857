# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Count all requests by path and status, whichever part of the server replies."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import Counter
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OTHER = 'other'     # paths that clients make up must not become labels
GONE = 499          # as nginx counts a client that disconnects before there is a reply


class CountingMiddleware:
    """Counts a request when its reply begins, or when it ends without one."""

    def __init__(self, app: ASGIApp, routes: Sequence[Route], requests: Counter) -> None:
        """Count with ``requests``, whose labels are path and status."""
        self._app, self._routes, self._requests = app, routes, requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope['type'] != 'http':
            await self._app(scope, receive, send)
            return
        status = 0

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message['type'] == 'http.response.start':
                status = message['status']
                self._count(scope, status)
            await send(message)

        try:
            await self._app(scope, receive, send_counted)
        except Exception:
            if not status:
                self._count(scope, 500)
            raise
        if not status:
            self._count(scope, GONE)

    def _count(self, scope: Scope, status: int) -> None:
        path = next((route.path for route in self._routes
                     if route.matches(scope)[0] is not Match.NONE), OTHER)
        self._requests.labels(path, str(status)).inc()
