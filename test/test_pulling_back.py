# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What was trained further than it had to be, with a small random model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel, set_peft_model_state_dict
import pytest
from robot import correct, DONE, Robot
from safetensors.torch import load_file
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mace_ros.events import Correction, CorrectionProgress
from mace_ros.execution.sample import SampleScore
from mace_ros.learning.job import Job
from mace_ros.learning.learner import LEARNED_MARGIN, Learner, RIGHT_MARGIN
from mace_ros.learning.samples import sample
from mace_ros.learning.training import CLOSE, Training


@pytest.fixture
def pulled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Job, dict[str, Tensor]]]:
    """Return the jobs whose weights were taken back, with what they had trained."""
    found: list[tuple[Job, dict[str, Tensor]]] = []
    original = Training.pull_back

    def noted(self: Training, job: Job, *arguments: object) -> object:
        found.append((job, self.bank.copies()))
        return original(self, job, *arguments)      # type: ignore[arg-type]

    monkeypatch.setattr(Training, 'pull_back', noted)
    return found


@pytest.mark.parametrize('from_disk', [False, True])
def test_no_more_is_published_than_what_was_corrected_needs(
        robot: Robot, model_folder: Path, pulled: list[tuple[Job, dict[str, Tensor]]],
        monkeypatch: pytest.MonkeyPatch, from_disk: bool) -> None:
    """An eighth less of the way from the live version, and it would not lead clearly."""
    if from_disk:
        robot.correct(Correction('In the hall.', id='zeroth', prompt='Question zeroth?'))
    begin = Learner._begin

    def begin_long(*arguments: Any) -> Job:
        job = begin(*arguments)
        job.least_steps = 30
        return job

    monkeypatch.setattr(Learner, '_begin', begin_long)
    robot.correct(Correction('A robot.', id='k', prompt='What are you?'))
    job, trained = pulled[-1]
    assert not all(torch.equal(job.began_with[name], end) for name, end in trained.items())
    folder = robot.engine.learner._store.absolute(robot.engine._journal.submit(
        lambda j: max(j.versions(''), key=lambda v: v.version).path).result())
    published = load_file(folder / 'adapter_model.safetensors')
    share = next(share for share in (i * CLOSE for i in range(1, round(1 / CLOSE) + 1))
                 if same(published, between(job, trained, share)))
    assert share < 1.0, 'nothing was taken back'
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), folder)
    assert lead(peft, job) >= LEARNED_MARGIN - 1e-3
    set_peft_model_state_dict(peft, between(job, trained, share - CLOSE))
    assert lead(peft, job) < LEARNED_MARGIN + 1e-3


def between(job: Job, trained: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return what lies on the way from the live version to what was trained."""
    return {name: begun + share * (trained[name] - begun)
            for name, begun in job.began_with.items()}


def same(published: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.allclose(published[name], t, rtol=1e-4, atol=1e-6)
               for name, t in other.items())


def lead(model: torch.nn.Module, job: Job) -> float:
    """Return by how much the job's correction leads, by transformers and PEFT."""
    only, = job.samples
    ids = torch.tensor(only.tokens)
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1]
    first = len(only.prompt) - 1
    right = logits.gather(1, ids[1:, None])
    others = logits.scatter(1, ids[1:, None], -torch.inf).amax(1, keepdim=True)
    return float((right - others)[first:].min())


def test_what_leads_by_too_little_is_still_to_be_learned(robot: Robot) -> None:
    job = Job('', [], None)     # type: ignore[arg-type]
    job.samples, job.lost = [sample([1], [2])] * 2, [sample([1], [3])]

    def learned(*margins: float) -> bool:
        return robot.engine.learner._still_learned(
            job, [SampleScore(-margin, 1, True, margin) for margin in margins])

    assert not learned(2.0, LEARNED_MARGIN - 0.1, 2.0)
    assert not learned(2.0, 2.0, RIGHT_MARGIN - 0.1)
    assert job.score_after is None
    assert learned(2.0, LEARNED_MARGIN + 0.5, RIGHT_MARGIN)
    assert job.score_after == pytest.approx(-(2.0 + LEARNED_MARGIN + 0.5) / 2)


def test_what_continuous_rehearses_is_not_taken_back(
        robot: Robot, pulled: list[tuple[Job, dict[str, Tensor]]]) -> None:
    """All of it would be: it was learned before."""
    robot.engine.update(robot.engine.settings.updated({
        'scheduler.policy': 'continuous', 'finetune.period_steps': 2}))
    correct(robot, 'k')
    robot.until(lambda e: isinstance(e, CorrectionProgress) and e.state in DONE)
    learned = robot.engine.live_version('')
    while robot.engine.live_version('') == learned:
        robot.events += robot.engine.step().events
    assert [job.rehearses for job, _ in pulled] == [False]
