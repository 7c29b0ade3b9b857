# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Tool calls are read in the convention of each family of chat templates."""

from __future__ import annotations

import json

from hypothesis import given, strategies
import pytest

from mace_ros.model.tool_calls import format_of, ToolCallParser, ToolFormat

NAMES = {'move', 'stop'}
MOVE = ('move', {'to': 'the dock', 'speed': 0.5})


def read(format_: ToolFormat, text: str) -> tuple[str, list[tuple[str, object]]]:
    content, calls = ToolCallParser(format_, NAMES).split(text)
    assert len({call.id for call in calls}) == len(calls)
    assert all(len(call.id) == 9 and call.id.isalnum() for call in calls)     # Mistral's rule
    return content, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize(('format_', 'text', 'content', 'calls'), [
    (ToolFormat.HERMES, '<tool_call>\n{"name": "move", "arguments": {"to": "the dock", '
     '"speed": 0.5}}\n</tool_call>', '', [MOVE]),
    (ToolFormat.HERMES, 'I go. \n<tool_call>{"name": "stop", "arguments": {}}</tool_call>\n'
     '<tool_call>{"name": "move", "arguments": {"to": "the dock", "speed": 0.5}}</tool_call>',
     'I go.', [('stop', {}), MOVE]),
    (ToolFormat.HERMES, '<tool_call>{"name": "stop", "arguments": "{}"}', '', [('stop', {})]),
    (ToolFormat.MISTRAL, '[TOOL_CALLS] [{"name": "move", "arguments": {"to": "the dock", '
     '"speed": 0.5}}, {"name": "stop", "arguments": {}}]', '', [MOVE, ('stop', {})]),
    (ToolFormat.MISTRAL, 'Yes.[TOOL_CALLS]move[ARGS]{"to": "the dock", "speed": 0.5}'
     '[TOOL_CALLS]stop[ARGS]{}', 'Yes.', [MOVE, ('stop', {})]),
    (ToolFormat.JSON, '{"name": "move", "parameters": {"to": "the dock", "speed": 0.5}}',
     '', [MOVE]),
    (ToolFormat.JSON, '<|python_tag|>{"name": "stop", "parameters": {}}; '
     '{"name": "move", "parameters": {"to": "the dock", "speed": 0.5}}', '',
     [('stop', {}), MOVE])])
def test_calls_are_read(format_: ToolFormat, text: str, content: str,
                        calls: list[tuple[str, object]]) -> None:
    assert read(format_, text) == (content, calls)


@pytest.mark.parametrize(('format_', 'text'), [
    (ToolFormat.HERMES, 'Hello.'), (ToolFormat.HERMES, '<tool_call>{"name": "move"'),
    (ToolFormat.HERMES, '<tool_call>{"name": "fly", "arguments": {}}</tool_call>'),
    (ToolFormat.HERMES, '<tool_call>{"name": "move", "arguments": [1]}</tool_call>'),
    (ToolFormat.HERMES, '<tool_call>{"name": "move", "arguments": {"to": NaN}}</tool_call>'),
    (ToolFormat.HERMES, '<tool_call>' + '{"name":' * 100_000),
    (ToolFormat.HERMES, '<tool_call></tool_call>'),
    (ToolFormat.MISTRAL, '{"name": "move", "arguments": {}}'), (ToolFormat.MISTRAL, '[TOOL_CALLS]'),
    (ToolFormat.JSON, '{"name": "Rover", "parameters": {}}'), (ToolFormat.JSON, '{"to": "dock"}'),
    (ToolFormat.JSON, 'Like this: {"name": "move", "parameters": {}}')])
def test_what_is_no_call_of_a_known_tool_remains_text(format_: ToolFormat, text: str) -> None:
    assert read(format_, text) == (text, [])


@pytest.mark.parametrize(('template', 'expected'), [
    ('... <tool_call>\n{"name": ...', ToolFormat.HERMES), ('[TOOL_CALLS]', ToolFormat.MISTRAL),
    ('Respond in the format {"name": ..., "parameters": ...}', ToolFormat.JSON)])
def test_the_convention_is_that_of_the_template(template: str, expected: ToolFormat) -> None:
    assert format_of(template) is expected


PIECES = strategies.lists(strategies.sampled_from([
    'Hi', ' ', '\n', '<', '<tool', '<tool_call>', '</tool_call>', '[TOOL_CALLS]', '[', '{', '}',
    '{"name": "move", "arguments": {}}', '<|python_tag|>', 'move[ARGS]{}', ';']), max_size=12)


@given(PIECES, strategies.sampled_from(ToolFormat))
def test_what_was_shown_while_streaming_begins_the_content(
        pieces: list[str], format_: ToolFormat) -> None:
    parser, text, shown = ToolCallParser(format_, NAMES), '', ''
    for piece in pieces:
        text += piece
        now = text[:parser.visible(text)]
        assert now.startswith(shown)
        shown = now
    assert parser.split(text)[0].startswith(shown)
