# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A demanded call has the form that the parser of the same convention reads."""

from __future__ import annotations

import json

import pytest
from support.chat_templates import chat, HERMES, MISTRAL_TOOLS

from mace_ros.api.events import ResponseFormat, Tool
from mace_ros.model.constraints import ConstraintBroken, ConstraintCompiler
from mace_ros.model.tool_calls import ToolCallParser, ToolFormat
from mace_ros.model.tool_grammar import call_grammar
from mace_ros.model.vocabulary import Vocabulary

# Of two tools with a definition of the same name.
TOOLS = [Tool(name, '', json.dumps({
    'type': 'object', 'required': ['to'], '$defs': {'Place': {'enum': places}},
    'properties': {'to': {'$ref': '#/$defs/Place'}}}))
    for name, places in (('move', ['dock']), ('look', ['left']))]


@pytest.mark.parametrize(('template', 'format_', 'text'), [
    (HERMES, ToolFormat.HERMES, '<tool_call>\n{"name": "NAME", "arguments": {"to": "PLACE"}}\n'
                                '</tool_call>'),
    (MISTRAL_TOOLS, ToolFormat.MISTRAL, '[TOOL_CALLS][{"name": "NAME", "arguments": '
                                        '{"to": "PLACE"}}]'),
    (HERMES, ToolFormat.JSON, '{"name": "NAME", "parameters": {"to": "PLACE"}}')])
def test_only_a_call_of_a_tool_follows_the_grammar(
        template: str, format_: ToolFormat, text: str) -> None:
    tokenizer = chat(template)
    compiler = ConstraintCompiler(Vocabulary(
        tokenizer.tokenizer, tokenizer.end_tokens, len(tokenizer.tokenizer)))
    grammar = call_grammar(format_, TOOLS, tokenizer.markers)
    for name, to, follows in (('move', 'dock', True), ('look', 'left', True),
                              ('move', 'left', False), ('fly', 'dock', False)):
        answer = text.replace('NAME', name).replace('PLACE', to)
        constraint = compiler.compile(ResponseFormat.GRAMMAR, grammar)
        if not follows:
            with pytest.raises(ConstraintBroken):
                for token in tokenizer.answer(answer):
                    constraint.advance(token)
            continue
        for token in tokenizer.answer(answer):
            constraint.advance(token)
        _, [call] = ToolCallParser(format_, {'move', 'look'}).split(answer)
        assert (call.name, json.loads(call.arguments)) == (name, {'to': to})
