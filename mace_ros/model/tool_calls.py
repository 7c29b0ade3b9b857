# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
How chat templates let a model write tool calls, and how to read them.

Hermes and Qwen write ``<tool_call>{json}</tool_call>``, Mistral ``[TOOL_CALLS][{json}]`` or
``[TOOL_CALLS]name[ARGS]{json}``, and Llama a JSON object by itself. What is not a call of a known
tool remains text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
import json
import re
from typing import Any, TypeAlias
import uuid

from mace_ros.api.events import ToolCall

# Tools as a record keeps them: name, description and parameters, the JSON schema as text.
Tools: TypeAlias = Sequence[Mapping[str, str]]
# The schema of a tool without parameters.
NO_PARAMETERS = '{"type": "object", "properties": {}}'


class ToolFormat(Enum):
    """How the calls of a chat template begin; JSON is an object by itself."""

    HERMES = '<tool_call>'
    MISTRAL = '[TOOL_CALLS]'
    JSON = '<|python_tag|>'     # written before it by some models, left out by others


# Markers that some tokenizers have as special tokens, which decoding leaves out.
MARKERS = (*(each.value for each in ToolFormat), '</tool_call>', '[ARGS]', '[CALL_ID]')

_BLOCK = re.compile(r'<tool_call>(.*?)(?:</tool_call>|\Z)', re.DOTALL)
_NAMED = re.compile(r'([A-Za-z0-9_-]{1,64})\s*(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(?=\{)')
_BETWEEN = re.compile(r'(?:[\s,;]|\[TOOL_CALLS\]|<\|python_tag\|>)*')


def format_of(template: str) -> ToolFormat:
    """Return how a chat template, given by its source, writes tool calls."""
    for each in (ToolFormat.HERMES, ToolFormat.MISTRAL):
        if each.value in template:
            return each
    return ToolFormat.JSON


@dataclass(frozen=True)
class ToolCallParser:
    """Reads the calls of tools of these ``names`` from an answer."""

    format: ToolFormat
    names: Collection[str]

    def visible(self, text: str) -> int:
        """Return how many characters of an unfinished answer can't be part of a call."""
        marker = self.format.value
        if self.format is ToolFormat.JSON and text.lstrip()[:1] in ('', '{'):
            return 0
        begin = text.find(marker)
        if begin < 0:
            begin = next((len(text) - n for n in range(min(len(marker) - 1, len(text)), 0, -1)
                          if text.endswith(marker[:n])), len(text))
        return len(text[:begin].rstrip())

    def split(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """Return the text of an answer without its calls, and the calls."""
        calls: list[ToolCall] = []
        if self.format is ToolFormat.HERMES:
            def take(block: re.Match[str]) -> str:
                found = self._calls(block[1])
                calls.extend(found)
                return '' if found else block[0]

            rest = _BLOCK.sub(take, text)
        else:
            begin = text.find(self.format.value)
            if begin < 0:
                alone = self.format is ToolFormat.JSON and text.lstrip().startswith('{')
                begin = 0 if alone else len(text)
            calls = self._calls(text[begin:])
            rest = text[:begin]
        return (rest.rstrip(), tuple(calls)) if calls else (text, ())

    def _calls(self, text: str) -> list[ToolCall]:
        """Return the calls that a text consists of; none if it is anything else."""
        try:
            return [ToolCall(uuid.uuid4().hex[:9], *call) for call in self._read(text)]
        except (ValueError, RecursionError):
            return []

    def _read(self, text: str) -> Iterator[tuple[str, str]]:
        """Yield name and arguments of each call; raise ``ValueError``."""
        decoder = json.JSONDecoder(parse_constant=_refuse)
        position = _skip(text, 0)
        while position < len(text):
            named = _NAMED.match(text, position)
            value, end = decoder.raw_decode(text, named.end() if named else position)
            if named:
                value = {'name': named[1], 'arguments': value}
            for each in value if isinstance(value, list) else [value]:
                yield self._call(each)
            position = _skip(text, end)

    def _call(self, value: Any) -> tuple[str, str]:
        if not isinstance(value, dict) or value.get('name') not in self.names:
            raise ValueError('no call of a known tool')
        arguments = value.get('arguments', value.get('parameters', {}))
        if isinstance(arguments, str):      # some models write JSON within JSON
            arguments = json.loads(arguments, parse_constant=_refuse)
        if not isinstance(arguments, dict):
            raise ValueError('the arguments are no object')
        return value['name'], json.dumps(arguments, ensure_ascii=False)


def _skip(text: str, position: int) -> int:
    """Return the position after what may stand before and between calls."""
    found = _BETWEEN.match(text, position)
    return found.end() if found else position


def _refuse(constant: str) -> None:
    raise ValueError(f'{constant} is no JSON')


def for_template(tools: Tools) -> list[dict[str, Any]]:
    """Return tools as chat templates take them."""
    return [{'type': 'function', 'function': {
        'name': tool['name'], 'description': tool['description'],
        'parameters': json.loads(tool['parameters'] or NO_PARAMETERS),
    }} for tool in tools]
