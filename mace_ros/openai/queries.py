# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Requests of the API as fields of ``Query.msg``."""

from __future__ import annotations

import json
from typing import Any

from mace_ros.msg import ChatMessage, Query, Tool, ToolCall
from mace_ros.openai.errors import ApiError
from mace_ros.openai.protocol import (
    ChatRequest,
    CompletionRequest,
    FormatParam,
    INT32,
    INT64,
    Message,
    Request,
)


def chat_fields(request: ChatRequest) -> dict[str, Any]:
    """Return the fields of the query of a chat completion; raises :class:`ApiError`."""
    fields = {**_fields(request), 'messages': [_message(m) for m in request.messages]}
    if request.max_completion_tokens is not None:
        fields['max_tokens'] = request.max_completion_tokens
    if request.tools:
        fields['tools'] = [Tool(
            name=tool.function.name, description=tool.function.description or '',
            parameters=_json(tool.function.parameters)) for tool in request.tools]
    choice = request.tool_choice
    if choice is not None:
        fields['tool_choice'] = choice if isinstance(choice, str) else choice.function.name
    if request.logprobs:
        fields['logprobs'] = (request.top_logprobs or 0) + 1
    elif request.top_logprobs:
        raise ApiError(400, 'top_logprobs requires logprobs: true', param='top_logprobs')
    if request.response_format is not None:
        fields |= _format(request.response_format)
    return fields


def completion_fields(request: CompletionRequest) -> dict[str, Any]:
    """Return the fields of the query of a completion."""
    prompt = request.prompt if isinstance(request.prompt, str) else request.prompt[0]
    fields = {**_fields(request), 'text': prompt, 'raw_prompt': True}
    if request.logprobs is not None:
        fields['logprobs'] = request.logprobs + 1
    return fields


def _fields(request: Request) -> dict[str, Any]:
    """Return the fields that chat completions and completions share."""
    fields = {name: value for name in (
        'max_tokens', 'temperature', 'top_p', 'n', 'frequency_penalty', 'presence_penalty',
        'top_k', 'min_p', 'repetition_penalty', 'priority', 'ttft_slo_ms', 'tpot_slo_ms',
        'no_learn') if (value := getattr(request, name)) is not None}
    if request.seed is not None:
        fields['seed'] = request.seed & INT64      # not negative: -1 asks for any seed
    if request.stop is not None:
        fields['stop'] = [request.stop] if isinstance(request.stop, str) else request.stop
    if request.logit_bias:
        fields['logit_bias_tokens'] = list(map(_token, request.logit_bias))
        fields['logit_bias_values'] = list(request.logit_bias.values())
    return fields


def _token(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 10 or int(text) > INT32:
        raise ApiError(400, f'logit_bias: {text[:20]!r} is not a token id', param='logit_bias')
    return int(text)


def _message(message: Message) -> ChatMessage:
    return ChatMessage(
        role='system' if message.role == 'developer' else message.role, content=message.text,
        tool_calls=[ToolCall(id=call.id, name=call.function.name,
                             arguments=call.function.arguments)
                    for call in message.tool_calls or ()],
        tool_call_id=message.tool_call_id or '')


def _format(wanted: FormatParam) -> dict[str, Any]:
    if wanted.type == 'text':
        return {}
    if wanted.type == 'json_object':
        return {'response_format': Query.JSON}
    if wanted.type == 'json_schema' and wanted.json_schema is not None:
        return {'response_format': Query.JSON_SCHEMA,
                'response_schema': _json(wanted.json_schema.schema_)}
    if wanted.type == 'regex' and wanted.regex is not None:
        return {'response_format': Query.REGEX, 'response_schema': wanted.regex}
    if wanted.type == 'grammar' and wanted.grammar is not None:
        return {'response_format': Query.GRAMMAR, 'response_schema': wanted.grammar}
    raise ApiError(400, f'response_format: {wanted.type} is missing', param='response_format')


def _json(value: dict[str, Any] | None) -> str:
    return '' if value is None else json.dumps(value)     # ASCII, in which NUL is escaped
