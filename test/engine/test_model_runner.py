# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Errors in the middle of an iteration end what took part in it, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from support.robot import Robot

from mace_ros.api.events import (
    AdapterVersion,
    Correction,
    CorrectionState,
    CorrectionStatus,
    ErrorCode,
    FinishReason,
    Query,
    Response,
    VersionState,
)
from mace_ros.finetune.step import FinetuneStep
from mace_ros.model.chat import TextStream
from mace_ros.scheduling.plan import Plan, State


def piggyback_everything(robot: Robot, patch: pytest.MonkeyPatch) -> None:
    """Add fine-tune tokens to each pass, as on a device where they cost nothing."""
    plan = robot.engine.scheduler.plan

    def with_finetune_tokens(state: State, now: float) -> Plan:
        made = plan(state, now)
        if state.finetune is None or not state.finetune.piggyback_tokens:
            return made
        return made._replace(finetune_tokens=state.finetune.piggyback_tokens, segments=0)

    patch.setattr(robot.engine.scheduler, 'plan', with_finetune_tokens)


def test_piggybacking_that_fails_in_a_pass_without_requests_is_retried(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    piggyback_everything(robot, monkeypatch)
    original, failures = FinetuneStep.piggyback_spans, []

    def fails_once(step: FinetuneStep, tokens: int) -> Any:
        if not failures:
            failures.append(tokens)
            raise MemoryError('injected')
        return original(step, tokens)

    monkeypatch.setattr(FinetuneStep, 'piggyback_spans', fails_once)
    robot.engine.correct(Correction('A robot.', id='k', prompt='Who are you?'))
    while not failures:
        robot.events += robot.engine.step().events
    assert 'injected' in robot.engine.status().learning_error
    robot.until(lambda e: isinstance(e, CorrectionStatus)
                and e.state is CorrectionState.LEARNED)


def test_a_stream_that_can_not_be_finished_fails_its_request_alone(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = robot.ask('Two?', max_tokens=6).text
    finish, failures = TextStream.finish, []

    def fails_once(stream: TextStream) -> str:
        if not failures:
            failures.append(stream)
            raise ValueError('injected')
        return finish(stream)

    monkeypatch.setattr(TextStream, 'finish', fails_once)
    robot.engine.submit(Query('One?', id='one', max_tokens=3))
    robot.engine.submit(Query('Two?', id='two', max_tokens=6))
    two = robot.response('two')
    [one] = [e for e in robot.events if isinstance(e, Response) and e.query_id == 'one']
    assert (one.finish_reason, one.error_code) == (FinishReason.ERROR, ErrorCode.INTERNAL)
    assert 'injected' in one.error
    assert two.text == expected
    assert robot.tokens('one')[-1].last


def test_a_commit_that_fails_ends_every_request_of_its_pass(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    end, failures = robot.engine.requests.end, []

    def fails_once(*arguments: Any) -> Any:
        if not failures:
            failures.append(arguments)
            raise RuntimeError('injected')
        return end(*arguments)

    monkeypatch.setattr(robot.engine.requests, 'end', fails_once)
    robot.engine.submit(Query('One?', id='one', max_tokens=3))
    robot.engine.submit(Query('Two?', id='two', max_tokens=6))
    robot.until(lambda e: isinstance(e, Response) and e.query_id == 'two')
    responses = {e.query_id: e for e in robot.events if isinstance(e, Response)}
    assert all('injected' in responses[i].error for i in ('one', 'two'))
    assert robot.ask('Hm?').finish_reason is not FinishReason.ERROR


def test_a_pause_runs_no_segment_of_the_plan_before_it(robot: Robot) -> None:
    """Events of a pass end its iteration before the segments, and a pause may come between."""
    robot.engine.update(robot.engine.settings.updated({
        'scheduler.max_slowdown': 1000.0, 'slo.tpot_ms': 10000.0, 'slo.ttft_ms': 10000.0}))
    robot.engine.correct(Correction('A robot.', id='k', prompt='Who are you?'))
    robot.engine.submit(Query('A long story?', id='long', max_tokens=3000))
    while not robot.engine.runner.has_segments:
        robot.events += robot.engine.step().events
    robot.events += robot.engine.pause()
    assert not robot.engine.runner.has_segments
    published = robot.until(lambda e: isinstance(e, AdapterVersion)
                            and e.state is VersionState.PUBLISHED)
    assert isinstance(published, AdapterVersion) and published.correction_ids == ('k',)
