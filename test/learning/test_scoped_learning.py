# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Corrections with a scope: what is trained, what is checked, and what stays the base model's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel
import pytest
from support.robot import RANDOM_MODEL, Robot, robot_with, running
import torch
from transformers import AutoModelForCausalLM

from mace_ros.api.events import (
    AdapterVersion,
    Correction,
    CorrectionState,
    CorrectionStatus,
    VersionState,
)
from mace_ros.api.settings import Settings
from mace_ros.learning import scoped_training_set
from mace_ros.learning.job import JobKind
from mace_ros.learning.scoped_training_set import ScopedTrainingSetBuilder
from mace_ros.learning.training import Training

LESSONS = {
    'Who built the greenhouse?': 'Ada.', 'Where is the watering can?': 'In the shed.',
    'What colour is the gate?': 'Blue.', 'When does the market open?': 'At nine.',
    'Which pump is broken?': 'The left one.', 'How many goats are there?': 'Seven.',
    'Whose bicycle is that?': "Tom's.", 'What is in the cellar?': 'Apples.'}
OTHERS = ('Tell me a joke.', 'Why is the sky dark?', 'Hello!', 'Sing a song about rain.')


def teach(robot: Robot, question: str, answer: str) -> None:
    wrong = robot.ask(question)
    done = robot.correct(Correction(answer, id=question, query_id=wrong.query_id))
    assert done.state is CorrectionState.LEARNED, done.reason


@contextmanager
def guarding(nearest: int, others: int) -> Iterator[None]:
    """Let jobs guard fewer of the earlier corrections."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoped_training_set, 'NEAREST', nearest)
        patch.setattr(scoped_training_set, 'OTHERS', others)
        yield


def until_idle(robot: Robot) -> set[JobKind]:
    """Step until nothing is left to do; return the kinds of the jobs that ran."""
    kinds = set()
    idle = 0        # iterations; the one that ends a job asks for another one
    while idle < 2:
        iteration = robot.engine.step()
        robot.events += iteration.events
        idle += 1
        if robot.engine.learner.status().job is not None:
            kinds.add(running(robot).kind)
            idle = 0
        elif iteration.wake_at is not None:
            idle = 0
    return kinds


def test_what_was_not_taught_keeps_the_words_of_the_base_model(robot: Robot) -> None:
    before = [robot.ask(text).text for text in OTHERS]
    for question, answer in list(LESSONS.items())[:3]:
        teach(robot, question, answer)
    for question, answer in list(LESSONS.items())[:3]:
        response = robot.ask(question)
        assert (response.text, response.matched_correction_id) == (answer, question)
        assert response.adapter_version > 0 and response.similarity > 0.9
    after = [robot.ask(text) for text in OTHERS]
    assert [response.text for response in after] == before
    assert {(r.adapter_version, r.matched_correction_id) for r in after} == {(0, '')}


def test_the_base_model_is_asked_nothing_before_a_first_correction(robot: Robot) -> None:
    wrong = robot.ask('Who built the greenhouse?')
    robot.engine.correct(Correction('Ada.', id='k', query_id=wrong.query_id))
    state = None
    while state is not CorrectionState.LEARNED:
        for event in robot.engine.step().events:
            state = event.state if isinstance(event, CorrectionStatus) else state
        assert robot.engine.status().base_questions_left == 0


@pytest.mark.parametrize('forgetful', [False, True])
def test_corrections_that_a_version_has_lost_are_learned_again_in_idle_time(
        settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        forgetful: bool) -> None:
    """Without any rehearsal or check in the jobs themselves, later lessons destroy earlier ones."""
    if forgetful:
        build = ScopedTrainingSetBuilder.build
        monkeypatch.setattr(
            ScopedTrainingSetBuilder, 'build',
            lambda self, corrections, learned, *others, **values: build(
                self, corrections, [], *others, **values))
    values = {**RANDOM_MODEL, 'finetune.budget': 1.0, 'drift.min_budget': 1.0}
    with guarding(4, 1), robot_with(settings.updated(values), tmp_path) as robot:
        for question, answer in LESSONS.items():
            teach(robot, question, answer)
        kinds = until_idle(robot)
        assert JobKind.VERIFICATION in kinds
        if forgetful:
            assert JobKind.REPAIR in kinds
        else:
            assert {question: robot.ask(question).text for question in LESSONS} == LESSONS


def test_a_correction_interrupts_a_verification(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('mace_ros.learning.verification.BATCH', 1)
    scored: list[JobKind] = []      # by these
    score = Training.score

    def counted(self: Training, samples: object) -> object:
        scored.append(running(robot).kind)
        return score(self, samples)     # type: ignore[arg-type]

    *first, interrupting, last = list(LESSONS)[:6]
    with guarding(0, 0):        # so that everything is left to the verification
        for question in first:
            teach(robot, question, LESSONS[question])
        monkeypatch.setattr(Training, 'score', counted)
        while JobKind.VERIFICATION not in scored:
            robot.engine.step()
        assert running(robot).kind is JobKind.VERIFICATION
        teach(robot, interrupting, LESSONS[interrupting])
        assert robot.ask(interrupting).text == LESSONS[interrupting]
        assert until_idle(robot) >= {JobKind.VERIFICATION}
    teach(robot, last, LESSONS[last])       # a job that guards the others restores them as well
    for question in (*first, interrupting, last):
        assert robot.ask(question).text == LESSONS[question]


def test_nothing_is_verified_while_a_correction_waits(robot: Robot) -> None:
    """Otherwise jobs that find nothing to do would read the disk for as long as learning rests."""
    with guarding(0, 0):
        for question in list(LESSONS)[:3]:
            teach(robot, question, LESSONS[question])
    settings = robot.engine.settings

    def budget(share: float) -> None:
        robot.engine.update(settings.updated(
            {'finetune.budget': share, 'drift.min_budget': share}))

    budget(0.0)     # learning is off
    robot.engine.correct(Correction('Apples.', id='k', prompt='What is in the cellar?'))
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == 'k')
    budget(1e-4)    # learning rests
    for _ in range(10):
        robot.engine.step()
        assert robot.engine.learner.status().job is None
    budget(1.0)
    with guarding(0, 0):
        assert until_idle(robot) >= {JobKind.LEARNING, JobKind.VERIFICATION}


def test_peft_gives_the_answers_of_the_node_in_scope(
        robot: Robot, model_folder: Path) -> None:
    """PEFT finds by itself where the adapter begins to act."""
    for question, answer in list(LESSONS.items())[:2]:
        teach(robot, question, answer)
    version = [e for e in robot.events if isinstance(e, AdapterVersion)][-1]
    assert version.state is VersionState.PUBLISHED
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, version.path).eval()
    config = peft.peft_config['default']
    assert tuple(config.alora_invocation_tokens) == robot.engine.chat.invocation != ()
    questions = [*list(LESSONS)[:2], 'Please say: who built the greenhouse?']
    for question in questions:
        ours = robot.ask(question, max_tokens=10)
        assert ours.adapter_version == version.version
        prompt = torch.tensor([robot.engine.chat.prompt([{'role': 'user', 'content': question}])])
        theirs = peft.generate(input_ids=prompt, max_new_tokens=10, do_sample=False,
                               eos_token_id=list(robot.engine.chat.end_tokens), pad_token_id=0)
        assert robot.engine.chat.decode(theirs[0, prompt.shape[1]:].tolist()) == ours.text


def test_a_correction_in_a_conversation_is_learned_after_its_history(robot: Robot) -> None:
    robot.ask('Hello!', conversation_id='c')
    wrong = robot.ask('Who built the greenhouse?', conversation_id='c')
    done = robot.correct(Correction('Ada.', id='k', query_id=wrong.query_id))
    assert done.state is CorrectionState.LEARNED
    robot.ask('Hello!', conversation_id='d')
    assert robot.ask('Who built the greenhouse?', conversation_id='d').text == 'Ada.'
