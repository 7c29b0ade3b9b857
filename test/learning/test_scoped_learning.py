# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Corrections with a scope: what is trained, what is checked, and what stays the base model's."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from support.robot import Robot
import torch
from transformers import AutoModelForCausalLM

from mace_ros.api.events import (
    AdapterVersion,
    Correction,
    CorrectionState,
    CorrectionStatus,
    VersionState,
)

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


def test_a_correction_has_an_adapter_of_its_own(robot: Robot) -> None:
    """So nothing that was learned before is touched, however many corrections follow."""
    for question, answer in LESSONS.items():
        teach(robot, question, answer)
    asked = {question: robot.ask(question) for question in LESSONS}
    assert {question: response.text for question, response in asked.items()} == LESSONS
    assert [response.adapter_version for response in asked.values()] == list(
        range(1, len(LESSONS) + 1))


def test_a_correction_of_a_similar_question_continues_the_version_that_answers_it(
        robot: Robot) -> None:
    """Both hold afterwards, since the version must not lose what it has learned."""
    near = 'What colour is the garden gate?'
    teach(robot, 'What colour is the gate?', 'Blue.')
    teach(robot, 'How many goats are there?', 'Seven.')
    teach(robot, near, 'Green.')
    asked = [robot.ask(text) for text in (
        'What colour is the gate?', 'How many goats are there?', near)]
    assert [(r.text, r.adapter_version) for r in asked] == [
        ('Blue.', 3), ('Seven.', 2), ('Green.', 3)]


def test_a_correction_of_what_was_taught_in_other_words_replaces_it(robot: Robot) -> None:
    """Otherwise the version would have to give both answers to one question."""
    question, words = 'What colour is the gate?', 'Hello! What colour is the gate?'
    teach(robot, question, 'Blue.')
    wrong = robot.ask(words)
    assert (wrong.text, wrong.matched_correction_id) == ('Blue.', question)
    done = robot.correct(Correction('Green.', id='newer', query_id=wrong.query_id))
    assert done.state is CorrectionState.LEARNED, done.reason
    assert [(e.state, e.reason) for e in robot.events if isinstance(e, CorrectionStatus)
            and e.id == question][-1] == (CorrectionState.SUPERSEDED, 'by correction newer')
    asked = [robot.ask(text) for text in (question, words)]
    assert [(r.text, r.matched_correction_id) for r in asked] == [('Green.', 'newer')] * 2


def test_a_contradiction_replaces_what_was_taught_in_a_conversation(robot: Robot) -> None:
    """And the other way round; otherwise a version would have to say both."""
    name = 'What is your name?'
    robot.ask('Hello!', conversation_id='c')
    wrong = robot.ask(name, conversation_id='c')
    done = robot.correct(Correction('Rover.', id='first', query_id=wrong.query_id))
    assert done.state is CorrectionState.LEARNED, done.reason
    for number, text in enumerate(('Bella.', 'Rex.')):
        fields = {'prompt': name} if number == 0 else {'query_id': robot.ask(
            name, conversation_id='c').query_id}
        done = robot.correct(Correction(text, id=text, **fields))
        assert done.state is CorrectionState.LEARNED, done.reason
        response = robot.ask(name)
        assert (response.text, response.matched_correction_id) == (text, text)
    superseded = {e.id: e.reason for e in robot.events if isinstance(e, CorrectionStatus)
                  and e.state is CorrectionState.SUPERSEDED}
    assert superseded == {'first': 'by correction Bella.', 'Bella.': 'by correction Rex.'}


def test_a_narrower_question_leaves_the_right_answer_of_the_plain_one(robot: Robot) -> None:
    """It got that answer wrongly, and is corrected."""
    plain, narrower = 'What colour is the gate?', 'What colour is the garden gate?'
    teach(robot, plain, 'Blue')
    wrong = robot.ask(narrower, max_tokens=2)
    assert (wrong.text, wrong.matched_correction_id) == ('Blue', plain)
    done = robot.correct(Correction('Green', id=narrower, query_id=wrong.query_id))
    assert done.state is CorrectionState.LEARNED, done.reason
    asked = [robot.ask(text) for text in (plain, narrower)]
    assert [(r.text, r.matched_correction_id) for r in asked] == [
        ('Blue', plain), ('Green', narrower)]


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
    questions = [list(LESSONS)[1], 'Please say: where is the watering can?']
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
