# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Conversion of messages to plain data, and of events to messages.

Nothing is validated here: the engine rejects invalid values with a reason. Only -1, which
stands for the node's default, becomes None.
"""

from __future__ import annotations

from dataclasses import fields
from enum import IntEnum
from typing import Any, TypeVar

from builtin_interfaces.msg import Time

from mace_ros.api.events import (
    AdapterVersion,
    Cancel,
    ChatMessage,
    Choice,
    Correction,
    CorrectionStatus,
    Event,
    Logprob,
    Query,
    Response,
    ResponseChunk,
    TokenLogprobs,
    Tool,
    ToolCall,
)
import mace_ros.msg as msg

Number = TypeVar('Number', int, float)

# The message types of events, and of what events contain.
MESSAGE_TYPES: dict[type, type] = {
    Choice: msg.Choice,
    Logprob: msg.Logprob,
    TokenLogprobs: msg.TokenLogprobs,
    ToolCall: msg.ToolCall,
    ResponseChunk: msg.ResponseChunk,
    Response: msg.Response,
    CorrectionStatus: msg.CorrectionStatus,
    AdapterVersion: msg.AdapterVersion,
}


def query_from(message: msg.Query) -> Query:
    """Return the query of a message."""
    return Query(
        text=message.text,
        id=message.id,
        conversation_id=message.conversation_id,
        profile=message.profile,
        system=message.system,
        max_tokens=_default_as_none(message.max_tokens),
        temperature=_default_as_none(message.temperature),
        top_p=_default_as_none(message.top_p),
        seed=_default_as_none(message.seed),
        stop=tuple(message.stop),
        ttft_slo_ms=_default_as_none(message.ttft_slo_ms),
        tpot_slo_ms=_default_as_none(message.tpot_slo_ms),
        priority=message.priority,
        reset_conversation=message.reset_conversation,
        no_learn=message.no_learn,
        top_k=_default_as_none(message.top_k),
        min_p=_default_as_none(message.min_p),
        repetition_penalty=_default_as_none(message.repetition_penalty),
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        logit_bias_tokens=tuple(message.logit_bias_tokens),
        logit_bias_values=tuple(message.logit_bias_values),
        logprobs=message.logprobs,
        n=message.n,
        response_format=message.response_format,
        response_schema=message.response_schema,
        messages=tuple(map(_chat_message_from, message.messages)),
        tools=tuple(Tool(t.name, t.description, t.parameters) for t in message.tools),
        tool_choice=message.tool_choice,
        raw_prompt=message.raw_prompt)


def correction_from(message: msg.Correction) -> Correction:
    """Return the correction of a message."""
    return Correction(
        corrected=message.corrected,
        hint=message.hint,
        id=message.id,
        query_id=message.query_id,
        conversation_id=message.conversation_id,
        prompt=message.prompt,
        rejected=message.rejected,
        profile=message.profile,
        weight=message.weight,
        source=message.source,
        scope=message.scope)


def cancel_from(message: msg.Cancel) -> Cancel:
    """Return the cancellation of a message."""
    return Cancel(message.query_id)


def _chat_message_from(message: msg.ChatMessage) -> ChatMessage:
    return ChatMessage(
        message.role, message.content,
        tuple(ToolCall(c.id, c.name, c.arguments) for c in message.tool_calls),
        message.tool_call_id)


def message_from(event: Event, stamp: Time) -> Any:
    """Return the message of an event; its fields have the names of the event's."""
    message = _message_value(event)
    message.header.stamp = stamp
    return message


def latency_from(event: Response, stamp: Time) -> msg.Latency:
    """Return the ``Latency`` message of a response."""
    names = set(msg.Latency.get_fields_and_field_types()) - {'header'}
    message = msg.Latency(**{name: _message_value(getattr(event, name)) for name in names})
    message.header.stamp = stamp
    return message


def _default_as_none(value: Number) -> Number | None:
    return None if value == -1 else value


def _message_value(value: Any) -> Any:
    if type(value) in MESSAGE_TYPES:
        return MESSAGE_TYPES[type(value)](
            **{field.name: _message_value(getattr(value, field.name)) for field in fields(value)
               if field.name != 'origin'})
    if isinstance(value, IntEnum):
        return int(value)
    return [_message_value(item) for item in value] if isinstance(value, tuple) else value
