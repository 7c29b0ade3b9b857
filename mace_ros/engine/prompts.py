# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The prompt of a query: the node's conversation, the client's messages, or a raw text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mace_ros.api.events import ChatMessage, ErrorCode, InvalidQuery, Query
from mace_ros.engine.conversations import Conversation, Turn
from mace_ros.model.chat import ChatTokenizer, Message, TemplateRefusal
from mace_ros.model.tool_calls import Tools


@dataclass(frozen=True)
class Prompt:
    """A prompt as messages and tools, and as the token ids that the chat template makes of them."""

    messages: tuple[Message, ...]
    tools: Tools
    ids: list[int]


def build_prompt(query: Query, conversation: Conversation, chat: ChatTokenizer,
                 default_system: str, max_length: int) -> Prompt:
    """
    Return the prompt of a validated query, shorter than ``max_length`` tokens.

    The oldest turns of a conversation that the node keeps are dropped until the prompt fits.
    Raises :class:`InvalidQuery` if it does not, or if the chat template refuses it.
    """
    tools = () if query.tool_choice == 'none' else tuple(map(asdict, query.tools))
    system = query.system or conversation.system or default_system
    turns = list(conversation.turns)
    while True:
        if query.messages:
            messages = _given(query.messages, system)
        elif query.raw_prompt:
            messages = ({'role': 'user', 'content': query.text, 'raw': True},)
        else:
            messages = _turns(system, turns, query)
        ids = _ids(messages, tools, chat)
        if len(ids) < max_length:
            return Prompt(messages, tools, ids)
        if not turns:
            raise InvalidQuery(
                ErrorCode.PROMPT_TOO_LONG,
                f'the prompt has {len(ids)} tokens, and at most {max(max_length - 1, 0)} fit '
                'beside one token of an answer (model, memory.kv_cache_tokens, memory.budget_mb)')
        turns.pop(0)


def _ids(messages: tuple[Message, ...], tools: Tools, chat: ChatTokenizer) -> list[int]:
    try:
        return chat.prompt(messages, tools)
    except TemplateRefusal as error:
        raise InvalidQuery(ErrorCode.INVALID_PARAMETER, str(error)) from error


def _turns(system: str, turns: list[Turn], query: Query) -> tuple[Message, ...]:
    """Return the messages of a conversation that the node keeps."""
    return (*_system(system),
            *(m for t in turns for m in ({'role': 'user', 'content': t.question},
                                         {'role': 'assistant', 'content': t.answer})),
            {'role': 'user', 'content': query.text})


def _given(messages: tuple[ChatMessage, ...], system: str) -> tuple[Message, ...]:
    """Return the messages of the client, after the default system prompt if they have none."""
    has_system = any(message.role == 'system' for message in messages)
    return (*(() if has_system else _system(system)), *map(_message, messages))


def _system(system: str) -> tuple[Message, ...]:
    return ({'role': 'system', 'content': system},) if system else ()


def _message(message: ChatMessage) -> Message:
    made: dict[str, Any] = {'role': message.role, 'content': message.content}
    if message.tool_calls:
        made['tool_calls'] = [asdict(call) for call in message.tool_calls]
    if message.tool_call_id:
        made['tool_call_id'] = message.tool_call_id
    return made
