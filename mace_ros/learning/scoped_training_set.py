# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The training set of corrections that have a scope.

The version answers only questions in its scope. So a job trains the corrections with a few
wordings of their questions, and guards what the version that it continues has learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

from mace_ros.api.settings import FinetuneSettings
from mace_ros.finetune.sample import Preference, Sample
from mace_ros.learning.correction_queue import PendingCorrection, texts
from mace_ros.learning.gate import batches, Gate, Group, Measure
from mace_ros.learning.paraphrases import paraphrases, TRAINED
from mace_ros.learning.samples import first_within, rotate, sample
from mace_ros.learning.step_plan import StepPlan
from mace_ros.learning.training_set import TrainingSet
from mace_ros.model.chat import ChatTokenizer
from mace_ros.store.records import AnswerRecord, CorrectionRecord

# Wordings of each question that are trained in a step. They take turns: with four in each step, a
# correction takes 1.4 times as long, and no more paraphrases are answered right.
WORDINGS = 2
REHEARSED = 2       # earlier corrections that are trained in each step, the most similar ones


class ScopedTrainingSetBuilder:
    """Turns corrections and earlier corrections into samples."""

    def __init__(self, chat: ChatTokenizer) -> None:
        """Render prompts and answers by ``chat``."""
        self._chat = chat

    def build(self, corrections: Sequence[PendingCorrection],
              learned: Sequence[CorrectionRecord], tool_calls: Sequence[AnswerRecord] = (), *,
              max_sample_tokens: int) -> TrainingSet:
        """
        Return the samples of a job.

        ``learned`` are the corrections of the version that the job continues, the most similar
        ones first, and ``tool_calls`` answers in the scope of the version that call a tool.
        """
        prompts = {tuple(w.record.prompt_ids) for w in corrections}
        # The question of a replaced correction has the new answer from now on.
        renewed = {w.record.replaces: w.record.corrected for w in corrections}
        earlier = [self._corrected(replace(r, corrected=renewed.get(r.id, r.corrected)))
                   for r in learned if r.prompt_ids not in prompts]
        calls = [sample(self._chat, a.prompt_ids, a.output_ids) for a in tool_calls
                 if a.prompt_ids not in prompts and a.output_ids
                 and len(a.prompt_ids) + len(a.output_ids) <= max_sample_tokens]
        wordings = [self._wordings(w.record) for w in corrections]
        return TrainingSet(
            corrected=[self._corrected(w.record, w.record.weight) for w in corrections],
            # The first wording of each correction comes before the second one of any.
            paraphrases=[s for same in zip_longest(*wordings) for s in same if s is not None],
            earlier=earlier[:REHEARSED],
            gate=Gate([Group('earlier corrections', tuple(earlier), Measure.EXACT,
                             may_not_fall=True),
                       Group('tool calls', tuple(calls), Measure.EXACT, may_not_fall=True)]))

    def step(self, training_set: TrainingSet, corrections: Sequence[PendingCorrection],
             finetune: FinetuneSettings, *, most: int, steps: int) -> StepPlan:
        """
        Return the job's next step, in parts of ``most`` tokens each if possible.

        ``steps`` counts those of the job so far: the wordings of the questions take turns.
        """
        worse = self._rejected(corrections) if finetune.objective == 'dpo' else []
        kept = [*training_set.corrected, *training_set.lost]
        count = min(WORDINGS * len(corrections), len(training_set.paraphrases))
        needed = [*kept, *rotate(training_set.paraphrases, count, steps)]
        must_be_right = first_within(
            needed, most - sum(s.own_tokens for _, _, s in worse),
            at_least=len(training_set.corrected))
        first = [*must_be_right, *(s for _, _, s in worse)]
        preferences = [
            Preference(i, len(must_be_right) + k, correction.reference, finetune.dpo_beta)
            for k, (i, correction, _) in enumerate(worse)]
        others = [*needed[len(must_be_right):],
                  *(s for s in training_set.earlier if s not in training_set.lost)]
        beside = first_within(others, most - sum(s.own_tokens for s in first))
        return StepPlan(
            ([*first, *beside], *batches(others[len(beside):], most)), len(must_be_right),
            tuple(preferences), wordings=max(len(must_be_right) - len(kept), 0))

    def _rejected(self, corrections: Sequence[PendingCorrection],
                  ) -> list[tuple[int, PendingCorrection, Sample]]:
        """Return the rejected answers with their corrections, and the indices of these."""
        return [(i, w, sample(self._chat, w.record.prompt_ids, self._chat.answer(text)))
                for i, w in enumerate(corrections) for text in texts(w.record)[1:]]

    def _corrected(self, record: CorrectionRecord, weight: float = 1.0) -> Sample:
        return sample(
            self._chat, record.prompt_ids, self._chat.answer(record.corrected), weight)

    def _wordings(self, record: CorrectionRecord) -> list[Sample]:
        return [sample(self._chat, self._chat.prompt(messages, record.tools),
                       self._chat.answer(record.corrected))
                for messages in paraphrases(record.messages, TRAINED)]
