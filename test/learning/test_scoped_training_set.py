# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What a job under a scope trains in each step, and what it guards."""

from __future__ import annotations

from collections import Counter

from support.robot import Robot

from mace_ros.api.settings import FinetuneSettings, Settings
from mace_ros.learning.correction_queue import PendingCorrection
from mace_ros.learning.job_inputs import JobRecords
from mace_ros.learning.scoped_training_set import PARAPHRASES_PER_STEP, ScopedTrainingSetBuilder
from mace_ros.memory.adapter_slots import BASE
from mace_ros.model.chat import ChatTokenizer
from mace_ros.store.records import CorrectionRecord


def correction(chat: ChatTokenizer, name: str, question: str, corrected: str,
               **values: str) -> CorrectionRecord:
    """Return a correction of the answer to a question."""
    messages = ({'role': 'user', 'content': question},)
    return CorrectionRecord(name, tuple(chat.prompt(messages)), messages, corrected, **values)  # type: ignore[arg-type]


def test_the_paraphrases_of_a_question_take_turns(robot: Robot) -> None:
    """A step stays short, and each paraphrase is trained equally often."""
    chat, finetune = robot.engine.chat, FinetuneSettings()
    builder = ScopedTrainingSetBuilder(chat, robot.engine.parts.live)
    waiting = [PendingCorrection(correction(chat, 'k', 'Who are you?', 'Rover.'), 0.0)]
    samples = builder.build(waiting, JobRecords(), BASE, Settings())
    count = len(samples.paraphrases)
    assert count > PARAPHRASES_PER_STEP
    plans = [builder.step(samples, waiting, finetune, most=4096, steps=n) for n in range(count)]
    assert {(plan.must_be_right, len(plan.parts)) for plan in plans} == {
        (1 + PARAPHRASES_PER_STEP, 1)}
    assert all(plan.parts[0][0] == samples.corrected[0] for plan in plans)
    trained = Counter(s for plan in plans for s in plan.parts[0][1:])
    assert trained == dict.fromkeys(samples.paraphrases, PARAPHRASES_PER_STEP)


def test_the_question_of_a_replaced_correction_is_guarded_with_the_new_answer(
        robot: Robot) -> None:
    chat = robot.engine.chat
    older = correction(chat, 'older', 'Who are you?', 'Rover.')
    other = correction(chat, 'other', 'Who am I?', 'Ann.')
    newer = correction(chat, 'newer', 'Hello! Who are you?', 'Bella.', replaces='older')
    samples = ScopedTrainingSetBuilder(chat, robot.engine.parts.live).build(
        [PendingCorrection(newer, 0.0)], JobRecords((older, other)), BASE, Settings())
    assert [s.tokens for s in samples.gate.samples] == [
        (*older.prompt_ids, *chat.answer('Bella.')), (*other.prompt_ids, *chat.answer('Ann.'))]
