# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
An allocation fails, at any place where the engine allocates.

Requests that depend on it end with a named error and all others continue, without a restart, and
no acknowledged correction is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
import time
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mace_ros.api.events import (
    Correction,
    CorrectionState,
    CorrectionStatus,
    Event,
    FinishReason,
    Query,
    Response,
)
from mace_ros.api.settings import Settings
from mace_ros.engine import builder, model_runner
from mace_ros.engine.builder import build_engine
from mace_ros.engine.engine import Engine
from mace_ros.engine.paged_kv_cache import PagedKVCache
from mace_ros.finetune import step as step_module
from mace_ros.finetune.loss import HeadLoss
from mace_ros.finetune.null_space import InputSubspace
from mace_ros.finetune.step import FinetuneStep
from mace_ros.finetune.trainer import Trainer
from mace_ros.memory.block_pool import BlockPool
from mace_ros.model import loading
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.packed_model import PackedModel
from mace_ros.scheduling.plan import Plan, State
from mace_ros.store.adapter_store import AdapterStore
from mace_ros.store.journal import Journal
from mace_ros.telemetry.device_counters import Reading
from mace_ros.telemetry.health import Health, Level, NodeState

SERVING = {
    'the pass': (PackedModel, 'run'),
    'sampling': (model_runner, 'sample'),
    'KV blocks': (BlockPool, 'grow'),
}
LEARNING = {
    'reading the live version': (LoRAManager, 'reset'),
    'optimizer state': (Trainer, '__init__'),
    'a prefix of samples': (PagedKVCache, 'read_prefix'),
    'the main directions': (InputSubspace, 'observe'),
    'protecting directions': (LoRAManager, 'protect'),
    'projecting an update': (LoRAManager, 'project_update'),
    'a step': (FinetuneStep, '__init__'),
    'piggybacked tokens': (FinetuneStep, 'piggyback_spans'),
    'a forward': (step_module, 'run_layer'),
    'the head': (HeadLoss, 'run_chunk'),
    'a backward': (Trainer, 'zero_grad'),
    'the update': (Trainer, 'update'),
    'exporting the adapter': (LoRAManager, 'export'),
    'saving the adapter': (AdapterStore, 'save'),
    'publishing it in the journal': (Journal, 'publish'),
    'an adapter slot': (LoRAManager, 'write_slot'),
}
# Steps of the first job of a process only, whose version is to answer everything.
FIRST_JOB = ('a prefix of samples', 'the main directions', 'protecting directions')
LOADING = {
    'weights': (loading.AutoModelForCausalLM, 'from_pretrained'),
    'the KV cache': (PackedModel, 'allocate_kv_cache'),
    'adapter slots': (LoRAManager, '__init__'),
    'measuring the device': (builder, 'measure'),
}
ANSWER = 'A robot.'
ENDS = (CorrectionState.LEARNED, CorrectionState.FAILED, CorrectionState.REJECTED)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope='module')
def settings(settings: Settings) -> Settings:
    return settings.updated({
        'generation.max_tokens': 8,
        # Each lesson has a profile of its own, so that lessons are independent.
        'adapter.slots': 40,
        # Learning competes with answers wherever the scheduler allows it.
        'scheduler.max_slowdown': 1000.0, 'slo.tpot_ms': 10000.0})


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('robot')


@pytest.fixture(scope='module')
def robot(settings: Settings, folder: Path) -> Iterator[Robot]:
    made = Robot(build_engine(settings, storage=folder))
    yield made
    made.engine.close()


@dataclass
class Injected:
    """A function that fails once, in its ``call``-th call."""

    original: Callable[..., Any]
    call: int = 1
    failed: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.call -= 1
        if self.call == 0:
            self.failed += 1
            raise torch.OutOfMemoryError('injected')
        return self.original(*args, **kwargs)


def inject(patch: pytest.MonkeyPatch, where: tuple[Any, str], call: int = 1) -> Injected:
    owner, name = where
    injected = Injected(getattr(owner, name), call)
    patch.setattr(owner, name, lambda *args, **kwargs: injected(*args, **kwargs))
    return injected


class Robot:
    """Steps an engine, and collects the errors of its diagnostics."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: list[Event] = []
        self.alarms: set[str] = set()
        self.taught: list[str] = []      # profiles
        self._health = Health()
        self._health.state = NodeState.ACTIVE

    def step(self) -> None:
        iteration = self.engine.step()
        self.events += iteration.events
        now = time.monotonic()
        for event in iteration.events:
            self._health.note(event, now)
        for finding in self._health.findings(
                self.engine.status(), Reading(), self.engine.settings, now):
            if finding.level is Level.ERROR:
                self.alarms.add(f'{finding.name}: {finding.message}')
        if iteration.wake_at is None:
            time.sleep(0.001)

    def until(self, found: Callable[[Event], bool]) -> Any:
        self.while_not(lambda: any(found(event) for event in self.events))
        return next(event for event in self.events if found(event))

    def while_not(self, happened: Callable[[], bool]) -> None:
        """Step until the condition holds."""
        end = time.monotonic() + 200.0
        while time.monotonic() < end:
            if happened():
                return
            self.step()
        raise AssertionError(f'it did not happen; the last events: {self.events[-3:]}')

    def response(self, query_id: str) -> Response:
        return self.until(lambda e: isinstance(e, Response) and e.query_id == query_id)

    def ask(self, query_id: str, **fields: Any) -> Response:
        self.engine.submit(Query('Who are you?', id=query_id, **fields))
        return self.response(query_id)

    def learned(self, correction_id: str) -> CorrectionStatus:
        return self.until(lambda e: isinstance(e, CorrectionStatus) and e.id == correction_id
                          and e.state in ENDS)


class Lesson:
    """A correction of an answer, learned while a long answer is generated."""

    def __init__(self, robot: Robot) -> None:
        """Submit the query to be corrected and the long one."""
        self.robot, self.profile = robot, f'profile {len(robot.taught)}'
        robot.taught.append(self.profile)
        robot.alarms.clear()
        assert self.ask('wrong').text != ANSWER
        robot.engine.submit(Query('Sing.', id=self.id('long'), max_tokens=150))
        robot.until(lambda e: getattr(e, 'query_id', '') == self.id('long'))

    def id(self, what: str) -> str:
        return f'{what} of {self.profile}'

    def ask(self, what: str) -> Response:
        return self.robot.ask(self.id(what), profile=self.profile)

    def correct(self) -> None:
        self.robot.engine.correct(Correction(
            ANSWER, id=self.profile, query_id=self.id('wrong'), profile=self.profile))

    def learned(self) -> CorrectionStatus:
        return self.robot.learned(self.profile)

    def long(self) -> Response:
        return self.robot.response(self.id('long'))

    def check_that_all_is_well(self) -> None:
        """Check that learning and serving work, and that every KV block is free."""
        assert self.learned().state is CorrectionState.LEARNED
        assert self.ask('right').text == ANSWER
        self.long()
        engine = self.robot.engine
        while engine.step().wake_at is not None:
            pass
        assert engine.free_kv_tokens == 8192
        status = engine.status()
        assert (status.learning_error, status.corrections_waiting) == ('', 0)


@pytest.mark.parametrize('where', SERVING)
def test_answers_break_off_by_name_and_the_next_are_given(
    robot: Robot, monkeypatch: pytest.MonkeyPatch, where: str,
) -> None:
    lesson = Lesson(robot)
    lesson.correct()
    with monkeypatch.context() as patch:
        injected = inject(patch, SERVING[where], call=3)
        robot.engine.submit(Query('Another one?', id=lesson.id('another')))
        robot.while_not(lambda: injected.failed > 0)
        broken = [lesson.long(), robot.response(lesson.id('another'))]
    errors = [b.error for b in broken if b.finish_reason is FinishReason.ERROR]
    assert errors
    assert all('OutOfMemoryError: injected' in error for error in errors)
    assert any(a.startswith('serving: ') and 'OutOfMemoryError: injected' in a
               for a in robot.alarms)
    lesson.check_that_all_is_well()


def let_forwards_ride(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """Add fine-tune tokens to each pass, as on a device where that is free."""
    plan = engine.scheduler.plan

    def riding(state: State, now: float) -> Plan:
        made = plan(state, now)
        if state.finetune is None or not state.finetune.piggyback_tokens:
            return made
        return made._replace(finetune_tokens=state.finetune.piggyback_tokens, segments=0)

    patch.setattr(engine.scheduler, 'plan', riding)


@pytest.mark.parametrize('where', [where for where in LEARNING if where not in FIRST_JOB])
def test_learning_breaks_off_alone_and_is_tried_again(
    robot: Robot, monkeypatch: pytest.MonkeyPatch, where: str,
) -> None:
    break_off(robot, monkeypatch, where)


@pytest.mark.parametrize('where', FIRST_JOB)
def test_the_first_job_breaks_off_alone_and_is_tried_again(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str,
) -> None:
    robot = Robot(build_engine(
        settings.updated({'adapter.scope': 'everywhere'}), storage=tmp_path))
    break_off(robot, monkeypatch, where)
    robot.engine.close()


def break_off(robot: Robot, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    lesson = Lesson(robot)
    with monkeypatch.context() as patch:
        if where == 'piggybacked tokens':
            let_forwards_ride(robot.engine, patch)
        injected = inject(patch, LEARNING[where])
        lesson.correct()
        assert lesson.learned().state is CorrectionState.LEARNED
    assert injected.failed == 1
    assert any(a.startswith('learning: ') and 'injected' in a for a in robot.alarms), robot.alarms
    assert lesson.long().finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    lesson.check_that_all_is_well()


def test_a_correction_that_can_not_be_kept_is_not_acknowledged(
    robot: Robot, monkeypatch: pytest.MonkeyPatch,
) -> None:
    lesson = Lesson(robot)
    with monkeypatch.context() as patch:
        inject(patch, (Journal, 'accept'))
        lesson.correct()
        refused = lesson.learned()
        robot.step()
    assert (refused.state, refused.reason) == (CorrectionState.REJECTED, 'injected')
    assert any('injected' in a for a in robot.alarms)
    robot.events.remove(refused)
    lesson.correct()
    lesson.check_that_all_is_well()


class FailingAllocator(TorchDispatchMode):
    """Fails the allocation of one operation of PyTorch, by its number."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError('injected')
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('count', [40, 1001, 2222])
def test_any_operation_may_find_no_memory(robot: Robot, count: int) -> None:
    lesson = Lesson(robot)
    lesson.correct()
    with FailingAllocator(count) as allocator:
        robot.while_not(lambda: allocator.left <= 0)
    long = lesson.long()
    assert long.finish_reason is not FinishReason.ERROR or 'injected' in long.error
    lesson.check_that_all_is_well()


def test_nothing_that_was_learned_is_lost_with_a_restart(
    robot: Robot, settings: Settings, folder: Path,
) -> None:
    robot.engine.close()
    robot.engine = build_engine(settings, storage=folder)
    assert len(robot.taught) > 10
    for profile in robot.taught:
        assert robot.ask(f'once more {profile}', profile=profile).text == ANSWER


@pytest.mark.parametrize('where', LOADING)
def test_loading_can_be_tried_again(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str,
) -> None:
    with monkeypatch.context() as patch:
        inject(patch, LOADING[where])
        with pytest.raises(torch.OutOfMemoryError, match='injected'):
            build_engine(settings, storage=tmp_path)
        robot = Robot(build_engine(settings, storage=tmp_path))
    assert robot.ask('one').output_tokens > 0
    robot.engine.close()
