# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The training set of a job: the samples that it trains on, and those that the gate guards.

:class:`TrainingSetBuilder` makes that of a version that answers all queries. It can change every
answer, so that answers of the base model and of this robot are replayed.
:mod:`mace_ros.learning.scoped_training_set` makes that of a version with a scope.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mace_ros.api.settings import FinetuneSettings
from mace_ros.finetune.sample import Sample, SampleScore
from mace_ros.learning.anchor_replay import AnchorReplay
from mace_ros.learning.correction_queue import PendingCorrection
from mace_ros.learning.gate import Gate, wrong
from mace_ros.learning.job_inputs import JobRecords
from mace_ros.learning.paraphrases import TRAINED
from mace_ros.learning.samples import (
    answer_samples,
    correction_sample,
    interleaved,
    paraphrase_samples,
    rotate,
    weighted,
)
from mace_ros.learning.step_plan import plan_step, StepPlan
from mace_ros.model.chat import ChatTokenizer

GUARDED = 32    # earlier corrections that the gate guards in one job, in rotation
RELEARNED = 3   # forgotten corrections per step, beside those that are replayed


@dataclass
class TrainingSet:
    """The samples of one job."""

    corrected: list[Sample]                                     # one per correction
    paraphrases: list[Sample] = field(default_factory=list)     # of the corrected questions
    earlier: list[Sample] = field(default_factory=list)         # earlier corrections
    forgotten: list[Sample] = field(default_factory=list)   # those that the live version has lost
    replayed: list[Sample] = field(default_factory=list)        # other answers to keep
    answers: list[Sample] = field(default_factory=list)     # this robot's, to be replayed as well
    lost: list[Sample] = field(default_factory=list)        # lost by an earlier candidate
    gate: Gate = field(default_factory=lambda: Gate({}))        # the guarded samples

    def add_baseline(self, scores: list[SampleScore], soft_targets: Sequence[Sample]) -> None:
        """
        Take in the live version's scores of the guarded samples, and its own answers' targets.

        What the live version has lost is not guarded, but learned again.
        """
        self.forgotten = wrong(self.gate.samples, scores)
        self.gate = self.gate.without(self.forgotten)
        self.replayed = interleaved(self.replayed, soft_targets)

    def add_lost(self, samples: Sequence[Sample]) -> None:
        """Train on samples that a candidate has lost, from the next step on."""
        self.lost += [s for s in samples if s not in self.lost]


class TrainingSetBuilder:
    """Turns corrections, earlier corrections and answers to keep into samples."""

    def __init__(self, chat: ChatTokenizer, anchors: AnchorReplay) -> None:
        """Replay the answers to these anchors."""
        self._chat, self._anchors = chat, anchors
        self._steps = 0     # of all jobs: a job continues the rotation of the one before it

    def build(self, corrections: Sequence[PendingCorrection], records: JobRecords, *,
              max_sample_tokens: int, number: int) -> TrainingSet:
        """
        Return the samples of a job, before :meth:`TrainingSet.add_baseline`.

        ``number`` is the job's, by which the guarded earlier corrections rotate.
        """
        chat, new = self._chat, [c.record for c in corrections]
        prompts, replaced = {tuple(r.prompt_ids) for r in new}, {r.replaces for r in new}
        # Of each question, the newest correction is kept.
        newest = {r.prompt_ids: r for r in records.learned
                  if r.prompt_ids not in prompts and r.id not in replaced}
        earlier = [correction_sample(chat, r) for r in newest.values()]
        prompts |= newest.keys()
        own, calls = (answer_samples(chat, answers, but=prompts, max_tokens=max_sample_tokens)
                      for answers in (records.answers, records.tool_calls))
        return TrainingSet(
            corrected=[correction_sample(chat, r, r.weight) for r in new],
            paraphrases=paraphrase_samples(chat, new, TRAINED), earlier=earlier, answers=own,
            replayed=[s for s in self._anchors.replayed if s.prompt not in prompts],
            gate=Gate({
                'earlier corrections': rotate(earlier, min(GUARDED, len(earlier)), number),
                'tool calls': calls}))

    def step(self, training_set: TrainingSet, corrections: Sequence[PendingCorrection],
             finetune: FinetuneSettings, *, most: int, steps: int = 0) -> StepPlan:
        """
        Return the job's next step, in parts of ``most`` tokens each if possible.

        ``steps`` counts those of the job so far: the paraphrases of the questions take turns.
        """
        count = finetune.replay_samples
        now, self._steps = self._steps, self._steps + 1
        # Up to a quarter of the replayed samples are earlier corrections, in rotation.
        earlier = rotate(
            training_set.earlier, min((count + 3) // 4, len(training_set.earlier)), now)
        needed = [*training_set.corrected, *training_set.lost,
                  *(s for s in earlier if s not in training_set.lost)]
        forgotten = rotate(
            training_set.forgotten, min(RELEARNED, len(training_set.forgotten)), now)
        replayed = rotate(training_set.replayed, max(count - len(earlier), 0), now)
        others = [*rotate(training_set.paraphrases, 1, steps),
                  *(s for s in forgotten if s not in needed),
                  *(weighted(s, finetune.replay_weight) for s in replayed)]
        return plan_step(self._chat, corrections, needed, others, finetune, most=most,
                         at_least=len(training_set.corrected))
