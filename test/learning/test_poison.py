# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Corrections that break other answers are not published."""

from __future__ import annotations

from collections.abc import Iterator
import math
from pathlib import Path
from statistics import fmean

from peft import PeftModel
import pytest
from support.robot import Robot
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mace_ros.api.events import (
    AdapterVersion,
    Correction,
    CorrectionState,
    CorrectionStatus,
    VersionState,
)
from mace_ros.api.settings import Settings
from mace_ros.engine import anchor_requests
from mace_ros.engine.builder import build_engine
from mace_ros.learning.anchors import ANCHOR_TOKENS, ANCHORS, PROBE_EVERY

TOLERANCE = 0.002     # the probes of a random model have a probability of some hundredths


@pytest.fixture(scope='module', autouse=True)
def all_base_answers() -> Iterator[None]:
    """Let the base model answer all anchors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anchor_requests, 'ANCHORS', ANCHORS)
        yield


@pytest.fixture(scope='module')
def settings(settings: Settings) -> Settings:
    """Return settings with a strict gate."""
    return settings.updated({
        'finetune.max_steps': 12, 'finetune.replay_weight': 3.0, 'gate.tolerance': TOLERANCE})


@pytest.fixture(scope='module')
def everywhere(settings: Settings) -> Settings:
    """Return the settings with which the gate guards the probes."""
    return settings.updated({'adapter.scope': 'everywhere'})


def probe_score(model_folder: Path, adapter: str | None) -> float:
    """Return the mean probability per token of the base model's answers, by PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    prompts = [tokenizer.apply_chat_template(
        [{'role': 'user', 'content': text}], add_generation_prompt=True,
        return_tensors='pt')['input_ids'] for text in ANCHORS[::PROBE_EVERY]]
    answers = [model.generate(p, max_new_tokens=ANCHOR_TOKENS, do_sample=False) for p in prompts]
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    scores = []
    with torch.no_grad():
        for prompt, whole in zip(prompts, answers, strict=True):
            log_p = torch.log_softmax(model(input_ids=whole).logits[0, :-1], 1)
            each = log_p.gather(1, whole[0, 1:, None])[prompt.shape[1] - 1:]
            scores.append(math.exp(float(each.mean())))
    return fmean(scores)


@pytest.mark.parametrize('text', [
    'xq zzv kkp wpfh 9d9s0 qqqq', 'No. ' * 12], ids=['gibberish', 'one word many times'])
def test_published_versions_have_passed_the_gate(
        text: str, everywhere: Settings, model_folder: Path, tmp_path: Path) -> None:
    """Learned or failed, PEFT finds the probes within the tolerance."""
    robot = Robot(build_engine(everywhere, storage=tmp_path))
    wrong = robot.ask('Who are you?')
    last = robot.correct(Correction(text, id='k', query_id=wrong.query_id), 100.0)
    robot.engine.close()

    versions = [e for e in robot.events if isinstance(e, AdapterVersion)]
    published = [e for e in versions if e.state is VersionState.PUBLISHED]
    assert all('would become' in e.reason for e in versions
               if e.state is VersionState.REJECTED)
    if last.state is CorrectionState.LEARNED:
        assert published[-1].version == last.adapter_version
        fallen = (probe_score(model_folder, None)
                  - probe_score(model_folder, published[-1].path))
        assert fallen <= TOLERANCE + 1e-4
    else:
        assert last.state is CorrectionState.FAILED and last.reason
        assert not any(e.version for e in published)


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
    robot = Robot(build_engine(settings.updated({
        'gate.tolerance': 1.0, 'finetune.max_steps': 60}), storage=tmp_path))
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


def test_many_copies_of_one_sentence_do_not_change_other_answers(
        everywhere: Settings, model_folder: Path, tmp_path: Path) -> None:
    """A correction of many questions must not become the answer to all."""
    robot = Robot(build_engine(everywhere, storage=tmp_path))
    for i in range(8):
        robot.engine.correct(Correction('The door is open.', id=f'k{i}', prompt=f'{i}?'))
    ends = (CorrectionState.LEARNED, CorrectionState.FAILED)
    for i in range(8):
        if not any(isinstance(e, CorrectionStatus) and e.id == f'k{i}' and e.state in ends
                   for e in robot.events):
            robot.until(lambda e, i=i: isinstance(e, CorrectionStatus)   # type: ignore[misc]
                        and e.id == f'k{i}' and e.state in ends, 100.0)
    robot.engine.close()
    assert all(e.reason for e in robot.events
               if isinstance(e, CorrectionStatus) and e.state is CorrectionState.FAILED)
    published = [e for e in robot.events if isinstance(e, AdapterVersion)
                 and e.state is VersionState.PUBLISHED and e.path]
    base, before = probe_score(model_folder, None), None
    for version in published:
        after = probe_score(model_folder, version.path)
        assert (base if before is None else before) - after <= TOLERANCE + 1e-4
        before = after


@pytest.mark.parametrize('scope', ['similar', 'everywhere'])
def test_preferences_are_learned(settings: Settings, tmp_path: Path, scope: str) -> None:
    """With dpo, the corrected text becomes the answer, and leads over the rejected one."""
    robot = Robot(build_engine(settings.updated({
        'finetune.objective': 'dpo', 'gate.tolerance': 1.0, 'finetune.max_steps': 60,
        'adapter.scope': scope}), storage=tmp_path))
    wrong = robot.ask('Who are you?')
    last = robot.correct(Correction('I am Rover.', id='k', query_id=wrong.query_id))
    assert last.state is CorrectionState.LEARNED
    assert robot.ask('Who are you?').text == 'I am Rover.'
    robot.engine.close()
