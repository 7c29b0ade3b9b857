# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Weight interpolation: a candidate moves back towards the live version up to the margin."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import gc
from pathlib import Path
from typing import Any
import weakref

from peft import PeftModel, set_peft_model_state_dict
import pytest
from safetensors.torch import load_file
from support.robot import Robot, robot_with, running
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mace_ros.api.events import Correction, CorrectionState
from mace_ros.api.settings import Settings
from mace_ros.finetune.sample import Sample, SampleScore
from mace_ros.finetune.trainer import Trainer
from mace_ros.learning import criteria, interpolation, learning_job
from mace_ros.learning.criteria import LEARNED_MARGIN, learned_well, RIGHT_MARGIN
from mace_ros.learning.gate import wrong
from mace_ros.learning.interpolation import PRECISION
from mace_ros.learning.training import Training
from mace_ros.model.lora_manager import LoRAManager


@dataclass(frozen=True)
class Interpolated:
    """The weights at both ends, and the samples that must stay right."""

    start: Mapping[str, Tensor]
    trained: Mapping[str, Tensor]
    samples: tuple[Sample, ...]


@pytest.fixture(scope='module')
def settings(settings: Settings) -> Settings:
    """Return settings with which a version answers everything, so it must change little."""
    return settings.updated({'adapter.scope': 'everywhere'})


@pytest.fixture
def interpolated(monkeypatch: pytest.MonkeyPatch) -> list[Interpolated]:
    """Return the interpolations so far."""
    found: list[Interpolated] = []
    original = interpolation.interpolate

    def noted(training: Training, start: Mapping[str, Tensor], samples: Sequence[Sample],
              *arguments: Any) -> Any:
        found.append(Interpolated(start, training.lora.copies(), tuple(samples)))
        monkeypatch.setattr(criteria, 'LEARNED_MARGIN', LEARNED_MARGIN)
        return original(training, start, samples, *arguments)

    monkeypatch.setattr(learning_job, 'interpolate', noted)
    return found


@pytest.mark.parametrize('from_disk', [False, True])
def test_the_published_version_is_the_nearest_with_the_margin(
        robot: Robot, model_folder: Path, interpolated: list[Interpolated],
        monkeypatch: pytest.MonkeyPatch, from_disk: bool) -> None:
    """One bisection step less would miss the margin."""
    if from_disk:
        robot.correct(Correction('In the hall.', id='zeroth', prompt='Question zeroth?'))
    monkeypatch.setattr(criteria, 'LEARNED_MARGIN', 3.0)   # train past the margin
    robot.correct(Correction('A robot.', id='k', prompt='What are you?'))
    way = interpolated[-1]
    assert not all(torch.equal(way.start[name], end) for name, end in way.trained.items())
    folder = robot.engine.parts.store.absolute(robot.engine.parts.journal.submit(
        lambda j: max(j.versions(''), key=lambda v: v.version).path).result())
    published = load_file(folder / 'adapter_model.safetensors')
    share = next(share for share in (i * PRECISION for i in range(1, round(1 / PRECISION) + 1))
                 if same(published, between(way, share)))
    assert share < 1.0, 'the weights were not interpolated'
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), folder)
    assert lead(peft, way.samples[0]) >= LEARNED_MARGIN - 1e-3
    set_peft_model_state_dict(peft, between(way, share - PRECISION))
    assert lead(peft, way.samples[0]) < LEARNED_MARGIN + 1e-3


def between(way: Interpolated, share: float) -> dict[str, Tensor]:
    """Return weights between the live version (share 0) and the trained ones (1)."""
    return {name: begun + share * (way.trained[name] - begun)
            for name, begun in way.start.items()}


def same(published: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.allclose(published[name], t, rtol=1e-4, atol=1e-6)
               for name, t in other.items())


def lead(model: torch.nn.Module, only: Sample) -> float:
    """Return the least lead of a corrected answer's tokens in logits, by transformers and PEFT."""
    ids = torch.tensor(only.tokens)
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1]
    first = len(only.prompt) - 1
    right = logits.gather(1, ids[1:, None])
    others = logits.scatter(1, ids[1:, None], -torch.inf).amax(1, keepdim=True)
    return float((right - others)[first:].min())


def test_a_lead_below_the_margin_is_not_learned() -> None:
    def learned(*margins: float) -> bool:
        return learned_well([SampleScore(-m, 1, True, m) for m in margins], 2)

    assert learned(2.0, LEARNED_MARGIN, RIGHT_MARGIN)
    assert not learned(2.0, LEARNED_MARGIN - 0.1, 2.0)
    assert not learned(2.0, 2.0, RIGHT_MARGIN - 0.1)


def test_relearned_corrections_stay_right(
        robot: Robot, interpolated: list[Interpolated]) -> None:
    """The live version had lost it, so the gate does not guard it."""
    corrections = (('In the hall.', 'Question first?'), ('A robot.', 'Question second?'))
    for text, prompt in corrections:
        robot.correct(Correction(text, id=text, prompt=prompt))
    chat = robot.engine.chat
    first, second = (
        (*chat.prompt([{'role': 'user', 'content': prompt}]), *chat.answer(text))
        for text, prompt in corrections)
    assert [s.tokens for s in interpolated[1].samples] == [second, first]


@pytest.mark.parametrize(('room', 'interpolations'), [(4096, 2), (1, 1)])
def test_interpolation_keeps_what_a_candidate_has_lost(
        robot: Robot, interpolated: list[Interpolated], monkeypatch: pytest.MonkeyPatch,
        room: int, interpolations: int) -> None:
    """If a step's first part has no room for it, nothing is interpolated after that loss."""
    robot.correct(Correction('In the hall.', id='a', prompt='Question first?'))
    kept, losses = interpolated.pop().samples[0], [True]

    def lose_once(samples: Sequence[Sample], scores: Sequence[SampleScore]) -> list[Sample]:
        if not samples or not losses:
            return wrong(samples, scores)
        losses.pop()
        return list(samples)

    monkeypatch.setattr(learning_job, 'wrong', lose_once)
    monkeypatch.setattr(Training, 'step_tokens', property(lambda _: room))
    taught = robot.correct(Correction('A robot.', id='k', prompt='Question second?'))
    assert (taught.state, losses, len(interpolated)) == (
        CorrectionState.LEARNED, [], interpolations)
    assert all(kept in each.samples for each in interpolated[1:])


def test_only_a_version_for_every_question_is_trained_with_care(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves directions alone, and takes smaller steps: no scope protects other answers."""
    protecting, rates = {}, {}
    set_rate = Trainer.set_learning_rate

    def noted(self: Trainer, rate: float) -> None:
        rates[robot.engine.lora.protecting] = rate
        set_rate(self, rate)

    monkeypatch.setattr(Trainer, 'set_learning_rate', noted)
    for name, scope in (('style', 'everywhere'), ('fact', 'similar'), ('again', 'everywhere')):
        robot.correct(Correction('A robot.', id=name, prompt=f'Question {name}?', scope=scope))
        protecting[name] = robot.engine.lora.protecting
    assert protecting == {'style': True, 'fact': False, 'again': True}
    usual = robot.engine.settings.finetune.learning_rate
    assert rates == {True: pytest.approx(0.6 * usual), False: usual}


def test_nothing_is_interpolated_in_the_last_round(
        settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no other chance for what the interpolation may lose."""
    steps: list[int] = []       # optimizer steps before each interpolation

    def noted(*arguments: Any) -> Any:
        steps.append(running(robot).steps)
        return interpolation.interpolate(*arguments)

    monkeypatch.setattr(learning_job, 'interpolate', noted)
    correction = Correction('A robot.', id='k', prompt='What are you?')
    with robot_with(settings, tmp_path / 'first') as robot:
        robot.correct(correction)
    with robot_with(settings, tmp_path / 'second', finetune__max_steps=steps[0]) as robot:
        assert robot.correct(correction).state is CorrectionState.LEARNED
    assert len(steps) == 1


@pytest.mark.parametrize('scope', ['similar', 'everywhere'])
def test_an_ended_job_frees_its_weights(
        robot: Robot, monkeypatch: pytest.MonkeyPatch, scope: str) -> None:
    """In a reference cycle they would stay on the device until the next collection."""
    kept: list[weakref.ref[Tensor]] = []
    copies = LoRAManager.copies

    def noted(self: LoRAManager) -> dict[str, Tensor]:
        result = copies(self)
        kept.extend(weakref.ref(t) for t in result.values())
        return result

    monkeypatch.setattr(LoRAManager, 'copies', noted)
    robot.engine.update(robot.engine.settings.updated({'adapter.scope': scope}))
    gc.disable()
    try:
        robot.correct(Correction('A robot.', id='k', prompt='What are you?'))
        assert kept and not [t for t in kept if t() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize('policy', ['continuous', 'periodic'])
def test_the_baselines_publish_without_interpolation(
        robot: Robot, interpolated: list[Interpolated], policy: str) -> None:
    robot.engine.update(robot.engine.settings.updated({
        'scheduler.policy': policy, 'finetune.period_s': 0.1}))
    robot.correct(Correction('A robot.', id='k', prompt='What are you?'))
    assert robot.engine.live_version('') and not interpolated
