# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Learning shares a small memory with answers, which come first."""

from __future__ import annotations

from itertools import count
from pathlib import Path
import time

import pytest
from support.robot import RANDOM_MODEL, robot_with

from mace_ros.api.events import (
    Correction,
    CorrectionState,
    CorrectionStatus,
    FinishReason,
    Query,
    Response,
)
from mace_ros.api.settings import Settings
from mace_ros.finetune.footprint import measure_footprint
from mace_ros.memory.budget import MIN_CHUNK_TOKENS


@pytest.fixture(scope='module')
def settings(tiny_settings: Settings) -> Settings:
    """Return settings with which the tiny model learns quickly."""
    return tiny_settings.updated(RANDOM_MODEL)


@pytest.fixture(scope='module')
def large_head(settings: Settings, all_tokens: Path) -> Settings:
    """Return settings for a model whose head takes most of the memory of a fine-tune step."""
    return settings.updated({'model.source': str(all_tokens)})


def test_learning_and_answers_share_a_small_budget(settings: Settings, tmp_path: Path) -> None:
    """A step fits without its graphs only; queries come first, and learning ends as well."""
    with robot_with(settings, tmp_path) as one:
        engine = one.engine
        fixed = engine.status().planned_mb
        footprint = measure_footprint(engine.model, engine.lora)
        room, graphs = (footprint.step_bytes([300], keep_graphs=k) / 1e6 for k in (False, True))
        wrong = one.ask('Who are you?')
        engine.update(engine.settings.updated({'memory.budget_mb': fixed + room}))
        # Fine-tune steps compete with answers that need all of the memory.
        for n in range(4):
            engine.submit(Query(f'Tell me all about {n}.', id=f'long{n}', max_tokens=600))
        planned = []
        step, engine.step = engine.step, lambda: (planned.append(engine.status()), step())[1]
        learned = one.correct(Correction('I am Rover.', id='k', query_id=wrong.query_id))
        assert learned.state is CorrectionState.LEARNED, learned
        for n in range(4):
            assert one.answer(f'long{n}').finish_reason in (
                FinishReason.STOP, FinishReason.LENGTH)
        assert one.ask('Who are you?').text == 'I am Rover.'
        # There was a step, without its graphs, and the total never exceeded the budget.
        learning = [s.planned_mb for s in planned if s.planned_mb > fixed + 0.8 * room]
        assert learning and max(s.planned_mb for s in planned[1:]) <= fixed + room < fixed + graphs
        engine.update(engine.settings.updated({'memory.budget_mb': 0.0}))
        engine.step()


def test_a_correction_too_large_for_the_memory_fails_by_name(
        settings: Settings, tmp_path: Path) -> None:
    """Also without queries; a shorter correction is learned afterwards."""
    with robot_with(settings, tmp_path) as one:
        engine = one.engine
        footprint = measure_footprint(engine.model, engine.lora)
        room = sum(footprint.step_bytes([n], keep_graphs=False, chunk_tokens=MIN_CHUNK_TOKENS)
                   for n in (100, 300)) / 2e6
        fixed = engine.status().planned_mb
        long, short = one.ask('word ' * 300, max_tokens=1), one.ask('Who are you?')
        engine.update(engine.settings.updated({'memory.budget_mb': fixed + room}))
        failed = one.correct(Correction('I am Rover.', id='long', query_id=long.query_id))
        assert failed.state is CorrectionState.FAILED
        assert 'memory.budget_mb' in failed.reason and 'needed to learn' in failed.reason
        learned = one.correct(Correction('I am Rover.', id='short', query_id=short.query_id))
        assert learned.state is CorrectionState.LEARNED, learned
        engine.update(engine.settings.updated({'memory.budget_mb': 0.0}))
        engine.step()


def test_a_step_that_does_not_fit_whole_runs_in_chunks(
        large_head: Settings, tmp_path: Path) -> None:
    with robot_with(large_head, tmp_path) as one:
        engine = one.engine
        room = measure_footprint(engine.model, engine.lora).max_step_bytes(150) / 1e6
        long = one.ask('word ' * 300, max_tokens=1)
        engine.update(engine.settings.updated(
            {'memory.budget_mb': engine.status().planned_mb + room}))
        learned = one.correct(Correction('I am Rover.', id='long', query_id=long.query_id))
        assert learned.state is CorrectionState.LEARNED, learned
        assert one.ask('word ' * 300).text == 'I am Rover.'
        engine.update(engine.settings.updated({'memory.budget_mb': 0.0}))
        engine.step()


def test_evicted_learning_resumes_when_idle(
        settings: Settings, tmp_path: Path) -> None:
    with robot_with(settings, tmp_path) as one:
        engine = one.engine
        wrong = one.ask('Who are you?')
        room = measure_footprint(engine.model, engine.lora).max_step_bytes(150) / 1e6
        engine.update(engine.settings.updated(
            {'memory.budget_mb': engine.status().planned_mb + room}))
        engine.correct(Correction('I am Rover.', id='k', query_id=wrong.query_id))
        # With so small a model, a step may end in the iteration that started it.
        while (step := engine.parts.memory.granted) is None or step.done:
            one.events += engine.step().events
        assert engine.parts.memory.reclaim(lacks_memory=True)
        one.events += engine.step().events
        assert engine.parts.memory.granted is not None
        engine.update(engine.settings.updated({'memory.budget_mb': 0.0}))
        engine.step()


def test_overdue_learning_gets_its_memory_under_any_load(
        large_head: Settings, tmp_path: Path) -> None:
    """Admission reserves the memory of a step, so no running request is preempted for it."""
    with robot_with(large_head, tmp_path, slo__freshness_s=1.0, finetune__min_share=0.9,
                    scheduler__max_requests=4) as one:
        engine, memory = one.engine, one.engine.parts.memory
        first, wrong = one.ask('Who made you?'), one.ask('Who are you?')
        one.correct(Correction('My maker.', id='first', query_id=first.query_id))
        room = memory.budget.footprint.min_step_bytes([100]) + 1e6
        engine.update(engine.settings.updated(
            {'memory.budget_mb': (memory.budget.fixed + room) / 1e6}))
        numbers = count()

        def ask() -> None:
            number = next(numbers)
            engine.submit(Query(f'{number} {"word " * 500}', id=f'{number}', max_tokens=50))

        for _ in range(8):
            ask()
        engine.correct(Correction('I am Rover.', id='k', query_id=wrong.query_id))
        end, state, most_held, preempted = time.monotonic() + 200.0, None, 0, 0
        while state is not CorrectionState.LEARNED:
            assert time.monotonic() < end
            waits = engine.learner.step is not None and not memory.budget.learning
            if waits:
                most_held = max(most_held, engine.parts.pool.held_blocks)
                preempted -= engine.parts.kv_cache.preemptions
            for event in engine.step().events:
                if isinstance(event, Response):
                    assert event.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
                    ask()
                elif isinstance(event, CorrectionStatus):
                    state = event.state
            if waits:
                preempted += engine.parts.kv_cache.preemptions
        assert most_held > memory.budget.kv_beside(room - 1e6) and not preempted
        engine.update(engine.settings.updated({'memory.budget_mb': 0.0}))
        for number in range(next(numbers)):
            engine.cancel(f'{number}')
        engine.step()


def test_a_step_layout_error_fails_the_job_and_not_the_engine(
        settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with robot_with(settings, tmp_path) as one:
        engine = one.engine
        wrong = one.ask('Who are you?')
        grant, failures = engine.parts.memory.grant, iter([MemoryError('none left')])

        def failing(step: object, **values: bool) -> bool:
            error = None if step is None else next(failures, None)
            if error is not None:
                raise error
            return grant(step, **values)     # type: ignore[arg-type]

        monkeypatch.setattr(engine.parts.memory, 'grant', failing)
        learned = one.correct(Correction('I am Rover.', id='k', query_id=wrong.query_id))
        assert learned.state is CorrectionState.LEARNED
        assert next(failures, None) is None
