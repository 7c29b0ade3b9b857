# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Answers of a given form, beside free ones: valid, reproducible, and of no effect on others."""

from __future__ import annotations

import json
from pathlib import Path
import re

from jsonschema import validate
import pytest
from support.robot import Robot, robot_with

from mace_ros.api.events import (
    ErrorCode,
    FinishReason,
    Query,
    Response,
    ResponseChunk,
    ResponseFormat,
)
from mace_ros.api.settings import Settings

SCHEMA = {
    'type': 'object', 'additionalProperties': False,
    'required': ['action', 'speed', 'route', 'notes'],
    'properties': {
        'action': {'enum': ['drive', 'wait', 'dock', None]},
        'speed': {'type': 'number', 'minimum': 0, 'maximum': 2},
        'route': {'type': 'array', 'minItems': 1, 'maxItems': 3, 'items': {
            'type': 'array', 'minItems': 2, 'maxItems': 2,
            'items': {'type': 'integer', 'minimum': -99, 'maximum': 99}}},
        'notes': {'type': 'array', 'maxItems': 2, 'items': {
            'type': 'object', 'required': ['tag'], 'additionalProperties': False, 'properties': {
                'tag': {'enum': ['safe', 'slow']}, 'text': {'type': 'string', 'maxLength': 8}}}}}}
FORMED = {'response_format': ResponseFormat.JSON_SCHEMA, 'response_schema': json.dumps(SCHEMA),
          'max_tokens': 400}
FREE = [Query(f'Sing song {i}.', id=f'free{i}', max_tokens=25, seed=i, temperature=i % 3 / 2)
        for i in range(7)]


def answers(robot: Robot, queries: list[Query]) -> dict[str, Response]:
    """Submit all at once; return the responses by id."""
    for query in queries:
        robot.engine.submit(query)
    return {query.id: robot_response(robot, query.id) for query in queries}


def robot_response(robot: Robot, query_id: str) -> Response:
    known = [e for e in robot.events if isinstance(e, Response) and e.query_id == query_id]
    return known[0] if known else robot.response(query_id)


@pytest.mark.parametrize('overlaps', [False, True])
def test_fifty_hot_answers_are_json_of_a_schema(robot: Robot, overlaps: bool) -> None:
    robot.engine.runner.overlaps = overlaps
    queries = [Query(f'Where do you go on day {i}?', id=f'q{i}', temperature=1.0, seed=i, **FORMED)
               for i in range(50)]
    found = answers(robot, queries)
    for response in found.values():
        assert response.finish_reason is FinishReason.STOP, response
        validate(json.loads(response.text), SCHEMA)
    assert len({response.text for response in found.values()}) > 40


def test_free_answers_are_the_same_beside_constrained_ones(robot: Robot) -> None:
    alone = {i: r.text for i, r in answers(robot, FREE).items()}
    robot.events.clear()
    formed = [Query('Go.', id=f'formed{i}', temperature=1.0, seed=i, **FORMED) for i in range(4)]
    together = answers(robot, [*FREE, *formed])
    assert {q.id: together[q.id].text for q in FREE} == alone


def test_a_seed_reproduces_a_constrained_answer_in_any_batch(robot: Robot) -> None:
    query = Query('Go.', id='a', temperature=1.0, seed=5, top_p=0.9, top_k=40, **FORMED)
    alone = answers(robot, [query])['a']
    robot.events.clear()
    assert answers(robot, [*FREE, query])['a'].text == alone.text


def test_each_format_is_followed(robot: Robot) -> None:
    found = answers(robot, [
        Query('Go.', id='json', response_format=ResponseFormat.JSON, max_tokens=2000,
              temperature=1.0, seed=1, logit_bias_tokens=(
                  robot.engine.chat.tokenizer.encode('}', add_special_tokens=False)[0],),
              logit_bias_values=(20.0,)),
        Query('Go.', id='regex', response_format=ResponseFormat.REGEX,
              response_schema='(left|right) [0-9]{2}'),
        Query('Go.', id='grammar', response_format=ResponseFormat.GRAMMAR,
              response_schema='start: "go " ("home" | "out")')])
    assert isinstance(json.loads(found['json'].text), dict)
    assert found['regex'].text.split()[0] in ('left', 'right')
    assert found['grammar'].text in ('go home', 'go out')


def test_the_length_ends_a_constrained_answer_too(robot: Robot) -> None:
    short = {**FORMED, 'max_tokens': 3}
    assert robot.ask('Go.', **short).finish_reason is FinishReason.LENGTH


def test_chunks_of_a_constrained_answer_are_its_text(robot: Robot) -> None:
    response = robot.ask('Go.', id='a', temperature=1.0, **FORMED)
    assert ''.join(c.text for c in robot.tokens('a')) == response.text
    assert [c.last for c in robot.tokens('a')][-1]


@pytest.mark.parametrize(('values', 'reason'), [
    ({'response_format': 2, 'response_schema': '{"type": "robot"}'}, 'JSON_SCHEMA: .*robot'),
    ({'response_format': 2, 'response_schema': '{'}, 'JSON_SCHEMA: '),
    ({'response_format': 3, 'response_schema': '('}, 'REGEX: '),
    ({'response_format': 4, 'response_schema': 'start: x'}, 'GRAMMAR: '),
    ({'response_format': 2}, 'empty, and response_format JSON_SCHEMA needs it'),
    ({'response_format': 0, 'response_schema': '{}'}, 'response_format FREE has none'),
    ({'response_format': 5}, 'response_format: 5 is not between 0 and 4'),
    ({'response_format': 3, 'response_schema': 'a' * 65537}, 'longer than 65536')])
def test_an_invalid_format_is_rejected_with_the_reason(
        robot: Robot, values: dict[str, object], reason: str) -> None:
    response = robot.ask('Go.', **values)
    assert (response.finish_reason, response.error_code) == (
        FinishReason.REJECTED, ErrorCode.INVALID_PARAMETER)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(response.error)
    assert robot.ask('Go.', max_tokens=2).finish_reason is FinishReason.LENGTH


def test_a_duplicate_id_is_told_before_an_invalid_format(robot: Robot) -> None:
    robot.engine.submit(Query('Sing.', id='a', max_tokens=20))
    robot.engine.submit(Query('Go.', id='a', response_format=3, response_schema='('))
    assert robot.response('a').error_code is ErrorCode.DUPLICATE_ID
    assert robot.response('a').finish_reason is FinishReason.LENGTH


def test_a_constraint_that_becomes_too_complex_ends_its_answer_only(robot: Robot) -> None:
    hard = 'start: a{400}\na: b | b b | b b b\nb: /[a-z]/ | /[a-z]{2}/ | /[a-z]{3}/ | "" b'
    found = answers(robot, [
        Query('Go.', id='hard', response_format=4, response_schema=hard, max_tokens=60,
              temperature=1.0, seed=0), *FREE[:2]])
    assert found['hard'].finish_reason in (
        FinishReason.ERROR, FinishReason.REJECTED, FinishReason.LENGTH)
    if found['hard'].finish_reason is not FinishReason.LENGTH:
        assert found['hard'].error_code is ErrorCode.INVALID_PARAMETER
        assert found['hard'].error.startswith('response_schema: ')
    assert all(found[q.id].finish_reason is FinishReason.LENGTH for q in FREE[:2])


def test_a_preempted_answer_goes_on_in_its_format(settings: Settings, tmp_path: Path) -> None:
    """With room for a few answers only, some are computed again in the middle."""
    with robot_with(settings, tmp_path, memory__kv_cache_tokens=304) as robot:
        queries = [Query(f'Tell me about number {i}, and what it is good for.', id=f'q{i}',
                         temperature=1.0, seed=i, max_tokens=100,
                         response_format=ResponseFormat.REGEX, response_schema='[a-c ]{900}')
                   for i in range(8)]
        found = answers(robot, queries)
        assert robot.engine.status().preemptions > 0
    for response in found.values():
        assert response.finish_reason is FinishReason.LENGTH
        assert re.fullmatch('[a-c ]+', response.text), response


def test_chunks_carry_the_log_probabilities_of_all_tokens(robot: Robot) -> None:
    response = robot.ask('Sing.', id='a', logprobs=4, max_tokens=10)
    chunks = [e for e in robot.events if isinstance(e, ResponseChunk)]
    assert tuple(p for c in chunks for p in c.logprobs) == response.logprobs
    assert len(response.logprobs) == response.output_tokens == 10
    for token in response.logprobs:
        assert len(token.top) == 3
        assert token.top[0] == token.sampled     # greedy
        assert 0 > token.top[0].logprob >= token.top[1].logprob >= token.top[2].logprob
    assert b''.join(t.sampled.token_bytes for t in response.logprobs).decode(
        errors='replace').startswith(response.text)
    assert robot.ask('Sing.', max_tokens=4).logprobs == ()
