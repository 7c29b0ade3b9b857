# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The endpoints of OpenAI's API, and those beside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
import json
import time
from typing import Any, TypeVar
import uuid

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response as HttpResponse, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mace_ros.openai.answer import Answer
from mace_ros.openai.counting import CountingMiddleware
from mace_ros.openai.errors import ApiError, error_of, error_of_body
from mace_ros.openai.feedback import Feedback, WAITING
from mace_ros.openai.lifecycle import LifecycleState
from mace_ros.openai.limits import Limits, LimitsMiddleware
from mace_ros.openai.metrics import Metrics
from mace_ros.openai.models import Models
from mace_ros.openai.protocol import ChatRequest, CompletionRequest, FeedbackRequest, Request
from mace_ros.openai.queries import chat_fields, completion_fields
from mace_ros.openai.replies import ChatReply, CompletionReply, StreamedReply
from mace_ros.ros.client import MaceClient

DONE = 'data: [DONE]\n\n'
LAST_EVENT_S = 0.5      # to send the last event of a stream when the server ends

T = TypeVar('T')


class Server:
    """The endpoints, which talk to the node through a ROS client."""

    def __init__(self, client: MaceClient, *, models: Models, metrics: Metrics,
                 timeout_s: float) -> None:
        """``timeout_s`` is how long a request waits for a message from the node."""
        self._client, self._models, self._timeout_s = client, models, timeout_s
        self._feedback, self._metrics = Feedback(client), metrics
        self._lifecycle = LifecycleState(client)

    # -- endpoints -------------------------------------------------------------------

    async def chat_completions(self, http: HttpRequest) -> HttpResponse:
        """Answer a conversation."""
        request = await _parsed(http, ChatRequest)
        return await self._answer(http, request, chat_fields(request), ChatReply)

    async def completions(self, http: HttpRequest) -> HttpResponse:
        """Continue a raw prompt."""
        request = await _parsed(http, CompletionRequest)
        return await self._answer(http, request, completion_fields(request), CompletionReply)

    async def list_models(self, http: HttpRequest) -> HttpResponse:
        """List the robot and its profiles."""
        return JSONResponse({'object': 'list', 'data': self._models.all()})

    async def get_model(self, http: HttpRequest) -> HttpResponse:
        """Describe the robot, or a profile."""
        return JSONResponse(self._models.one(http.path_params['model']))

    async def give_feedback(self, http: HttpRequest) -> HttpResponse:
        """Correct a completion; the reply is a 202 if the correction has no status yet."""
        request = await _parsed(http, FeedbackRequest)
        self._must_serve()
        given = await self._feedback.give(request)
        return JSONResponse(given, 202 if given['status'] == WAITING else 200)

    async def feedback_status(self, http: HttpRequest) -> HttpResponse:
        """Return the status of a correction."""
        return JSONResponse(self._feedback.status(http.path_params['feedback']))

    async def health(self, http: HttpRequest) -> HttpResponse:
        """Return 200 if the node is active, otherwise 503; both with its lifecycle state."""
        state = await self._lifecycle.label()
        if state != 'active':
            return self._not_ready(state).reply(state=state)
        self._must_serve()
        return JSONResponse({'status': 'ok', 'state': state})

    async def metrics(self, http: HttpRequest) -> HttpResponse:
        """Return the metrics in Prometheus' text format."""
        return HttpResponse(self._metrics.text(),
                            media_type='text/plain; version=0.0.4; charset=utf-8')

    # -- answers ---------------------------------------------------------------------

    async def _answer(self, http: HttpRequest, request: Request, fields: dict[str, Any],
                      kind: type[ChatReply]) -> HttpResponse:
        profile = self._models.profile(request.model)
        self._must_serve()
        reply = kind(f'{kind.prefix}{uuid.uuid4().hex}', request.model)
        answer = Answer(self._client, reply.id, self._timeout_s, {**fields, 'profile': profile})
        try:
            if not request.stream:
                response = await _unless_disconnected(http, answer.response())
                error = error_of(response)
                if error is not None:
                    raise error
                return JSONResponse(reply.whole(response))
            # A refusal has a status code of its own: nothing is sent before the answer begins.
            await _unless_disconnected(http, answer.begin())
            refused = answer.refused
            if refused is not None:
                raise refused
            options = request.stream_options
            streamed = StreamedReply(
                reply, include_usage=bool(options and options.include_usage))
            return AnswerStream(answer, streamed)
        except asyncio.CancelledError as error:
            answer.close()
            raise _server_ends() from error
        except BaseException:
            answer.close()
            raise

    def _must_serve(self) -> None:
        if not self._client.is_ready():
            raise self._not_ready('not ready')

    def _not_ready(self, state: str) -> ApiError:
        return ApiError(503, f'{self._client.name} is {state}', kind='server_error',
                        code='not_ready')


class AnswerStream(StreamingResponse):
    """Server-sent events of an answer, which is cancelled if the client disconnects."""

    def __init__(self, answer: Answer, streamed: StreamedReply) -> None:
        super().__init__(_events(answer, streamed), media_type='text/event-stream',
                         headers={'Cache-Control': 'no-cache', 'X-Accel-Buffering': 'no'})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        except asyncio.CancelledError:
            last = f'{_event(_server_ends().body)}{DONE}'.encode()
            with suppress(asyncio.TimeoutError):    # a client that does not read
                await asyncio.wait_for(
                    send({'type': 'http.response.body', 'body': last}), LAST_EVENT_S)
        finally:
            self._answer.close()


async def _events(answer: Answer, streamed: StreamedReply) -> AsyncIterator[str]:
    try:
        async for chunk in answer.chunks():
            # Written together, because each separate write delays the first token.
            if events := ''.join(map(_event, streamed.chunk(chunk))):
                yield events
        response = await answer.response()
        error = error_of(response)
        if error is not None:
            raise error
        for each in streamed.end(response):
            yield _event(each)
    except ApiError as error:
        yield _event(error.body)
    yield DONE


def _event(value: dict[str, Any]) -> str:
    return f'data: {json.dumps(value, separators=(",", ":"), ensure_ascii=False)}\n\n'


def _server_ends() -> ApiError:
    """Return the error of an answer whose task the server cancels when it ends."""
    return ApiError(503, 'the server ends', kind='server_error', code='server_ended')


async def _unless_disconnected(http: HttpRequest, work: Awaitable[T]) -> T:
    """Await ``work``; cancel it with an :class:`ApiError` if the client disconnects first."""
    async def disconnected() -> None:
        while (await http.receive())['type'] != 'http.disconnect':
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, 'the client has disconnected')
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _parsed(http: HttpRequest, kind: type[Any]) -> Any:
    try:
        return kind.model_validate_json(await http.body())
    except ValidationError as error:
        raise error_of_body(error) from error


async def _refused(http: HttpRequest, error: Exception) -> HttpResponse:
    assert isinstance(error, ApiError)
    return error.reply()


async def _not_found(http: HttpRequest, error: Exception) -> HttpResponse:
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, f'{http.method} {http.url.path}: {error.detail}',
                    code='not_found' if error.status_code == 404 else None).reply()


async def _broken(http: HttpRequest, error: Exception) -> HttpResponse:
    return ApiError(500, f'{type(error).__name__}', kind='server_error',
                    code='internal_error').reply()


def build_app(client: MaceClient, *, model_name: str, timeout_s: float,
              limits: Limits) -> Starlette:
    """Return the application."""
    models = Models(client, model_name, created=int(time.time()))
    metrics = Metrics(client)
    server = Server(client, models=models, metrics=metrics, timeout_s=timeout_s)
    routes = [Route(path, endpoint, methods=[method])
              for method, path, endpoint in (
        ('POST', '/v1/chat/completions', server.chat_completions),
        ('POST', '/v1/completions', server.completions),
        ('GET', '/v1/models', server.list_models),
        ('GET', '/v1/models/{model:path}', server.get_model),
        ('POST', '/v1/feedback', server.give_feedback),
        ('GET', '/v1/feedback/{feedback}', server.feedback_status),
        ('GET', '/health', server.health),
        ('GET', '/metrics', server.metrics))]
    # Counted first, so that those beyond the limits are counted as well.
    return Starlette(
        routes=routes, middleware=[
            Middleware(CountingMiddleware, routes=routes, requests=metrics.requests),
            Middleware(LimitsMiddleware, limits=limits)],
        exception_handlers={ApiError: _refused, HTTPException: _not_found, Exception: _broken})
