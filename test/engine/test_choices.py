# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Several answers to one query."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.robot import Robot, robot_with, SYSTEM

from mace_ros.api.events import (
    Correction,
    CorrectionState,
    CorrectionStatus,
    ErrorCode,
    FinishReason,
    Query,
    Response,
    ResponseFormat,
)
from mace_ros.api.settings import Settings

HOT = {'temperature': 1.0, 'seed': 40, 'max_tokens': 10, 'system': SYSTEM}


def test_choices_are_the_answers_of_consecutive_seeds(robot: Robot) -> None:
    single = [robot.ask('Sing.', **{**HOT, 'seed': 40 + i}) for i in range(4)]
    robot.events.clear()
    response = robot.ask('Sing.', id='a', n=4, **HOT)
    assert [c.text for c in response.choices] == [r.text for r in single]
    assert [c.index for c in response.choices] == [0, 1, 2, 3]
    assert [c.finish_reason for c in response.choices] == [r.finish_reason for r in single]
    assert [c.output_tokens for c in response.choices] == [r.output_tokens for r in single]
    assert (response.text, response.finish_reason) == (single[0].text, single[0].finish_reason)
    assert response.prompt_tokens == single[0].prompt_tokens
    assert response.output_tokens == sum(r.output_tokens for r in single)
    assert len([e for e in robot.events if isinstance(e, Response)]) == 1
    assert single[0].choices == ()


def test_the_stream_of_all_choices_ends_once(robot: Robot) -> None:
    response = robot.ask('Sing.', id='a', n=3, logprobs=1, **HOT)
    chunks = robot.tokens('a')
    assert [c.index for c in chunks] == list(range(len(chunks)))
    assert [c.last for c in chunks] == [False] * (len(chunks) - 1) + [True]
    for choice in response.choices:
        own = [c for c in chunks if c.choice == choice.index]
        assert ''.join(c.text for c in own) == choice.text
        assert tuple(p for c in own for p in c.logprobs) == choice.logprobs
    assert response.logprobs == response.choices[0].logprobs


def test_the_prompt_is_computed_once(robot: Robot) -> None:
    before = robot.engine.status()
    response = robot.ask('Sing.', n=5, **HOT)
    after = robot.engine.status()
    prefilled = after.statistics.prefill_tokens - before.statistics.prefill_tokens
    # Each of the others computes less than a block of the prompt.
    assert prefilled < response.prompt_tokens + 4 * 16
    assert after.shared_tokens - before.shared_tokens > 3 * response.prompt_tokens


def test_all_choices_are_cancelled_together(robot: Robot) -> None:
    for tokens_first in (0, 2, 6):
        robot.events.clear()
        robot.engine.submit(Query('Sing.', id='a', n=3, **{**HOT, 'max_tokens': 500}))
        for _ in range(tokens_first):
            robot.events += robot.engine.step().events
        robot.engine.cancel('a')
        response = robot.response('a')
        assert response.finish_reason is FinishReason.CANCELLED
        assert [c.finish_reason for c in response.choices] == [FinishReason.CANCELLED] * 3
        assert [c.last for c in robot.tokens('a')].count(True) == 1
        assert len(robot.engine.requests) == 0
        assert robot.ask('Hi', id='a', max_tokens=1).finish_reason is FinishReason.LENGTH


def test_an_id_is_taken_until_all_choices_have_ended(robot: Robot) -> None:
    robot.engine.submit(Query('Sing.', id='a', n=2, **{**HOT, 'max_tokens': 30}))
    robot.until(lambda e: getattr(e, 'choice', 0) == 1)
    robot.engine.submit(Query('Hi', id='a'))
    assert robot.response('a').error_code is ErrorCode.DUPLICATE_ID
    assert len(robot.response('a').choices) == 2


def test_the_first_choice_is_the_one_on_record(robot: Robot) -> None:
    first = robot.ask('Sing.', id='a', n=3, conversation_id='c', **HOT)
    assert robot.engine.requests is not None
    robot.engine.correct(Correction('La la.', id='k', query_id='a'))
    status = robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == 'k')
    assert isinstance(status, CorrectionStatus)
    assert status.state is CorrectionState.ACCEPTED
    assert first.text == first.choices[0].text


def test_choices_follow_their_format_each(robot: Robot) -> None:
    response = robot.ask('Go.', n=8, response_format=ResponseFormat.REGEX,
                         response_schema='(left|right) [0-9]{3}', **HOT)
    texts = [c.text for c in response.choices]
    assert all(text.split()[0] in ('left', 'right') and len(text.split()[1]) == 3
               for text in texts)
    assert len(set(texts)) > 2


@pytest.mark.parametrize('values', [
    {'memory__prefix_sharing': False}, {'scheduler__max_requests': 1},
    {'memory__kv_cache_tokens': 256}])
def test_choices_are_answered_whatever_the_limits(
        settings: Settings, tmp_path: Path, values: dict[str, object]) -> None:
    with robot_with(settings, tmp_path, **values) as robot:
        response = robot.ask('Sing.', n=3, temperature=1.0, seed=1, max_tokens=20)
        assert [c.output_tokens > 0 for c in response.choices] == [True] * 3
        assert response.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


def test_a_query_without_tokens_and_one_too_long_have_choices_too(robot: Robot) -> None:
    empty = robot.ask('Sing.', n=2, max_tokens=0)
    assert [c.finish_reason for c in empty.choices] == [FinishReason.LENGTH] * 2
    refused = robot.ask('a b ' * 9000, n=2)
    assert (refused.error_code, refused.choices) == (ErrorCode.PROMPT_TOO_LONG, ())


@pytest.mark.parametrize(('values', 'field'), [
    ({'n': 0}, 'n'), ({'n': 17}, 'n'), ({'top_k': -2}, 'top_k'), ({'top_k': 1001}, 'top_k'),
    ({'min_p': 1.5}, 'min_p'), ({'min_p': float('nan')}, 'min_p'),
    ({'repetition_penalty': 0.0}, 'repetition_penalty'),
    ({'frequency_penalty': 2.5}, 'frequency_penalty'),
    ({'presence_penalty': float('inf')}, 'presence_penalty'), ({'logprobs': 22}, 'logprobs'),
    ({'logit_bias_tokens': (1,)}, 'logit_bias_tokens'),
    ({'logit_bias_tokens': (1, 1), 'logit_bias_values': (0.0, 1.0)}, 'logit_bias_tokens'),
    ({'logit_bias_tokens': (8192,), 'logit_bias_values': (0.0,)}, 'logit_bias_tokens'),
    ({'logit_bias_tokens': (-1,), 'logit_bias_values': (0.0,)}, 'logit_bias_tokens'),
    ({'logit_bias_tokens': (1,), 'logit_bias_values': (101.0,)}, 'logit_bias_values'),
    ({'logit_bias_tokens': tuple(range(301)), 'logit_bias_values': (0.0,) * 301},
     'logit_bias_tokens')], ids=str)
def test_what_is_out_of_range_is_rejected_by_name(
        robot: Robot, values: dict[str, object], field: str) -> None:
    response = robot.ask('Sing.', **values)
    assert response.error_code is ErrorCode.INVALID_PARAMETER
    assert response.error.startswith(f'{field}: ')


def test_defaults_of_sampling_are_settings(settings: Settings, tmp_path: Path) -> None:
    with robot_with(settings, tmp_path, generation__top_k=1) as robot:
        greedy = robot.ask('Sing.', max_tokens=8)
        assert robot.ask('Sing.', temperature=1.0, max_tokens=8).text == greedy.text
        assert robot.ask('Sing.', temperature=1.0, top_k=0, seed=1, max_tokens=8
                         ).text != greedy.text
        robot.engine.update(robot.engine.settings.updated({'generation.repetition_penalty': 0.1}))
        assert robot.ask('Sing.', max_tokens=8).text != greedy.text
        assert robot.ask('Sing.', max_tokens=8, repetition_penalty=1.0).text == greedy.text
