# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Harmful, contradicting and oversized corrections."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from peft import PeftModel
import pytest
from support.robot import Robot, robot_with
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mace_ros.api.events import (
    AdapterVersion,
    Correction,
    CorrectionState,
    CorrectionStatus,
)
from mace_ros.api.settings import Settings
from mace_ros.engine import anchor_requests
from mace_ros.engine.builder import build_engine
from mace_ros.learning.anchors import ANCHOR_TOKENS, ANCHORS

# None of them is replayed.
OTHERS = ('Where does the wind come from?', 'Can you whistle?', 'Name a famous bridge.',
          'How long is a marathon?', 'Why is the sky dark at night?')


@pytest.fixture(scope='module', autouse=True)
def all_base_answers() -> Iterator[None]:
    """Let the base model answer all anchors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anchor_requests, 'ANCHORS', ANCHORS)
        yield


@pytest.fixture(scope='module')
def settings(settings: Settings) -> Settings:
    """Return settings with which other answers are replayed as by default."""
    return settings.updated({'finetune.replay_weight': 3.0, 'finetune.max_steps': 60})


@pytest.fixture(scope='module')
def everywhere(settings: Settings) -> Settings:
    """Return the settings with which a version answers everything."""
    return settings.updated({'adapter.scope': 'everywhere'})


def change_of_others(model_folder: Path, adapter: str) -> float:
    """Return the mean change of log p per token of the base model's answers, by PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    prompts = [tokenizer.apply_chat_template(
        [{'role': 'user', 'content': text}], add_generation_prompt=True,
        return_tensors='pt')['input_ids'] for text in OTHERS]
    answers = [(p.shape[1], model.generate(p, max_new_tokens=ANCHOR_TOKENS, do_sample=False))
               for p in prompts]
    before = [log_probability(model, *each) for each in answers]
    model = PeftModel.from_pretrained(model, adapter)
    return fmean(abs(log_probability(model, *each) - log_p)
                 for each, log_p in zip(answers, before, strict=True))


def log_probability(model: torch.nn.Module, prompt_tokens: int, whole: torch.Tensor) -> float:
    """Return the mean log p per token of an answer, which follows its prompt."""
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=whole).logits[0, :-1], 1)
    return float(log_p.gather(1, whole[0, 1:, None])[prompt_tokens - 1:].mean())


def test_replay_keeps_other_answers_likely(
        everywhere: Settings, model_folder: Path, tmp_path: Path) -> None:
    """Nonsense is learned; PEFT finds that other answers change less with replay."""
    changes = []
    for count in (0, 16):
        storage = tmp_path / str(count)
        with robot_with(everywhere.updated({'finetune.replay_samples': count}), storage) as robot:
            taught = robot.correct(
                Correction('xq zzv kkp wpfh', id='k', prompt='Who are you?'), 100.0)
            assert taught.state is CorrectionState.LEARNED
            published = [e for e in robot.events if isinstance(e, AdapterVersion)][-1]
        changes.append(change_of_others(model_folder, published.path))
    without, with_replay = changes
    assert with_replay < 0.5 * without


def test_a_correction_that_is_too_long_is_rejected_with_a_reason(
        settings: Settings, tmp_path: Path) -> None:
    robot = Robot(build_engine(settings, storage=tmp_path))
    wrong = robot.ask('Who are you?')
    last = robot.correct(
        Correction('The door is open. ' * 200, id='k', query_id=wrong.query_id))
    assert last.state is CorrectionState.REJECTED
    assert 'finetune.max_sample_tokens' in last.reason
    assert robot.ask('Who are you?').text == wrong.text
    robot.engine.close()


def test_of_contradicting_corrections_the_newest_wins(settings: Settings, tmp_path: Path) -> None:
    robot = Robot(build_engine(settings, storage=tmp_path))
    wrong = robot.ask('Is the door open?')
    for name, text in (('a', 'It is open.'), ('b', 'It is shut.'), ('c', 'It is open.')):
        robot.engine.correct(Correction(text, id=name, query_id=wrong.query_id))
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == 'c'
                and e.state is CorrectionState.LEARNED, 100.0)
    states = {e.id: e.state for e in robot.events if isinstance(e, CorrectionStatus)}
    assert states == {'a': CorrectionState.SUPERSEDED, 'b': CorrectionState.SUPERSEDED,
                      'c': CorrectionState.LEARNED}
    assert robot.ask('Is the door open?').text == 'It is open.'
    after = robot.correct(Correction('It is shut.', id='d', query_id=wrong.query_id))
    assert after.state is CorrectionState.LEARNED
    assert robot.ask('Is the door open?').text == 'It is shut.'
    robot.engine.close()


@pytest.mark.parametrize('scope', ['similar', 'everywhere'])
def test_preferences_are_learned(settings: Settings, tmp_path: Path, scope: str) -> None:
    """With dpo, the corrected text becomes the answer, and leads over the rejected one."""
    robot = Robot(build_engine(settings.updated({
        'finetune.objective': 'dpo', 'adapter.scope': scope}), storage=tmp_path))
    wrong = robot.ask('Who are you?')
    last = robot.correct(Correction('I am Rover.', id='k', query_id=wrong.query_id))
    assert last.state is CorrectionState.LEARNED
    assert robot.ask('Who are you?').text == 'I am Rover.'
    robot.engine.close()
