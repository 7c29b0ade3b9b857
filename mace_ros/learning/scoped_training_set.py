# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The training set of corrections that have a scope.

The version answers only questions in its scope. So a job trains the corrections with a few
paraphrases of their questions, and guards what the version that it continues has learned. The base
model's answers need neither replay nor a guard: the version does not give them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mace_ros.api.settings import FinetuneSettings, Settings
from mace_ros.learning.correction_queue import PendingCorrection
from mace_ros.learning.gate import Gate
from mace_ros.learning.job_inputs import JobRecords
from mace_ros.learning.live_versions import LiveVersions
from mace_ros.learning.paraphrases import TRAINED
from mace_ros.learning.question import questions
from mace_ros.learning.samples import answer_samples, correction_sample, paraphrase_samples, rotate
from mace_ros.learning.step_plan import plan_step, StepPlan
from mace_ros.learning.training_set import TrainingSet
from mace_ros.memory.adapter_slots import ServedVersion
from mace_ros.model.chat import ChatTokenizer
from mace_ros.store.records import AnswerRecord, CorrectionRecord

# Of each question, trained in a step. They take turns: with four in each step, a correction takes
# 1.4 times as long, and no more paraphrases are answered right.
PARAPHRASES_PER_STEP = 2
REHEARSED = 2       # earlier corrections that are trained in each step, the most similar ones


class ScopedTrainingSetBuilder:
    """Turns corrections and those of the version that is continued into samples."""

    def __init__(self, chat: ChatTokenizer, live: LiveVersions) -> None:
        """``live`` tells which questions a version answers."""
        self._chat, self._live = chat, live

    def build(self, corrections: Sequence[PendingCorrection], records: JobRecords,
              continues: ServedVersion, settings: Settings) -> TrainingSet:
        """Return the samples of a job that trains on the version ``continues``."""
        chat, new = self._chat, [c.record for c in corrections]
        prompts = {tuple(r.prompt_ids) for r in new}
        # The question of a replaced correction has the new answer from now on.
        renewed = {r.replaces: r.corrected for r in new}
        learned = self._nearest_first(records.learned, new, continues.profile)
        earlier = [correction_sample(chat, replace(r, corrected=renewed.get(r.id, r.corrected)))
                   for r in learned if r.prompt_ids not in prompts]
        calls = answer_samples(
            chat, self._in_scope(records.tool_calls, new, continues, settings), but=prompts,
            max_tokens=settings.finetune.max_sample_tokens)
        return TrainingSet(
            corrected=[correction_sample(chat, r, r.weight) for r in new],
            paraphrases=paraphrase_samples(chat, new, TRAINED),
            earlier=earlier[:REHEARSED],
            # Also what the live version has lost: a job repairs it.
            gate=Gate({'earlier corrections': earlier, 'tool calls': calls}))

    def step(self, training_set: TrainingSet, corrections: Sequence[PendingCorrection],
             finetune: FinetuneSettings, *, most: int, steps: int) -> StepPlan:
        """
        Return the job's next step, in parts of ``most`` tokens each if possible.

        ``steps`` counts those of the job so far: the paraphrases of the questions take turns.
        """
        known = training_set.paraphrases
        paraphrases = rotate(
            known, min(PARAPHRASES_PER_STEP * len(corrections), len(known)), steps)
        return plan_step(
            self._chat, corrections, [*training_set.corrected, *training_set.lost, *paraphrases],
            [s for s in training_set.earlier if s not in training_set.lost], finetune,
            most=most, at_least=len(training_set.corrected))

    def _nearest_first(self, learned: Sequence[CorrectionRecord], new: Sequence[CorrectionRecord],
                       profile: str) -> list[CorrectionRecord]:
        """Return learned corrections, those that resemble a new one most first."""
        similarity = self._live.scope(profile).similarities(new)
        return sorted(learned, key=lambda record: -similarity.get(record.id, 0.0))

    def _in_scope(self, answers: Sequence[AnswerRecord], new: Sequence[CorrectionRecord],
                  continues: ServedVersion, settings: Settings) -> list[AnswerRecord]:
        """Return the answers that the version is to give from now on."""
        # A wrong call is often made for several paraphrases of a question, and corrected once.
        wrong = {record.rejected for record in new}
        return [a for a in answers if a.text not in wrong and self._live.will_answer(
            continues, questions(a.messages), new, settings.adapter)]
