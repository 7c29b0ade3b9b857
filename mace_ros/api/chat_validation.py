# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Validation of a query's conversation and tools at the border of the engine."""

from __future__ import annotations

from collections.abc import Iterator
import json
import re

from mace_ros.api.events import ChatMessage, ErrorCode, InvalidQuery, Query, Tool, ToolCall

MAX_TEXT = 65536          # characters of any text
MAX_CONVERSATION = 2**20  # characters of all messages and tools together
MAX_MESSAGES = 1000
MAX_TOOLS = 128
ROLES = ('system', 'user', 'assistant', 'tool')
TOOL_CHOICES = ('auto', 'none', 'required')

_NAME = re.compile(r'[A-Za-z0-9_-]{1,64}')


def text_problem(text: str) -> str:
    """Return why a text is invalid, '' if it is valid."""
    if len(text) > MAX_TEXT:
        return f'longer than {MAX_TEXT} characters'
    try:
        text.encode()
    except UnicodeEncodeError:
        return 'is not valid Unicode'
    return ''


def check_prompt(query: Query) -> None:
    """Check the text or the messages of a query; raise :class:`InvalidQuery`."""
    problem = next(_problems(query), '')
    if problem:
        raise InvalidQuery(ErrorCode.INVALID_PARAMETER, problem)
    if not query.messages and not query.text.strip():
        raise InvalidQuery(ErrorCode.EMPTY_TEXT, 'text: empty')


def _problems(query: Query) -> Iterator[str]:
    for name in ('text', 'system'):
        if problem := text_problem(getattr(query, name)):
            yield f'{name}: {problem}'
    if query.messages:
        for name in ('text', 'system', 'conversation_id'):
            if getattr(query, name):
                yield f'messages: they are the whole conversation, so {name} must be empty'
        yield from _message_problems(query.messages)
    if query.raw_prompt:
        for name in ('messages', 'tools', 'system', 'conversation_id'):
            if getattr(query, name):
                yield f'raw_prompt: text is the whole prompt, so {name} must be empty'
    yield from _tool_problems(query.tools, query.tool_choice)
    if _size(query) > MAX_CONVERSATION:
        yield f'messages: longer than {MAX_CONVERSATION} characters together'


def _message_problems(messages: tuple[ChatMessage, ...]) -> Iterator[str]:
    if len(messages) > MAX_MESSAGES:
        yield f'messages: more than {MAX_MESSAGES}'
    called: set[str] = set()
    for i, message in enumerate(messages):
        for problem in _problems_of(message, called):
            yield f'messages[{i}]: {problem}'
        called |= {call.id for call in message.tool_calls}
    if messages[-1].role not in ('user', 'tool'):
        yield 'messages: the last one must be from the user, or the result of a tool'
    if not any(message.role == 'user' for message in messages):
        yield 'messages: none is from the user'


def _problems_of(message: ChatMessage, called: set[str]) -> Iterator[str]:
    if message.role not in ROLES:
        yield f'role {message.role!r} is not one of {", ".join(ROLES)}'
    if problem := text_problem(message.content):
        yield f'content {problem}'
    if message.role == 'user' and not message.content.strip():
        yield 'content is empty'
    if message.role != 'assistant' and message.tool_calls:
        yield 'only the assistant calls tools'
    if message.role != 'tool' and message.tool_call_id:
        yield 'tool_call_id: only for the role tool'
    if message.role == 'tool' and message.tool_call_id not in called:
        yield f'tool_call_id {message.tool_call_id!r} is that of no call before it'
    for call in message.tool_calls:
        if problem := _call_problem(call):
            yield f'tool_calls: {problem}'


def _call_problem(call: ToolCall) -> str:
    if not _NAME.fullmatch(call.name):
        return f'name {call.name!r}: 1 to 64 letters, digits, _ and - expected'
    if problem := text_problem(call.id) or text_problem(call.arguments):
        return problem
    if not call.arguments or is_object(call.arguments):
        return ''
    return 'arguments: a JSON object expected'


def _tool_problems(tools: tuple[Tool, ...], choice: str) -> Iterator[str]:
    names = [tool.name for tool in tools]
    if len(tools) > MAX_TOOLS:
        yield f'tools: more than {MAX_TOOLS}'
    for name in names:
        if not _NAME.fullmatch(name):
            yield f'tools: name {name!r}: 1 to 64 letters, digits, _ and - expected'
        if names.count(name) > 1 or name in TOOL_CHOICES:
            yield f'tools: name {name!r} is given twice, or is one of {", ".join(TOOL_CHOICES)}'
    for tool in tools:
        if problem := text_problem(tool.description) or text_problem(tool.parameters):
            yield f'tools: {tool.name}: {problem}'
        elif tool.parameters and not is_object(tool.parameters):
            yield f'tools: {tool.name}: parameters: a JSON object expected'
    if choice not in ('', 'none', *(['auto', 'required', *names] if tools else ['auto'])):
        yield (f'tool_choice: {choice[:64]!r} is neither the name of a tool, nor one of '
               f'{", ".join(TOOL_CHOICES)}' if tools else 'tool_choice: there are no tools')


def is_object(text: str) -> bool:
    """Return whether a text is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _size(query: Query) -> int:
    return (sum(len(m.content) + sum(len(c.arguments) for c in m.tool_calls)
                for m in query.messages)
            + sum(len(t.description) + len(t.parameters) for t in query.tools))
