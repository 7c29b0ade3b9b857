# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The engine with little memory: the same answers, found again, and nobody left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_engine import Robot

from mace_ros.engine import Engine
from mace_ros.events import ErrorCode, Finished, FinishReason, Query, Token
from mace_ros.settings import Settings

PROMPT = 'Tell me about number {}, and what it is good for.'
SYSTEM = 'You are a robot in a garden. ' + 'Water the plants in the evening. ' * 12


@pytest.fixture(scope='module')
def settings(model_folder: Path) -> Settings:
    """Return settings for the tiny model, without learning."""
    return Settings().updated({
        'model.source': str(model_folder), 'model.device': 'cpu', 'model.threads': 1,
        'model.weight_dtype': 'float32', 'finetune.budget': 0.0})


@contextmanager
def robot(settings: Settings, folder: Path, **values: object) -> Iterator[Robot]:
    """Return an engine with other settings; afterwards every KV block must be free."""
    engine = Engine(settings.updated({
        name.replace('__', '.'): value for name, value in values.items()}), storage=folder)
    everything = engine.free_kv_tokens
    yield Robot(engine)
    engine.step()     # checks all blocks when it has become idle
    assert engine.free_kv_tokens == everything
    engine.close()


def answer(robot: Robot, query_id: str) -> Finished:
    """Return the answer to a query, which may have ended before."""
    return next((e for e in robot.events if isinstance(e, Finished) and e.query_id == query_id),
                None) or robot.response(query_id)


def answers(robot: Robot, count: int, **values: object) -> dict[str, str]:
    """Ask several at once, and return the text of each answer; it must have streamed once."""
    queries = [Query(PROMPT.format(n), id=str(n), seed=n, **values) for n in range(count)]  # type: ignore[arg-type]
    for query in queries:
        robot.engine.submit(query)
    texts: dict[str, str] = {}
    for number in map(str, range(count)):
        event = answer(robot, number)
        assert event.finish_reason in (FinishReason.STOP, FinishReason.LENGTH), event
        pieces = robot.tokens(event.query_id)
        assert [p.index for p in pieces] == list(range(len(pieces)))
        assert ''.join(p.text for p in pieces) == event.text
        texts[event.query_id] = event.text
    return texts


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_too_little_memory_changes_no_answer(
        settings: Settings, tmp_path: Path, temperature: float) -> None:
    """With a quarter of what the answers may come to, all end, as with plenty, by preemption."""
    with robot(settings, tmp_path / 'a', memory__kv_cache_tokens=16384) as roomy:
        expected = answers(roomy, 8, max_tokens=100, temperature=temperature)
        assert roomy.engine.status().preemptions == 0
    with robot(settings, tmp_path / 'b', memory__kv_cache_tokens=304) as tight:
        assert answers(tight, 8, max_tokens=100, temperature=temperature) == expected
        assert tight.engine.status().preemptions > 0


def test_a_query_that_cannot_fit_is_rejected_by_name(settings: Settings, tmp_path: Path) -> None:
    """The answer gets what the prompt leaves; a prompt that leaves nothing is refused."""
    with robot(settings, tmp_path, memory__kv_cache_tokens=256) as small:
        refused = small.ask('word ' * 300)
        assert refused.error_code is ErrorCode.PROMPT_TOO_LONG and '255 fit' in refused.error
        cut = small.ask('Long?', max_tokens=1000)
        assert cut.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        assert cut.prompt_tokens + cut.output_tokens <= 256


def test_a_conversation_is_computed_once(settings: Settings, tmp_path: Path) -> None:
    """System prompt and earlier turns are found again; without sharing they are not."""
    computed, texts = {}, {}
    for sharing in (True, False):
        with robot(settings, tmp_path / str(sharing), memory__prefix_sharing=sharing) as one:
            before = one.engine.status().statistics.prefill_tokens
            texts[sharing] = [
                one.ask(f'Question {n}?', conversation_id='c', system=SYSTEM, max_tokens=20).text
                for n in range(5)]
            status = one.engine.status()
            computed[sharing] = status.statistics.prefill_tokens - before
            assert (status.shared_tokens > 0) == sharing
    assert texts[True] == texts[False]
    assert computed[True] <= 0.3 * computed[False]


def test_sharing_ends_and_begins_while_serving(settings: Settings, tmp_path: Path) -> None:
    """The parameter is in force at the next query."""
    with robot(settings, tmp_path) as one:
        def shared() -> int:
            before = one.engine.status().shared_tokens
            one.ask('Hm?', system=SYSTEM, max_tokens=1)
            return one.engine.status().shared_tokens - before

        assert shared() == 0 and shared() > 80
        one.engine.update(one.engine.settings.updated({'memory.prefix_sharing': False}))
        assert shared() == 0 and shared() == 0
        assert one.engine.status().kv_cached == 0.0
        one.engine.update(one.engine.settings.updated({'memory.prefix_sharing': True}))
        assert shared() == 0 and shared() > 80


def test_who_is_cancelled_while_preempted_is_gone(settings: Settings, tmp_path: Path) -> None:
    """One that waits again ends like any other."""
    with robot(settings, tmp_path, memory__kv_cache_tokens=256) as tight:
        for name in 'abcd':
            tight.engine.submit(Query(PROMPT.format(name), id=name, max_tokens=120))
        while tight.engine.status().preemptions == 0:
            tight.until(lambda e: isinstance(e, Token))
        for name in 'abcd':
            tight.engine.cancel(name)
        ended = [e for e in tight.engine.step().events if isinstance(e, Finished)]
        assert len(ended) + sum(isinstance(e, Finished) for e in tight.events) == 4
