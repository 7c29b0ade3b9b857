# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Invalid conversations and tools are refused with a reason that names them."""

from __future__ import annotations

import pytest

from mace_ros.api.chat_validation import MAX_MESSAGES, MAX_TEXT, MAX_TOOLS
from mace_ros.api.events import ChatMessage, ErrorCode, InvalidQuery, Query, Tool, ToolCall
from mace_ros.api.settings import Settings
from mace_ros.api.validation import checked_query

HI = ChatMessage('user', 'Hi')
CALL = ChatMessage('assistant', tool_calls=(ToolCall('c1', 'move', '{"to": "dock"}'),))
RESULT = ChatMessage('tool', 'Done.', tool_call_id='c1')
MOVE = Tool('move', 'Moves.', '{"type": "object"}')


@pytest.mark.parametrize('query', [
    Query(messages=(HI,)), Query(messages=(ChatMessage('system', 'Be brief.'), HI)),
    Query(messages=(HI, ChatMessage('assistant', 'Ho.'), HI)),
    Query(messages=(HI, CALL, RESULT)), Query(messages=(HI, CALL, RESULT), tools=(MOVE,)),
    Query('Hi', tools=(MOVE,), tool_choice='required'),
    Query('Hi', tools=(MOVE, Tool('stop')), tool_choice='stop'), Query('Hi', tool_choice='none'),
    Query('Hi', raw_prompt=True)])
def test_valid_conversations_are_accepted(query: Query) -> None:
    assert checked_query(query, Settings()).messages == query.messages


@pytest.mark.parametrize(('query', 'why'), [
    (Query('Hi', messages=(HI,)), 'messages: they are the whole conversation, so text'),
    (Query(messages=(HI,), system='Be brief.'), 'so system must be empty'),
    (Query(messages=(HI,), conversation_id='c'), 'so conversation_id must be empty'),
    (Query(messages=(ChatMessage('robot', 'Hi'),)), r"messages\[0\]: role 'robot'"),
    (Query(messages=(ChatMessage('user', ' '),)), r'messages\[0\]: content is empty'),
    (Query(messages=(ChatMessage('user', 'x' * (MAX_TEXT + 1)),)), 'content longer'),
    (Query(messages=(ChatMessage('user', '\ud800'),)), 'content is not valid Unicode'),
    (Query(messages=(HI,) * (MAX_MESSAGES + 1)), 'messages: more than'),
    (Query(messages=(ChatMessage('user', 'x' * MAX_TEXT),) * 17), 'messages: longer'),
    (Query(messages=(HI, ChatMessage('assistant', 'Ho.'))), 'messages: the last one'),
    (Query(messages=(CALL, RESULT)), 'messages: none is from the user'),
    (Query(messages=(HI, RESULT)), r"messages\[1\]: tool_call_id 'c1'"),
    (Query(messages=(ChatMessage('user', 'Hi', CALL.tool_calls),)), 'only the assistant'),
    (Query(messages=(HI, ChatMessage('assistant', '', (ToolCall('c', 'move', '[1]'),)), HI)),
     'arguments: a JSON object'),
    (Query(messages=(HI, ChatMessage('assistant', '', (ToolCall('c', 'a b', ''),)), HI)),
     "tool_calls: name 'a b'"),
    (Query('Hi', tools=(Tool('a b'),)), "tools: name 'a b'"),
    (Query('Hi', tools=(MOVE, MOVE)), "tools: name 'move' is given twice"),
    (Query('Hi', tools=(Tool('auto'),)), "tools: name 'auto'"),
    (Query('Hi', tools=tuple(Tool(f't{i}') for i in range(MAX_TOOLS + 1))), 'tools: more than'),
    (Query('Hi', tools=(Tool('move', '', 'none'),)), 'tools: move: parameters: a JSON object'),
    (Query('Hi', tools=(Tool('move', '', '[' * 100_000),)), 'tools: move: '),
    (Query('Hi', tool_choice='required'), 'tool_choice: there are no tools'),
    (Query('Hi', tools=(MOVE,), tool_choice='stop'), "tool_choice: 'stop'"),
    (Query('Hi', raw_prompt=True, tools=(MOVE,)), 'raw_prompt: .* tools must be empty')])
def test_invalid_conversations_are_refused_with_a_reason(query: Query, why: str) -> None:
    with pytest.raises(InvalidQuery, match=why) as refused:
        checked_query(query, Settings())
    assert refused.value.code is ErrorCode.INVALID_PARAMETER


def test_neither_text_nor_messages_is_an_empty_query() -> None:
    with pytest.raises(InvalidQuery) as refused:
        checked_query(Query(tools=(MOVE,)), Settings())
    assert refused.value.code is ErrorCode.EMPTY_TEXT
