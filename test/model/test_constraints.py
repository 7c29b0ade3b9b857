# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Constraints: masks of llguidance, followed by random tokens."""

from __future__ import annotations

from collections.abc import Iterator
import json
from pathlib import Path
import random
import re
import time

import pytest
from transformers import AutoTokenizer

from mace_ros.api.events import ResponseFormat
from mace_ros.model.chat import ChatTokenizer
from mace_ros.model.constraints import (
    Constraint,
    ConstraintBroken,
    ConstraintCompiler,
    InvalidFormat,
)
from mace_ros.model.vocabulary import Vocabulary

SIZE = 8200     # logits; more than the tokenizer has tokens, as in models with padded heads
SCHEMA = json.dumps({'type': 'object', 'properties': {
    'kind': {'enum': ['go', 'stop']}, 'speed': {'type': 'integer', 'minimum': 0, 'maximum': 9}},
    'required': ['kind', 'speed'], 'additionalProperties': False})


@pytest.fixture(scope='module')
def chat(model_folder: Path) -> ChatTokenizer:
    return ChatTokenizer(AutoTokenizer.from_pretrained(model_folder))


@pytest.fixture(scope='module')
def compiler(chat: ChatTokenizer) -> ConstraintCompiler:
    return ConstraintCompiler(Vocabulary(chat.tokenizer, chat.end_tokens, SIZE))


def allowed(constraint: Constraint) -> list[int]:
    bits = int.from_bytes(constraint.mask(), 'little')
    return [i for i in range(SIZE) if bits >> i & 1]


def written(constraint: Constraint, chat: ChatTokenizer, seed: int) -> Iterator[int]:
    """Yield random allowed tokens, up to one that ends the answer."""
    choose = random.Random(seed)
    for _ in range(200):
        token = choose.choice(allowed(constraint))
        constraint.advance(token)
        if token in chat.end_tokens:
            return
        yield token
    pytest.fail('the answer does not end')


@pytest.mark.parametrize('seed', range(5))
def test_any_allowed_answer_is_of_the_schema(
        chat: ChatTokenizer, compiler: ConstraintCompiler, seed: int) -> None:
    constraint = compiler.compile(ResponseFormat.JSON_SCHEMA, SCHEMA)
    found = json.loads(chat.decode(list(written(constraint, chat, seed))))
    assert found['kind'] in ('go', 'stop')
    assert found['speed'] in range(10)


def test_a_regular_expression_and_a_grammar_are_followed(
        chat: ChatTokenizer, compiler: ConstraintCompiler) -> None:
    expression = compiler.compile(ResponseFormat.REGEX, r'(left|right) [0-9]{1,3} deg')
    assert re.fullmatch(r'(left|right) [0-9]{1,3} deg',
                        chat.decode(list(written(expression, chat, 1))))
    grammar = compiler.compile(ResponseFormat.GRAMMAR, """
        start: step ("; " step){0,3}
        step: "go " PLACE | "wait"
        PLACE: "home" | "dock"
    """)
    for step in chat.decode(list(written(grammar, chat, 2))).split('; '):
        assert step in ('go home', 'go dock', 'wait')


def test_json_is_an_object(chat: ChatTokenizer, compiler: ConstraintCompiler) -> None:
    constraint = compiler.compile(ResponseFormat.JSON, '')
    for token in chat.answer('{"a": [1, {"b": null}]}'):
        assert token in allowed(constraint)
        constraint.advance(token)
    other = compiler.compile(ResponseFormat.JSON, '')
    assert chat.tokenizer.encode('[', add_special_tokens=False)[0] not in allowed(other)


def test_a_complete_answer_allows_only_its_end(
        chat: ChatTokenizer, compiler: ConstraintCompiler) -> None:
    constraint = compiler.compile(ResponseFormat.REGEX, 'yes')
    assert not set(allowed(constraint)) & chat.end_tokens
    for _ in written(constraint.copy(), chat, 0):
        pass
    for token in chat.tokenizer.encode('yes', add_special_tokens=False):
        constraint.advance(token)
    assert set(allowed(constraint)) == chat.end_tokens
    # A copy goes its own way.
    copied = compiler.compile(ResponseFormat.REGEX, 'yes')
    assert allowed(copied) != allowed(constraint)


def test_a_token_that_is_not_allowed_is_an_error(
        chat: ChatTokenizer, compiler: ConstraintCompiler) -> None:
    constraint = compiler.compile(ResponseFormat.REGEX, 'yes')
    with pytest.raises(ConstraintBroken, match=r'token|allowed|accept'):
        constraint.advance(chat.tokenizer.encode('no', add_special_tokens=False)[0])


@pytest.mark.parametrize(('kind', 'schema', 'reason'), [
    (ResponseFormat.JSON_SCHEMA, '{"type": ', 'EOF'),
    (ResponseFormat.JSON_SCHEMA, '[1]', 'object'),
    (ResponseFormat.JSON_SCHEMA, '{"type": "robot"}', 'robot'),
    (ResponseFormat.JSON_SCHEMA, '{"$ref": "https://example.org/x"}', 'example.org'),
    (ResponseFormat.JSON_SCHEMA, '{"type": "string", "format": "mood"}', 'mood'),
    (ResponseFormat.JSON_SCHEMA, '{"type": "integer", "minimum": 5, "maximum": 2}', '.'),
    (ResponseFormat.JSON_SCHEMA, '{"not": ' * 5000 + '{}' + '}' * 5000, 'recursion'),
    (ResponseFormat.REGEX, '(', 'unclosed|parenthes'),
    (ResponseFormat.REGEX, '(?=a)b', 'look'),
    (ResponseFormat.REGEX, 'a{1000}{1000}', 'too many'),        # not with the first mask
    (ResponseFormat.JSON_SCHEMA, '{"type": "string", "pattern": "^a{1000000}$"}', 'too many'),
    (ResponseFormat.GRAMMAR, 'start: undefined', 'undefined'),
    (ResponseFormat.GRAMMAR, '%&/()', '.')])
def test_an_invalid_format_is_refused_with_the_reason(
        compiler: ConstraintCompiler, kind: ResponseFormat, schema: str, reason: str) -> None:
    with pytest.raises(InvalidFormat, match=reason) as refused:
        compiler.compile(kind, schema)
    assert '\n' not in str(refused.value)


@pytest.mark.parametrize(('kind', 'schema'), [
    (ResponseFormat.REGEX, '(a{1,900}){1,900}'),
    (ResponseFormat.REGEX, 'a{1000}{1000}'),
    (ResponseFormat.REGEX, '(a|b)*a(a|b){40}(c|d)*c(c|d){40}'),
    (ResponseFormat.GRAMMAR, 'start: a{1,30000}\n' + 'a: "x" | "y" a'),
    (ResponseFormat.JSON_SCHEMA, json.dumps({'enum': [f'{i:x}' * 4 for i in range(5000)]})),
    (ResponseFormat.JSON_SCHEMA, json.dumps({'type': 'array', 'maxItems': 100000, 'items': {
        'type': 'string', 'maxLength': 100000}}))])
def test_no_format_takes_long(compiler: ConstraintCompiler, kind: ResponseFormat,
                              schema: str) -> None:
    """A format is compiled or refused in bounded time, and so is each of its masks."""
    began = time.process_time()
    try:
        constraint = compiler.compile(kind, schema)
        for _ in range(3):
            constraint.advance(allowed(constraint)[0])
    except (InvalidFormat, ConstraintBroken):
        pass
    assert time.process_time() - began < 2.0


def test_a_long_text_that_becomes_certain_ends_the_answer(
        chat: ChatTokenizer, compiler: ConstraintCompiler) -> None:
    """One mask would compute it for a second, and each later one for some milliseconds."""
    constraint = compiler.compile(ResponseFormat.REGEX, 'b|xa{1000}{60}')
    [x] = chat.tokenizer.encode('x', add_special_tokens=False)
    constraint.advance(x)
    [forced] = allowed(constraint)
    with pytest.raises(ConstraintBroken, match='too many'):
        constraint.advance(forced)


def test_tokens_have_their_bytes(chat: ChatTokenizer, compiler: ConstraintCompiler) -> None:
    vocabulary = compiler.vocabulary
    for text in ('Hello, robot!', 'こんにちは 🤖', ' \t"x"'):
        tokens = chat.tokenizer.encode(text, add_special_tokens=False)
        found = [vocabulary.logprob(token, -1.5) for token in tokens]
        assert b''.join(f.token_bytes for f in found).decode() == text
        assert [f.token_id for f in found] == tokens
    end = vocabulary.logprob(chat.end_of_turn, -0.5)
    assert (end.token, end.token_bytes) == ('<|im_end|>', b'')
