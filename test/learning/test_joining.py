# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Corrections that join a running job."""

from collections.abc import Callable
from pathlib import Path

from peft import PeftModel
import pytest
from support.robot import correct, DONE, Robot, running
import torch
from transformers import AutoModelForCausalLM

from mace_ros.api.events import (
    AdapterVersion,
    Correction,
    CorrectionState,
    CorrectionStatus,
    VersionState,
)
from mace_ros.api.settings import EVERYWHERE, Settings
from mace_ros.learning import selection
from mace_ros.learning.job import JobState
from mace_ros.learning.status import JobStatus
from mace_ros.learning.training import Training
from mace_ros.scheduling.memory_arbiter import MemoryArbiter


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Return settings under which corrections share an adapter."""
    return settings.updated({'adapter.scope': EVERYWHERE})


def test_a_correction_joins_before_the_first_update(robot: Robot) -> None:
    engine = robot.engine
    engine.correct(Correction('A robot.', id='first', prompt='Question first?'))
    told: list[CorrectionStatus] = []

    def step() -> None:
        told.extend(e for e in engine.step().events if isinstance(e, CorrectionStatus))

    while (job := engine.learner.status().job) is None or job.state is not JobState.TRAINING:
        step()
    engine.update(engine.settings.updated({'finetune.budget': 0.0}))    # no further step
    correct(robot, 'second')
    engine.step()
    assert running(robot).correction_ids == ('first', 'second') and running(robot).steps == 0
    engine.update(engine.settings.updated({'finetune.budget': 1.0}))
    while {e.id for e in told if e.state in DONE} != {'first', 'second'}:
        step()
    assert sorted(e.id for e in told if e.state is CorrectionState.TRAINING) == ['first', 'second']
    assert {e.adapter_version for e in told if e.state in DONE} == {1}      # of one job


@pytest.mark.parametrize('from_disk', [False, True])
def test_a_correction_joins_during_training(
        robot: Robot, model_folder: Path, monkeypatch: pytest.MonkeyPatch, from_disk: bool) -> None:
    """It is scored under the live version, and the job keeps its trained weights."""
    engine = robot.engine
    if from_disk:
        robot.correct(Correction('In the hall.', id='zeroth', prompt='Question zeroth?'))
    loaded: list[tuple[dict[str, torch.Tensor], ...]] = []
    set_weights = Training.set_weights

    def noted(self: Training, tensors: dict[str, torch.Tensor]) -> None:
        before = self.lora.export()
        set_weights(self, tensors)
        loaded.append((before, self.lora.export()))

    monkeypatch.setattr(Training, 'set_weights', noted)
    join(robot)
    while running(robot).swapped_out:
        robot.events += engine.step().events
    job = running(robot)
    last = robot.until(lambda e: isinstance(e, AdapterVersion))
    assert isinstance(last, AdapterVersion)
    assert (last.state, last.correction_ids) == (VersionState.PUBLISHED, ('first', 'second'))
    (trained, live), (still_live, trained_again) = loaded[:2]
    for name, of_job in trained.items():
        assert torch.equal(of_job, trained_again[name])
        assert torch.equal(live[name], still_live[name])
    assert any(b.any() for name, b in live.items() if 'lora_B' in name) == from_disk
    record = engine.parts.journal.submit(lambda j: j.correction('second')).result()
    first, second = (correction.score for correction in job.corrections)
    tokens = torch.tensor([[*record.prompt_ids, *engine.chat.answer('A human.')]])
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    if from_disk:
        [path] = engine.parts.journal.submit(
            lambda j: [v.path for v in j.versions('') if v.version == 1]).result()
        model = PeftModel.from_pretrained(model, str(engine.parts.store.absolute(path)))
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[0, :-1]
    log_p = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[len(record.prompt_ids) - 1:]
    assert second == pytest.approx(float(log_p.mean()), abs=1e-3)
    assert first is not None and last.score_before == pytest.approx(
        (first + second) / 2, abs=1e-3)
    assert robot.ask('Question first?').text == 'A robot.'
    assert robot.ask('Question second?').text == 'A human.'


def join(robot: Robot, until: Callable[[JobStatus], bool] = lambda job: job.swapped_out) -> None:
    """Return once a correction is joining another's job."""
    engine = robot.engine
    engine.update(engine.settings.updated({'finetune.max_steps': 400}))
    engine.correct(Correction('A robot.', id='first', prompt='Question first?'))
    while (job := engine.learner.status().job) is None or not job.steps:
        robot.events += engine.step().events
    engine.correct(Correction('A human.', id='second', prompt='Question second?'))
    written(robot)
    while not until(running(robot)):
        assert running(robot).state is not JobState.SAVING, 'it did not join'
        robot.events += engine.step().events


def written(robot: Robot) -> None:
    """Return once corrections are on disk: in time for the next iteration, however slow it is."""
    robot.engine.parts.journal.submit(lambda _: None).result(60)


def test_a_device_failure_during_joining_is_not_counted_against_corrections_in_training(
        robot: Robot) -> None:
    join(robot)
    robot.engine.learner.fail('out of memory')
    assert {w.id: w.tries for w in robot.engine.learner.status().queue} == {
        'first': 1, 'second': 2}
    learned(robot, 'first', 'second')


def test_a_job_stopped_during_joining_starts_again(robot: Robot) -> None:
    join(robot)
    robot.engine.rollback('', 0)
    robot.events += robot.engine.step().events
    status = robot.engine.learner.status()
    assert status.job is None and [w.id for w in status.queue] == ['first', 'second']
    learned(robot, 'first', 'second')


def test_corrections_in_training_stay_if_joining_finds_too_little_memory(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    join(robot, lambda job: job.announced == 2)
    swap_out = Training.swap_out
    shrunk = []

    def shrink(self: Training, start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(MemoryArbiter, 'step_tokens', lambda self, most: 1)
        shrunk.append(1)
        return swap_out(self, start)

    monkeypatch.setattr(Training, 'swap_out', shrink)
    robot.engine.correct(Correction('A cat.', id='third', prompt='Question third?'))
    written(robot)
    while not shrunk or running(robot).swapped_out:
        robot.events += robot.engine.step().events
    monkeypatch.undo()      # with as little memory, the rest of this test would be slow
    version = robot.until(lambda e: isinstance(e, AdapterVersion))
    assert isinstance(version, AdapterVersion) and version.correction_ids == ('first', 'second')
    learned(robot, 'first', 'second')
    until_learned(robot, 'third')


def test_a_joining_correction_is_trained_even_if_the_live_version_is_right(robot: Robot) -> None:
    """The version in training might not."""
    robot.correct(Correction('A human.', id='zeroth', prompt='Question second?'))
    join(robot)
    version = robot.until(lambda e: isinstance(e, AdapterVersion))
    assert isinstance(version, AdapterVersion) and version.correction_ids == ('first', 'second')
    learned(robot, 'first', 'second')


def learned(robot: Robot, *ids: str) -> None:
    """Step until all of these are learned, and check the answers."""
    until_learned(robot, *ids)
    assert robot.ask('Question first?').text == 'A robot.'
    assert robot.ask('Question second?').text == 'A human.'


def until_learned(robot: Robot, *ids: str) -> None:
    """Step until all of these are learned."""
    def are() -> set[str]:
        return {e.id for e in robot.events if isinstance(e, CorrectionStatus)
                and e.state is CorrectionState.LEARNED}

    while not are() >= set(ids):
        robot.until(lambda e: isinstance(e, CorrectionStatus) and e.state in DONE)


def test_a_late_correction_waits_for_the_next_job(robot: Robot) -> None:
    """Too few of finetune.max_steps are left for it."""
    engine = robot.engine
    engine.update(engine.settings.updated(
        {'finetune.max_steps': 3, 'finetune.learning_rate': 1e-6}))
    engine.correct(Correction('A robot.', id='first', prompt='Question first?'))
    while (job := engine.learner.status().job) is None or not job.steps:
        engine.step()
    engine.correct(Correction('A robot.', id='second', prompt='Question second?'))
    written(robot)
    while (waiting := engine.learner.status().job) is not None and waiting.number == job.number:
        job = waiting
        robot.events += engine.step().events
        if any(e.id == 'first' and e.state is CorrectionState.FAILED
               for e in robot.events if isinstance(e, CorrectionStatus)):
            break
    assert job.steps == 3
    assert job.correction_ids == ('first',)
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == 'second'
                and e.state is CorrectionState.FAILED)


def test_a_correction_that_waited_when_the_job_began_does_not_join(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise all of a long queue would be scored before the first step."""
    engine = robot.engine
    monkeypatch.setattr(selection, 'JOB_CANDIDATES', 2)
    engine.update(engine.settings.updated({'finetune.budget': 0.0}))
    for name in 'abcd':
        correct(robot, name)
    engine.update(engine.settings.updated({'finetune.budget': 1.0}))
    while (job := engine.learner.status().job) is None or not job.steps:
        engine.step()
    waiting = engine.learner.status().queue
    assert [w.id for w in waiting] == ['b', 'c']
    assert all(w.score is None for w in waiting)
