# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Limits that apply before a request is parsed: API key, size of the body, concurrency."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mace_ros.openai.errors import ApiError

# A robot that answers as many clients as it may can still be corrected.
COMPLETIONS = ('/v1/chat/completions', '/v1/completions')


@dataclass(frozen=True)
class Limits:
    """
    Limits of requests below /v1; an empty ``key`` switches authentication off.

    ``max_concurrent`` applies to completions, and by itself to all other requests.
    """

    key: str = ''
    max_body_bytes: int = 2**20
    max_concurrent: int = 64
    body_timeout_s: float = 30.0        # for the whole body to arrive


class LimitsMiddleware:
    """Refuses requests beyond the limits; reads the body of the others, and passes them on."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits
        self._running: Counter[bool] = Counter()    # by whether they are completions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope['type'] != 'http' or not scope['path'].startswith('/v1/'):
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except ApiError as error:
            await error.reply()(scope, receive, send)
            return
        kind = scope['path'] in COMPLETIONS
        self._running[kind] += 1
        try:
            await self._serve(scope, receive, send)
        finally:
            self._running[kind] -= 1

    def _check(self, scope: Scope) -> None:
        headers = dict(scope['headers'])
        if self._limits.key:
            scheme, _, given = headers.get(b'authorization', b'').partition(b' ')
            if scheme.lower() != b'bearer' or not hmac.compare_digest(
                    given.strip(), self._limits.key.encode()):
                raise ApiError(401, 'the API key is missing or wrong',
                               kind='authentication_error', code='invalid_api_key')
        elif b'origin' in headers:
            # Any page that is open in a browser on this machine could teach the robot.
            raise ApiError(403, 'requests from web pages need an API key (--api-key-file)',
                           kind='permission_error', code='origin_refused')
        if self._running[scope['path'] in COMPLETIONS] >= self._limits.max_concurrent:
            raise ApiError(
                429, f'{self._limits.max_concurrent} requests are already running '
                '(--max-concurrent)',
                kind='rate_limit_error', code='too_many_requests')
        length = headers.get(b'content-length', b'0')
        if length.isdigit() and int(length[:20]) > self._limits.max_body_bytes:
            raise self._too_large()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await asyncio.wait_for(self._body(receive), self._limits.body_timeout_s)
        except (TimeoutError, asyncio.TimeoutError):
            error = ApiError(408, 'the request body did not arrive in time', code='timeout')
            await error.reply()(scope, receive, send)
            return
        except ApiError as error:
            await error.reply()(scope, receive, send)
            return
        if body is None:    # the client has disconnected
            return
        waiting: list[Message] = [{'type': 'http.request', 'body': body, 'more_body': False}]

        async def receive_again() -> Message:
            return waiting.pop() if waiting else await receive()

        await self._app(scope, receive_again, send)

    async def _body(self, receive: Receive) -> bytes | None:
        """Return the body; None if the client disconnects before it is complete."""
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message['type'] == 'http.disconnect':
                return None
            parts.append(message.get('body', b''))
            size += len(parts[-1])
            if size > self._limits.max_body_bytes:
                raise self._too_large()
            if not message.get('more_body', False):
                return b''.join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f'the body has more than {self._limits.max_body_bytes} bytes (--max-body-bytes)',
            code='request_too_large')
