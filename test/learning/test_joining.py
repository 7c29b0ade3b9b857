# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What is corrected while a job trains, and joins it, with a small random model."""

from collections.abc import Callable
from pathlib import Path

from peft import PeftModel
import pytest
from support.robot import correct, DONE, Robot
import torch
from transformers import AutoModelForCausalLM

from mace_ros.api.events import (
    AdapterVersion,
    Correction,
    CorrectionState,
    CorrectionStatus,
    VersionState,
)
from mace_ros.learning import learner, selection
from mace_ros.learning.job import Job
from mace_ros.learning.training import Training


def test_what_comes_before_anything_is_learned_joins_the_job(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, began = robot.engine, []
    begin = learner.Learner._begin
    monkeypatch.setattr(learner.Learner, '_begin', lambda self, profile, chosen: (
        began.append(profile), begin(self, profile, chosen))[1])
    engine.correct(Correction('A robot.', id='first', prompt='Question first?'))
    told: list[CorrectionStatus] = []

    def step() -> None:
        told.extend(e for e in engine.step().events if isinstance(e, CorrectionStatus))

    while (job := engine.learner._job) is None or job.step is None:
        step()
    engine.update(engine.settings.updated({'finetune.budget': 0.0}))    # not a step further
    correct(robot, 'second')
    engine.step()
    assert [w.record.id for w in job.corrections] == ['first', 'second'] and job.steps == 0
    engine.update(engine.settings.updated({'finetune.budget': 1.0}))
    while {e.id for e in told if e.state in DONE} != {'first', 'second'}:
        step()
    assert sorted(e.id for e in told if e.state is CorrectionState.TRAINING) == ['first', 'second']
    assert began == ['']
    assert {e.adapter_version for e in told if e.state in DONE} == {1}


@pytest.mark.parametrize('from_disk', [False, True])
def test_what_comes_while_a_job_trains_joins_it(
        robot: Robot, model_folder: Path, monkeypatch: pytest.MonkeyPatch, from_disk: bool) -> None:
    """It is scored under the live version, and what the job has trained so far stays."""
    engine = robot.engine
    if from_disk:
        robot.correct(Correction('In the hall.', id='zeroth', prompt='Question zeroth?'))
    loaded: list[tuple[dict[str, torch.Tensor], ...]] = []
    load = Training._load

    def noted(self: Training, job: Job, tensors: dict[str, torch.Tensor]) -> None:
        before = self.bank.export()
        load(self, job, tensors)
        loaded.append((before, self.bank.export()))

    monkeypatch.setattr(Training, '_load', noted)
    job = join(robot)
    last = robot.until(lambda e: isinstance(e, AdapterVersion))
    assert isinstance(last, AdapterVersion)
    assert (last.state, last.correction_ids) == (VersionState.PUBLISHED, ('first', 'second'))
    (trained, live), (still_live, trained_again) = loaded[:2]
    for name, of_job in trained.items():
        assert torch.equal(of_job, trained_again[name])
        assert torch.equal(live[name], still_live[name])
    assert any(b.any() for name, b in live.items() if 'lora_B' in name) == from_disk
    record = job.corrections[1].record
    tokens = torch.tensor([[*record.prompt_ids, *engine.chat.answer('A human.')]])
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    if from_disk:
        [path] = engine.parts.journal.submit(
            lambda j: [v.path for v in j.versions('') if v.version == 1]).result()
        model = PeftModel.from_pretrained(model, str(engine.learner._store.absolute(path)))
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[0, :-1]
    log_p = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[len(record.prompt_ids) - 1:]
    assert job.corrections[1].leads[0] == pytest.approx(float(log_p.mean()), abs=1e-3)
    assert last.score_before == pytest.approx(
        sum(w.leads[0] for w in job.corrections) / 2, abs=1e-3)
    assert robot.ask('Question first?').text == 'A robot.'
    assert robot.ask('Question second?').text == 'A human.'


def join(robot: Robot, until: Callable[[Job], bool] = lambda job: job.trained is not None) -> Job:
    """Let one correction join the job of another, and return that as soon as it is so far."""
    engine = robot.engine
    engine.update(engine.settings.updated({'finetune.max_steps': 400}))
    engine.correct(Correction('A robot.', id='first', prompt='Question first?'))
    while (job := engine.learner._job) is None or not job.steps:
        robot.events += engine.step().events
    engine.correct(Correction('A human.', id='second', prompt='Question second?'))
    while not until(job):
        assert job.saving is None, 'it did not join'
        robot.events += engine.step().events
    return job


def test_a_device_that_fails_while_something_joins_is_no_fault_of_what_trains(
        robot: Robot) -> None:
    join(robot)
    robot.engine.learner.drop('out of memory')
    assert {w.record.id: w.tries for w in robot.engine.learner._queue} == {
        'first': 1, 'second': 2}
    learned(robot, 'first', 'second')


def test_a_job_that_is_stopped_while_something_joins_begins_anew(robot: Robot) -> None:
    join(robot)
    assert robot.engine.learner.stop('')
    learned(robot, 'first', 'second')


def test_what_trains_stays_if_there_is_less_room_when_something_joins(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    job = join(robot, lambda job: len(job.told) == 2)
    swap_out = Training.swap_out
    shrunk = []

    def shrink(self: Training, *arguments: object) -> None:
        swap_out(self, *arguments)     # type: ignore[arg-type]
        self.tokens_within = lambda seconds: 1
        shrunk.append(job.steps)

    monkeypatch.setattr(Training, 'swap_out', shrink)
    robot.engine.correct(Correction('A cat.', id='third', prompt='Question third?'))
    version = robot.until(lambda e: isinstance(e, AdapterVersion))
    assert shrunk, 'it did not try to join'
    assert isinstance(version, AdapterVersion) and version.correction_ids == ('first', 'second')
    learned(robot, 'first', 'second')
    until_learned(robot, 'third')


def test_what_joins_is_learned_even_if_the_live_version_answers_it_right(robot: Robot) -> None:
    """The version in training might not."""
    robot.correct(Correction('A human.', id='zeroth', prompt='Question second?'))
    job = join(robot)
    version = robot.until(lambda e: isinstance(e, AdapterVersion))
    assert isinstance(version, AdapterVersion) and version.correction_ids == ('first', 'second')
    assert [w.record.id for w in job.corrections] == ['first', 'second']
    learned(robot, 'first', 'second')


def learned(robot: Robot, *ids: str) -> None:
    """Step until all of these are learned, and ask."""
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


def test_what_comes_late_waits_for_the_next_job(robot: Robot) -> None:
    """It would have too few of finetune.max_steps."""
    engine = robot.engine
    engine.update(engine.settings.updated(
        {'finetune.max_steps': 3, 'finetune.learning_rate': 1e-6}))
    engine.correct(Correction('A robot.', id='first', prompt='Question first?'))
    while (job := engine.learner._job) is None or not job.has_changed_weights:
        engine.step()
    engine.correct(Correction('A robot.', id='second', prompt='Question second?'))
    # In time for the next iteration.
    engine.parts.journal.submit(lambda journal: None).result(10)
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == 'first'
                and e.state is CorrectionState.FAILED)
    assert job.steps == 3
    assert [w.record.id for w in job.corrections] == ['first']
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == 'second'
                and e.state is CorrectionState.FAILED)


def test_what_waits_when_a_job_begins_does_not_join_it(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all of a long queue would be looked at before the first step."""
    engine = robot.engine
    monkeypatch.setattr(selection, 'JOB_CANDIDATES', 2)
    engine.update(engine.settings.updated({'finetune.budget': 0.0}))
    for name in 'abcd':
        correct(robot, name)
    engine.update(engine.settings.updated({'finetune.budget': 1.0}))
    while (job := engine.learner._job) is None or not job.has_changed_weights:
        engine.step()
    assert [w.record.id for w in engine.learner._queue] == ['b', 'c']
    assert not any(w.leads for w in engine.learner._queue)
