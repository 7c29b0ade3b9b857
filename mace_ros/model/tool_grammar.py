# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The grammar of an answer that must call a tool, in the convention of the chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
from typing import Any

from mace_ros.api.events import Tool
from mace_ros.model.constraints import JSON_OPTIONS
from mace_ros.model.tool_calls import NO_PARAMETERS, ToolFormat


def call_grammar(format_: ToolFormat, tools: Sequence[Tool], markers: Mapping[int, str]) -> str:
    """
    Return a Lark grammar, as llguidance takes it, of one call of any of these tools.

    ``markers`` are the markers of calls that are special tokens, by their ids.
    """
    ids = {text: token for token, text in markers.items()}

    def marker(text: str) -> str:
        return f'<[{ids[text]}]>' if text in ids else json.dumps(text)

    begin, calls, end = '', [], ''
    if format_ is ToolFormat.HERMES:
        begin, end = f'{marker("<tool_call>")} "\\n" ', f' "\\n" {marker("</tool_call>")}'
    elif format_ is ToolFormat.MISTRAL:
        named = '[ARGS]' in ids
        begin, end = marker('[TOOL_CALLS]') + ('' if named else ' "["'), '' if named else ' "]"'
        begin += ' '
    for tool in tools:
        schema = json.loads(tool.parameters or NO_PARAMETERS)
        if format_ is ToolFormat.MISTRAL and '[ARGS]' in ids:
            calls.append(f'{json.dumps(tool.name)} {marker("[ARGS]")} {_json(schema)}')
        else:
            key = 'parameters' if format_ is ToolFormat.JSON else 'arguments'
            calls.append(_json(_call(tool.name, key, schema)))
    rules = [f'call_{i}: {call}' for i, call in enumerate(calls)]
    any_call = ' | '.join(f'call_{i}' for i in range(len(calls)))
    return '\n'.join([f'start: {begin}call{end}', f'call: {any_call}', *rules])


def _call(name: str, key: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a call; what the arguments refer to stays at the root."""
    shared: dict[str, Any] = {
        each: schema[each] for each in ('$defs', 'definitions') if each in schema}
    own = {each: value for each, value in schema.items() if each not in shared}
    if 'properties' in own:     # a small model might never stop inventing others
        own.setdefault('additionalProperties', False)
    return {'type': 'object', 'properties': {'name': {'const': name}, key: own},
            'required': ['name', key], 'additionalProperties': False, **shared}


def _json(schema: dict[str, Any]) -> str:
    return f'%json {json.dumps({**schema, "x-guidance": JSON_OPTIONS})}'
