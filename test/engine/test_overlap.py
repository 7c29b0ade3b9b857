# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Overlap scheduling: the device runs a pass while the engine publishes the last one.

On a CPU a pass has ended when its launch returns; everything else is as on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.robot import RANDOM_MODEL
import torch

from mace_ros.api.events import (
    Correction,
    CorrectionState,
    CorrectionStatus,
    Event,
    FinishReason,
    Query,
    Response,
    ResponseChunk,
)
from mace_ros.api.settings import Settings
from mace_ros.engine.builder import build_engine
from mace_ros.engine.engine import Engine
from mace_ros.model.sampling import Sampled
from mace_ros.scheduling.plan import Plan, State

QUESTIONS = ('Who are you?', 'What is a robot?', 'Sing a song.', 'Count to ten.')


@pytest.fixture(scope='module')
def settings(tiny_settings: Settings) -> Settings:
    return tiny_settings.updated({**RANDOM_MODEL, 'memory.kv_cache_tokens': 8192})


@pytest.fixture
def engine(settings: Settings, tmp_path: Path) -> Iterator[Engine]:
    """Yield an engine that overlaps; at the end its KV cache must be empty."""
    made = build_engine(settings, storage=tmp_path)
    made.runner.overlaps = True
    everything = made.free_kv_tokens
    yield made
    made.close()
    assert made.free_kv_tokens == everything


def answers(engine: Engine, count: int, **fields: object) -> list[str]:
    """Submit ``count`` questions at once; return the answers."""
    for text in QUESTIONS[:count]:
        engine.submit(Query(text, id=text, **fields))  # type: ignore[arg-type]
    found: dict[str, str] = {}
    while len(found) < count:
        found |= {e.query_id: e.text for e in engine.step().events if isinstance(e, Response)}
    return [found[text] for text in QUESTIONS[:count]]


def test_answers_are_the_same_and_most_passes_are_planned_ahead(
    engine: Engine, monkeypatch: pytest.MonkeyPatch,
) -> None:
    plans: list[Plan] = []
    plan = engine.scheduler.plan

    def counted(state: State, now: float) -> Plan:
        plans.append(plan(state, now))
        return plans[-1]

    monkeypatch.setattr(engine.scheduler, 'plan', counted)
    engine.runner.overlaps = False
    expected = answers(engine, 4, max_tokens=30)
    before = len(plans)
    engine.runner.overlaps = True
    assert answers(engine, 4, max_tokens=30) == expected
    assert len(plans) - before < before / 2


def test_tokens_are_published_while_the_next_pass_runs(engine: Engine) -> None:
    engine.submit(Query('Sing.', id='song', max_tokens=20))
    in_flight = chunks = 0
    while True:
        events = engine.step().events
        chunks += sum(isinstance(e, ResponseChunk) for e in events)
        in_flight += engine.runner.in_flight is not None and any(
            isinstance(e, ResponseChunk) for e in events)
        if any(isinstance(e, Response) for e in events):
            break
    assert in_flight >= chunks - 2 > 5


def test_new_settings_discard_the_plan_made_ahead(engine: Engine) -> None:
    for i, text in enumerate(QUESTIONS):
        engine.submit(Query(text, id=f'{i}', max_tokens=200))
    while (engine.runner.planned_ahead is None
           or len(engine.runner.planned_ahead.decode) < len(QUESTIONS)):
        engine.step()
    engine.update(engine.settings.updated({'scheduler.max_requests': 2}))
    engine.step()
    assert engine.runner.in_flight is not None
    assert len(engine.runner.in_flight.plan.decode) == 2


def test_cancelling_a_request_in_flight_leaves_others_running(engine: Engine) -> None:
    [expected] = answers(engine, 1, max_tokens=20)
    for name in ('kept', 'cancelled'):
        engine.submit(Query(QUESTIONS[0], id=name, max_tokens=20))
    events: list[Event] = []
    while not any(isinstance(e, ResponseChunk) and e.query_id == 'cancelled' for e in events):
        events += engine.step().events
    assert engine.runner.in_flight is not None
    engine.cancel('cancelled')
    events = list(engine.step().events)
    [ended] = [e for e in events if isinstance(e, Response)]
    assert (ended.query_id, ended.finish_reason) == ('cancelled', FinishReason.CANCELLED)
    while not any(isinstance(e, Response) and e.query_id == 'kept' for e in events):
        events += engine.step().events
    assert [e.text for e in events if isinstance(e, Response) and e.query_id == 'kept'] == [
        expected]


def test_a_pause_lets_the_pass_end_first(engine: Engine) -> None:
    engine.submit(Query('Sing.', id='song', max_tokens=200))
    while engine.runner.in_flight is None:
        engine.step()
    events = engine.pause()
    assert [e.finish_reason for e in events if isinstance(e, Response)] == [FinishReason.CANCELLED]
    assert engine.runner.in_flight is None


def test_a_pass_that_fails_on_the_device_ends_its_queries_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Failed(torch.Tensor):
        """The output of a kernel that failed, which raises when it is read."""

        def tolist(self) -> list[int]:
            raise RuntimeError('injected')

    with monkeypatch.context() as patch:
        patch.setattr('mace_ros.engine.model_runner.sample',
                      lambda logits, *_: Sampled(logits.argmax(-1).as_subclass(Failed)))
        engine.submit(Query('Sing.', id='song', max_tokens=20))
        events: list[Event] = []
        while not any(isinstance(e, Response) for e in events):
            events += engine.step().events
    [ended] = [e for e in events if isinstance(e, Response)]
    assert (ended.finish_reason, ended.error) == (FinishReason.ERROR, 'RuntimeError: injected')
    assert len(answers(engine, 2, max_tokens=5)) == 2


def test_a_correction_is_learned_while_passes_overlap(engine: Engine) -> None:
    engine.submit(Query('Sing.', id='song', max_tokens=150))
    engine.correct(Correction('Ho.', id='c', prompt='Who are you?'))
    states, texts = [], []
    while CorrectionState.LEARNED not in states or not texts:
        events = engine.step().events
        states += [e.state for e in events if isinstance(e, CorrectionStatus)]
        texts += [e.text for e in events if isinstance(e, Response)]
    assert answers(engine, 1, max_tokens=8) == ['Ho.']
