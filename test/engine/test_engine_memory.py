# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Serving with little memory: the answers are the same, and every request ends."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from support.robot import Robot, robot_with

from mace_ros.api.events import (
    ErrorCode,
    FinishReason,
    Query,
    Response,
    ResponseChunk,
)
from mace_ros.api.settings import InvalidSetting, Settings
from mace_ros.engine.builder import build_engine

PROMPT = 'Tell me about number {}, and what it is good for.'


@pytest.fixture(scope='module')
def settings(tiny_settings: Settings) -> Settings:
    """Return settings without learning."""
    return tiny_settings.updated({'finetune.budget': 0.0})


def answers(robot: Robot, count: int, **values: object) -> dict[str, str]:
    """Ask several queries at once; return each text, which its chunks must add up to."""
    queries = [Query(PROMPT.format(n), id=str(n), seed=n, **values) for n in range(count)]  # type: ignore[arg-type]
    for query in queries:
        robot.engine.submit(query)
    texts: dict[str, str] = {}
    for number in map(str, range(count)):
        event = robot.answer(number)
        assert event.finish_reason in (FinishReason.STOP, FinishReason.LENGTH), event
        pieces = robot.tokens(event.query_id)
        assert [p.index for p in pieces] == list(range(len(pieces)))
        assert ''.join(p.text for p in pieces) == event.text
        texts[event.query_id] = event.text
    return texts


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_too_little_memory_changes_no_answer(
        settings: Settings, tmp_path: Path, temperature: float) -> None:
    """With a quarter of the blocks, all queries end by preemption, with the same answers."""
    with robot_with(settings, tmp_path / 'a', memory__kv_cache_tokens=16384) as roomy:
        expected = answers(roomy, 8, max_tokens=100, temperature=temperature)
        assert roomy.engine.status().preemptions == 0
    with robot_with(settings, tmp_path / 'b', memory__kv_cache_tokens=304) as tight:
        assert answers(tight, 8, max_tokens=100, temperature=temperature) == expected
        assert tight.engine.status().preemptions > 0


def test_a_query_that_cannot_fit_is_rejected_by_name(settings: Settings, tmp_path: Path) -> None:
    """The answer gets the tokens that the prompt leaves; without any, the query is rejected."""
    with robot_with(settings, tmp_path, memory__kv_cache_tokens=256) as small:
        refused = small.ask('word ' * 300)
        assert refused.error_code is ErrorCode.PROMPT_TOO_LONG and '255 fit' in refused.error
        cut = small.ask('Long?', max_tokens=1000)
        assert cut.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        assert cut.prompt_tokens + cut.output_tokens <= 256


def test_preempted_requests_can_be_cancelled(settings: Settings, tmp_path: Path) -> None:
    """A preempted request ends like any other."""
    with robot_with(settings, tmp_path, memory__kv_cache_tokens=256) as tight:
        for name in 'abcd':
            tight.engine.submit(Query(PROMPT.format(name), id=name, max_tokens=120))
        while tight.engine.status().preemptions == 0:
            tight.until(lambda e: isinstance(e, ResponseChunk))
        for name in 'abcd':
            tight.engine.cancel(name)
        ended = [e for e in tight.engine.step().events if isinstance(e, Response)]
        assert len(ended) + sum(isinstance(e, Response) for e in tight.events) == 4


def test_a_smaller_budget_is_kept_while_serving_and_changes_no_answer(
        settings: Settings, tmp_path: Path) -> None:
    """Requests are preempted until it holds; after it has grown again, no limit remains."""
    with robot_with(settings, tmp_path / 'a') as roomy:
        expected = answers(roomy, 6, max_tokens=150)
    with robot_with(settings, tmp_path / 'b') as one:
        engine = one.engine
        everything, fixed = engine.free_kv_tokens, engine.status().planned_mb
        for n in range(6):
            engine.submit(Query(PROMPT.format(n), id=str(n), seed=n, max_tokens=150))
        one.until(lambda e: isinstance(e, ResponseChunk) and e.index == 60)
        used = engine.status()
        budget = fixed + 0.4 * (used.planned_mb - fixed)
        engine.update(engine.settings.updated({'memory.budget_mb': budget}))
        while len([e for e in one.events if isinstance(e, Response)]) < 6:
            one.until(lambda e: True)
            status = engine.status()
            # The budget may be below the minimum, which depends on the progress of each request.
            assert status.planned_mb <= status.budget_mb + 1e-6 or status.preemptions == 0
        assert engine.status().preemptions > used.preemptions
        assert {e.query_id: e.text for e in one.events if isinstance(e, Response)} == expected
        assert engine.free_kv_tokens < 0.2 * everything
        refused = one.ask('word ' * 1000)
        assert refused.error_code is ErrorCode.PROMPT_TOO_LONG
        engine.update(engine.settings.updated({'memory.budget_mb': 0.0}))
        assert one.ask('Hm?').text
        assert engine.free_kv_tokens == everything


def test_blocks_that_cannot_be_moved_are_computed_again(
        settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moving blocks may fail for lack of memory; the answers stay the same."""
    with robot_with(settings, tmp_path / 'a') as roomy:
        expected = answers(roomy, 6, max_tokens=150)
    with robot_with(settings, tmp_path / 'b') as one:
        engine, move, failed = one.engine, one.engine.model.move_blocks, []

        def fail_once(moved: dict[int, int]) -> None:
            if not failed:
                failed.append(moved)
                raise MemoryError('injected')
            move(moved)

        monkeypatch.setattr(engine.model, 'move_blocks', fail_once)
        fixed = engine.status().planned_mb
        for n in range(6):
            engine.submit(Query(PROMPT.format(n), id=str(n), seed=n, max_tokens=150))
        one.until(lambda e: isinstance(e, ResponseChunk) and e.index == 60)
        budget = fixed + 0.4 * (engine.status().planned_mb - fixed)
        engine.update(engine.settings.updated({'memory.budget_mb': budget}))
        assert {str(n): one.answer(str(n)).text for n in range(6)} == expected
        assert failed
        engine.update(engine.settings.updated({'memory.budget_mb': 0.0}))
        engine.step()


def test_a_budget_below_the_minimum_is_raised_to_it(settings: Settings, tmp_path: Path) -> None:
    """No request waits for memory that never becomes free."""
    with robot_with(settings, tmp_path) as one:
        engine = one.engine
        engine.submit(Query('Long?', id='long', max_tokens=100))
        one.until(lambda e: isinstance(e, ResponseChunk) and e.index == 5)
        engine.update(engine.settings.updated({'memory.budget_mb': 0.001}))
        assert one.answer('long').output_tokens > 5
        assert one.ask('Hm?').text
        assert engine.status().budget_mb > 0.001
        engine.update(engine.settings.updated({'memory.budget_mb': 0.0}))
        engine.step()


def test_a_long_answer_ends_when_the_memory_is_full(settings: Settings, tmp_path: Path) -> None:
    """A request whose tokens fill the rest of the budget ends with LENGTH."""
    with robot_with(settings, tmp_path) as one:
        engine = one.engine
        fixed = engine.status().planned_mb
        engine.submit(Query('Long?', id='long', max_tokens=2000))
        one.until(lambda e: isinstance(e, ResponseChunk) and e.index == 400)
        half = fixed + 0.5 * (engine.status().planned_mb - fixed)
        engine.update(engine.settings.updated({'memory.budget_mb': half}))
        ended = one.response('long')
        assert ended.finish_reason is FinishReason.LENGTH and 400 <= ended.output_tokens < 500
        engine.update(engine.settings.updated({'memory.budget_mb': 0.0}))
        engine.step()


def test_a_budget_too_small_to_serve_is_refused_by_name(
        settings: Settings, tmp_path: Path) -> None:
    """The error names the parameter and the memory needed."""
    with pytest.raises(InvalidSetting, match=r'memory\.budget_mb: 1 MB .* are needed'):
        build_engine(settings.updated({'memory.budget_mb': 1.0}), storage=tmp_path)


def test_the_engine_returns_memory_near_its_budget(
        settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    returned = []
    with robot_with(settings, tmp_path) as one:
        monkeypatch.setattr('mace_ros.model.heap.CHECK_S', 0.0)
        monkeypatch.setattr(
            'mace_ros.model.heap.return_free_memory', lambda: returned.append(1))
        one.ask('Who are you?')
        assert not returned
        monkeypatch.setattr('mace_ros.model.heap.private_bytes', lambda: math.inf)
        one.ask('Where are you?')
        assert returned
