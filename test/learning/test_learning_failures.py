# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What fails during learning is retried, or ends with a reason."""

from collections.abc import Sequence
from dataclasses import replace
import errno
from pathlib import Path
import threading
import time
from typing import Any

import pytest
from support.robot import DONE, Robot, running
import torch

from mace_ros.api.events import (
    AdapterVersion,
    Correction,
    CorrectionState,
    CorrectionStatus,
    Event,
    FinishReason,
    Query,
    Response,
    VersionState,
)
from mace_ros.api.settings import Settings
from mace_ros.engine.builder import build_engine
from mace_ros.finetune.sample import Sample
from mace_ros.finetune.step import FinetuneStep
from mace_ros.learning import backoff, learner, learning_job
from mace_ros.learning.job import JobState
from mace_ros.learning.task import Task
from mace_ros.learning.training import Scored, Training
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.packed_model import PackedModel
from mace_ros.store.adapter_store import AdapterStore, CorruptVersion
from mace_ros.store.journal import Journal
from mace_ros.store.journal_file import JournalError


@pytest.mark.parametrize('fails', ['', 'replay_candidates', 'publish'])
def test_learning_wakes_itself(
        fails: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wait has a wake-up time or wakes the engine."""
    if fails:
        once = [JournalError('injected')]
        function = getattr(Journal, fails)

        def failing(*arguments: object, **values: object) -> object:
            if once:
                raise once.pop()
            return function(*arguments, **values)

        monkeypatch.setattr(Journal, fails, failing)
        monkeypatch.setattr(backoff, 'LONGEST_S', 0.05)
    woken = threading.Event()
    engine = build_engine(settings, storage=tmp_path / 'woken', wake=woken.set)
    try:
        engine.correct(Correction('A robot.', id='c', prompt='Who are you?'))
        states: set[CorrectionState] = set()
        while not states.intersection(DONE):
            woken.clear()
            iteration = engine.step()
            states |= {e.state for e in iteration.events if isinstance(e, CorrectionStatus)}
            if iteration.wake_at is None:
                assert woken.wait(30.0) or states.intersection(DONE)
            else:
                woken.wait(max(iteration.wake_at - time.monotonic(), 0.0))
    finally:
        engine.close()


@pytest.mark.parametrize('scope', ['similar', 'everywhere'])
def test_what_a_candidate_has_lost_is_trained_before_anything_is_published(
        robot: Robot, monkeypatch: pytest.MonkeyPatch, scope: str) -> None:
    robot.engine.update(robot.engine.settings.updated(
        {'adapter.scope': scope, 'finetune.max_steps': 200}))
    robot.correct(Correction('In the hall.', id='a', prompt='Where does Rumpelstiltskin live?'))
    candidates: list[int] = []          # samples that earlier candidates have lost
    lost: list[list[Sample]] = []
    score = Training.score

    def losing(self: Training, samples: Sequence[Sample], *rest: Any) -> Task[Scored]:
        scored = yield from score(self, samples, *rest)
        if running(robot).state is JobState.JUDGING and samples:
            candidates.append(running(robot).lost)
            lost.append([*samples])
            if len(candidates) == 1:
                scored.scores = [replace(each, exact=False) for each in scored.scores]
        return scored

    monkeypatch.setattr(Training, 'score', losing)
    taught = robot.correct(
        Correction('A robot.', id='b', prompt='Where does Rumpelstiltskin sleep?'))
    assert taught.state is CorrectionState.LEARNED
    chat = robot.engine.chat
    kept = (*chat.prompt([{'role': 'user', 'content': 'Where does Rumpelstiltskin live?'}]),
            *chat.answer('In the hall.'))
    assert candidates == [0, 1]
    assert [[each.tokens for each in samples] for samples in lost] == [[kept], [kept]]
    assert [e.state for e in robot.events if isinstance(e, AdapterVersion)] == [
        VersionState.PUBLISHED, VersionState.PUBLISHED]
    assert robot.ask('Where does Rumpelstiltskin live?').text == 'In the hall.'


@pytest.mark.parametrize('scope', ['similar', 'everywhere'])
def test_what_is_lost_again_spares_the_scores_of_the_rest(
        robot: Robot, monkeypatch: pytest.MonkeyPatch, scope: str) -> None:
    robot.engine.update(robot.engine.settings.updated(
        {'adapter.scope': scope, 'adapter.scope_threshold': 0.2, 'finetune.max_steps': 200}))
    learned = {'In the hall.': 'Where does Rumpelstiltskin live?',
               'At the table.': 'Where does Rumpelstiltskin eat?'}
    for text, prompt in learned.items():
        robot.correct(Correction(text, id=text, prompt=prompt))
    judged: list[list[str]] = []        # the answers that were scored of each candidate
    score = Training.score

    def losing_one_twice(self: Training, samples: Sequence[Sample], *rest: Any) -> Task[Scored]:
        scored = yield from score(self, samples, *rest)
        if running(robot).state is JobState.JUDGING and samples:
            texts = [next(t for t in learned if each.tokens[len(each.prompt):]
                          == tuple(robot.engine.chat.answer(t))) for each in samples]
            judged.append(sorted(texts))
            if len(judged) <= 2:
                scored.scores = [replace(each, exact=text != 'In the hall.')
                                 for each, text in zip(scored.scores, texts, strict=True)]
        return scored

    monkeypatch.setattr(Training, 'score', losing_one_twice)
    taught = robot.correct(
        Correction('A robot.', id='b', prompt='Where does Rumpelstiltskin sleep?'))
    assert taught.state is CorrectionState.LEARNED
    assert judged[:4] == [['At the table.', 'In the hall.'], ['In the hall.'],
                          ['In the hall.'], ['At the table.']]


def test_a_correction_that_cannot_be_learned_fails_with_a_reason(robot: Robot) -> None:
    """If max_steps do not suffice, the correction is FAILED and serving continues."""
    robot.engine.update(robot.engine.settings.updated(
        {'finetune.max_steps': 1, 'finetune.learning_rate': 1e-6}))
    wrong = robot.ask('Who are you?')
    state = robot.correct(Correction('A robot.', id='k', query_id=wrong.query_id))
    assert state.state is CorrectionState.FAILED
    assert 'finetune.max_steps' in state.reason
    assert robot.ask('Who are you?').text == wrong.text


@pytest.mark.parametrize('where', ['run_segment', '__init__'])
def test_failing_learning_loses_no_answer_and_is_retried(
        robot: Robot, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A fine-tune step that can't be made or run costs no query, and the correction is learned."""
    wrong = robot.ask('Who are you?')
    failures: list[int] = []
    original = getattr(FinetuneStep, where)

    def fail_once(self: FinetuneStep, *args: object, **kwargs: object) -> object:
        if not failures:
            failures.append(1)
            raise torch.OutOfMemoryError('injected')
        return original(self, *args, **kwargs)

    robot.engine.update(robot.engine.settings.updated({'scheduler.policy': 'continuous'}))
    robot.engine.submit(Query('Long?', id='long', max_tokens=300))
    with monkeypatch.context() as patch:
        patch.setattr(FinetuneStep, where, fail_once)
        state = robot.correct(Correction('A robot.', id='k', query_id=wrong.query_id))
    assert failures and state.state is CorrectionState.LEARNED
    long = next((e for e in robot.events if isinstance(e, Response) and e.query_id == 'long'),
                None) or robot.response('long')
    assert long.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


def test_learning_that_always_fails_is_given_up(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a few tries the correction is FAILED with the reason."""
    wrong = robot.ask('Who are you?')

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError('injected')

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneStep, 'run_segment', fail)
        state = robot.correct(Correction('A robot.', id='k', query_id=wrong.query_id))
    assert state.state is CorrectionState.FAILED and 'injected' in state.reason
    assert robot.ask('Who are you?').text == wrong.text


@pytest.mark.parametrize('where', ['segment', 'pass'])
def test_a_lost_device_fails_no_correction(
        settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """As after an illegal address on CUDA, where each later call fails: a new process learns it."""
    robot = Robot(build_engine(settings, storage=tmp_path))
    lost: list[int] = []

    def fail(*_: object) -> None:
        lost.append(1)
        raise RuntimeError('CUDA error: an illegal memory access was encountered')

    def synchronize(_: PackedModel) -> None:
        if lost:
            fail()

    with monkeypatch.context() as patch:
        patch.setattr(PackedModel, 'synchronize', synchronize)
        patch.setattr(*((FinetuneStep, 'run_segment', fail) if where == 'segment'
                        else (PackedModel, 'run', fail)))
        robot.engine.correct(Correction('A robot.', id='k', prompt='Who are you?'))
        if where == 'pass':
            robot.engine.submit(Query('Who are you?', id='q'))
        with pytest.raises(RuntimeError, match='illegal memory access'):
            robot.until(lambda _: False)
        with pytest.raises(RuntimeError, match='illegal memory access'):    # nor is it tried again
            robot.engine.step()
        robot.engine.close()
    if where == 'pass':
        assert robot.answer('q').finish_reason == FinishReason.ERROR
    assert CorrectionState.FAILED not in {
        e.state for e in robot.events if isinstance(e, CorrectionStatus)}
    again = Robot(build_engine(settings, storage=tmp_path))
    again.until(lambda e: isinstance(e, CorrectionStatus) and e.state is CorrectionState.LEARNED)
    again.engine.close()


@pytest.mark.parametrize('waits', [True, False])
def test_an_error_before_a_job_is_reported(
        robot: Robot, monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    """The status shows the error; otherwise the iteration fails and the next runs."""
    wrong, learning = robot.ask('Who are you?'), robot.engine.learner

    def fail() -> list[Event]:
        if learning.busy or not waits:
            raise TypeError('injected')
        return []

    with monkeypatch.context() as patch:
        patch.setattr(learning, 'poll', fail)
        if waits:
            robot.engine.correct(Correction('A robot.', id='k', query_id=wrong.query_id))
            robot.until(lambda event: isinstance(event, CorrectionStatus))
            assert robot.ask('Who are you?').text == wrong.text
            assert 'injected' in robot.engine.status().learning_error
        else:
            with pytest.raises(TypeError, match='injected'):
                robot.engine.step()
    assert robot.ask('Who are you?').text


def test_saving_is_retried(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the disk is full, the trained version is kept and its corrections stay pending."""
    wrong = robot.ask('Who are you?')
    save, failures, problems = AdapterStore.save, [], set()

    def full(*arguments: object) -> object:
        problems.add(robot.engine.status().learning_error)
        if len(failures) < learner.MAX_JOB_TRIES + 2:
            failures.append(robot.engine.scheduler.statistics(time.monotonic()).finetune_steps)
            raise OSError(errno.ENOSPC, 'No space left on device')
        return save(*arguments)     # type: ignore[arg-type]

    monkeypatch.setattr(AdapterStore, 'save', full)
    monkeypatch.setattr(backoff, 'LONGEST_S', 0.05)
    state = robot.correct(Correction('A robot.', id='k', query_id=wrong.query_id))
    assert state.state is CorrectionState.LEARNED
    assert len(failures) == learner.MAX_JOB_TRIES + 2 and len(set(failures)) == 1
    assert any('No space left' in problem for problem in problems)
    assert robot.engine.status().learning_error == ''
    assert robot.ask('Who are you?').text == 'A robot.'


def test_reading_is_retried(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing disk is no failed attempt of the correction."""
    robot.correct(Correction('A robot.', id='k', prompt='Who are you?'))
    load, failures, problems = AdapterStore.load, [], set()

    def damaged(*arguments: object) -> object:
        problems.add(robot.engine.status().learning_error)
        if len(failures) < learner.MAX_JOB_TRIES + 2:
            failures.append(1)
            raise CorruptVersion('injected')
        return load(*arguments)     # type: ignore[arg-type]

    monkeypatch.setattr(AdapterStore, 'load', damaged)
    monkeypatch.setattr(backoff, 'LONGEST_S', 0.05)
    state = robot.correct(Correction('In the hall.', id='l', prompt='Where are you?'))
    assert state.state is CorrectionState.LEARNED
    assert any('injected' in problem for problem in problems)
    assert robot.engine.status().learning_error == ''


def test_a_version_that_can_not_be_loaded_costs_its_query_only(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the device is out of memory."""
    def failing(*_: object) -> None:
        raise torch.OutOfMemoryError('injected')

    robot.correct(Correction('A robot.', id='k', prompt='Who are you?'))
    with monkeypatch.context() as patch:
        patch.setattr(LoRAManager, 'write_slot', failing)
        answer = robot.ask('Who are you?')
        assert (answer.finish_reason, answer.error) == (
            FinishReason.ERROR, 'OutOfMemoryError: injected')
        assert robot.ask('What is a lake?').finish_reason is not FinishReason.ERROR
    answer = robot.ask('Who are you?')
    assert (answer.text, answer.adapter_version) == ('A robot.', 1)


def test_a_correction_that_always_fails_the_gate_fails(
        settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After finetune.max_steps it is FAILED with the gate's reason; the answer stays."""
    robot = Robot(build_engine(
        settings.updated({'finetune.max_steps': 60}), storage=tmp_path))
    robot.correct(Correction('In the hall.', id='a', prompt='Where does Rumpelstiltskin live?'))
    before = robot.ask('Where does Rumpelstiltskin sleep?')
    monkeypatch.setattr(learning_job, 'wrong', lambda samples, _: list(samples))

    failed = robot.correct(Correction('A robot.', id='k', query_id=before.query_id))

    assert failed.state is CorrectionState.FAILED
    assert failed.reason.startswith('earlier corrections: 1 of 1 would be lost')
    assert 'finetune.max_steps' in failed.reason
    assert robot.ask('Where does Rumpelstiltskin sleep?').text == before.text
