# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Errors in the form of OpenAI's API, with the status codes that its clients expect."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from mace_ros.msg import Response

RETRY_AFTER_S = 1
CANCELLED = 'cancelled'     # the code of an answer that was cancelled over ROS

# Status, type and code of each error code of a response.
_KINDS = {
    Response.EMPTY_TEXT: (400, 'invalid_request_error', 'empty_text'),
    Response.INVALID_ID: (400, 'invalid_request_error', 'invalid_id'),
    Response.DUPLICATE_ID: (409, 'invalid_request_error', 'duplicate_id'),
    Response.INVALID_PARAMETER: (400, 'invalid_request_error', 'invalid_parameter'),
    Response.PROMPT_TOO_LONG: (400, 'invalid_request_error', 'context_length_exceeded'),
    Response.OVERLOADED: (429, 'rate_limit_error', 'overloaded'),
    Response.SLO_UNREACHABLE: (429, 'rate_limit_error', 'slo_unreachable'),
    Response.NOT_SERVING: (503, 'server_error', 'not_serving'),
}

# Fields of a query that have other names in OpenAI's API.
_OPENAI_NAMES = {'response_schema': 'response_format', 'logit_bias_tokens': 'logit_bias',
                 'logit_bias_values': 'logit_bias', 'text': 'prompt'}


class ApiError(Exception):
    """An error of a request, in the form that OpenAI's clients turn into exceptions."""

    def __init__(self, status: int, message: str, *, kind: str = 'invalid_request_error',
                 code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.code, self.param = status, kind, code, param

    @property
    def body(self) -> dict[str, Any]:
        """The body of the reply."""
        return {'error': {'message': str(self), 'type': self.kind, 'param': self.param,
                          'code': self.code}}

    def reply(self, **beside: str) -> JSONResponse:
        """
        Return the reply, with other fields ``beside`` the error.

        Clients wait and try again after 429 and 503, but must not start again what was cancelled.
        """
        headers = {}
        if self.code == CANCELLED:
            headers['x-should-retry'] = 'false'     # which OpenAI's clients obey
        elif self.status in (429, 503):
            headers['Retry-After'] = str(RETRY_AFTER_S)
        return JSONResponse({**self.body, **beside}, self.status, headers)


def error_of(response: Response) -> ApiError | None:
    """Return the error of a failed query; None for an answer."""
    if response.finish_reason in (Response.STOP, Response.LENGTH):
        return None
    if response.finish_reason == Response.CANCELLED:
        return ApiError(503, 'the answer was cancelled', kind='server_error', code=CANCELLED)
    status, kind, code = _KINDS.get(
        response.error_code, (500, 'server_error', 'internal_error'))
    message, param = _openai_names(response.error)
    return ApiError(status, message, kind=kind, code=code, param=param if status == 400 else None)


def _openai_names(error: str) -> tuple[str, str | None]:
    """Return an error and the invalid field, if it names one, as OpenAI's API calls it."""
    field = re.match(r'([a-z_]+)(\[\d+\])?: ', error)
    if field is None:
        return error, None
    name = _OPENAI_NAMES.get(field[1], field[1])
    return name + error[field.end(1):], name


def error_of_body(error: ValidationError) -> ApiError:
    """Return the error of an invalid request body."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    where = [_field(problem['loc']) for problem in problems]
    what = [problem['msg'].removeprefix('Value error, ') for problem in problems]
    message = '; '.join(f'{place}: {text}' if place else text
                        for place, text in list(zip(where, what, strict=True))[:5])
    return ApiError(400, message, code='invalid_body', param=where[0] or None)


def _field(place: tuple[int | str, ...]) -> str:
    """Return the name of a field, without the types that pydantic puts between its parts."""
    return '.'.join(str(part) for part in place if isinstance(part, int) or (
        re.fullmatch('[a-z_]+', part) and part not in ('str', 'int', 'float', 'bool')))
