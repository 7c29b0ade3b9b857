# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The training-set builder: samples that a job trains on, and samples that the gate guards."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from mace_ros.api.settings import FinetuneSettings
from mace_ros.finetune.sample import Preference, Sample, SampleScore
from mace_ros.learning.anchor_replay import AnchorReplay
from mace_ros.learning.correction_queue import PendingCorrection, texts
from mace_ros.learning.gate import batches, Gate, Group, Measure
from mace_ros.learning.paraphrases import JUDGED, paraphrases, TRAINED
from mace_ros.learning.samples import (
    first_within,
    interleaved,
    rotate,
    sample,
    weighted,
)
from mace_ros.learning.step_plan import StepPlan
from mace_ros.model.chat import ChatTokenizer
from mace_ros.store.records import AnswerRecord, CorrectionRecord

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
    gate: Gate = field(default_factory=lambda: Gate([]))

    def add_baseline(self, scores: Sequence[SampleScore], soft_targets: Sequence[Sample]) -> None:
        """Take in the live version's scores of the guarded samples, and its predictions."""
        self.forgotten = self.gate.wrong(scores)
        self.replayed = interleaved(
            self.replayed, [s for s in soft_targets if s in self.answers])

    def add_lost(self, samples: Sequence[Sample]) -> None:
        """Train on samples that a candidate has lost, from the next step on."""
        self.lost += [s for s in samples if s not in self.lost]


class TrainingSetBuilder:
    """Turns corrections, earlier corrections and answers to keep into samples."""

    def __init__(self, chat: ChatTokenizer, anchors: AnchorReplay) -> None:
        """Replay and guard the answers to these anchors."""
        self._chat, self._anchors = chat, anchors
        self._steps = 0     # of all jobs: a job continues the rotation of the one before it

    def build(self, corrections: Sequence[PendingCorrection], learned: Sequence[CorrectionRecord],
              answers: Sequence[AnswerRecord], tool_calls: Sequence[AnswerRecord] = (), *,
              max_sample_tokens: int, number: int) -> TrainingSet:
        """
        Return the samples of a job, before :meth:`TrainingSet.add_baseline`.

        ``learned`` are earlier corrections and ``answers`` earlier answers of the profile, and
        ``tool_calls`` those that call a tool; ``number`` is the job's, by which the guarded
        earlier corrections rotate.
        """
        prompts: set[tuple[int, ...]] = {tuple(w.record.prompt_ids) for w in corrections}
        # Of each question, the newest correction is kept.
        newest = {r.prompt_ids: r for r in learned if r.prompt_ids not in prompts}
        earlier = [self._corrected(r) for r in newest.values()]
        prompts |= newest.keys()
        own, calls = ([sample(self._chat, a.prompt_ids, a.output_ids) for a in records
                       if a.prompt_ids not in prompts and a.output_ids
                       and len(a.prompt_ids) + len(a.output_ids) <= max_sample_tokens]
                      for records in (answers, tool_calls))
        # The first paraphrase of each correction comes before the second one of any.
        paraphrased = [self._paraphrased(w.record, TRAINED) for w in corrections]
        return TrainingSet(
            corrected=[self._corrected(w.record, w.record.weight) for w in corrections],
            paraphrases=[s for same in zip_longest(*paraphrased) for s in same if s is not None],
            earlier=earlier, answers=own,
            replayed=[s for s in self._anchors.replayed if s.prompt not in prompts],
            gate=Gate([
                Group('paraphrases', tuple(
                    s for w in corrections for s in self._paraphrased(w.record, JUDGED)),
                    Measure.PROBABILITY, may_not_fall=True),
                Group('earlier corrections', tuple(
                    rotate(earlier, min(GUARDED, len(earlier)), number)), Measure.EXACT),
                Group('probes', self._probes(prompts), Measure.PROBABILITY),
                Group('good answers', tuple(own), Measure.PROBABILITY),
                # A program reads them: they are right word for word, or wrong.
                Group('tool calls', tuple(calls), Measure.EXACT, may_not_fall=True)]))

    def step(self, training_set: TrainingSet, corrections: Sequence[PendingCorrection],
             finetune: FinetuneSettings, *, most: int, steps: int = 0,
             rejections: int = 0) -> StepPlan:
        """
        Return the job's next step, in parts of ``most`` tokens each if possible.

        ``steps`` and ``rejections`` count those of the job so far: after a rejected candidate,
        twice as much is replayed.
        """
        count = finetune.replay_samples * (2 if rejections else 1)
        now, self._steps = self._steps, self._steps + 1
        # Up to a quarter of the replayed samples are earlier corrections, in rotation.
        earlier = rotate(
            training_set.earlier, min((count + 3) // 4, len(training_set.earlier)), now)
        needed = [*training_set.corrected, *training_set.lost,
                  *(s for s in earlier if s not in training_set.lost)]
        others = self._others(training_set, needed, finetune, replayed=count - len(earlier),
                              now=now, steps=steps)
        rejected = self._rejected(corrections) if finetune.objective == 'dpo' else []
        worse = [s for _, _, s in rejected]
        must_be_right = first_within(
            needed, most - sum(s.own_tokens for s in worse),
            at_least=len(training_set.corrected))
        preferences = [
            Preference(i, len(must_be_right) + k, correction.reference, finetune.dpo_beta)
            for k, (i, correction, _) in enumerate(rejected)]
        others = [*needed[len(must_be_right):], *others]
        first = [*must_be_right, *worse]
        beside = first_within(others, most - sum(s.own_tokens for s in first))
        return StepPlan(
            ([*first, *beside], *batches(others[len(beside):], most)),
            len(must_be_right), tuple(preferences))

    @staticmethod
    def _others(training_set: TrainingSet, needed: Sequence[Sample], finetune: FinetuneSettings,
                *, replayed: int, now: int, steps: int) -> list[Sample]:
        """Return the samples of a step that need not be right before the job may end."""
        forgotten = rotate(
            training_set.forgotten, min(RELEARNED, len(training_set.forgotten)), now)
        return [*rotate(training_set.paraphrases, 1, steps),
                *(s for s in forgotten if s not in needed),
                *(weighted(s, finetune.replay_weight)
                  for s in rotate(training_set.replayed, max(replayed, 0), now))]

    def _rejected(self, corrections: Sequence[PendingCorrection],
                  ) -> list[tuple[int, PendingCorrection, Sample]]:
        """Return the rejected answers with their corrections, and the indices of these."""
        return [(i, w, sample(self._chat, w.record.prompt_ids, self._chat.answer(text)))
                for i, w in enumerate(corrections) for text in texts(w.record)[1:]]

    def _corrected(self, record: CorrectionRecord, weight: float = 1.0) -> Sample:
        return sample(self._chat, record.prompt_ids, self._chat.answer(record.corrected), weight)

    def _paraphrased(self, record: CorrectionRecord, templates: Sequence[str]) -> list[Sample]:
        return [sample(self._chat, self._chat.prompt(messages, record.tools),
                       self._chat.answer(record.corrected))
                for messages in paraphrases(record.messages, templates)]

    def _probes(self, prompts: Collection[tuple[int, ...]]) -> tuple[Sample, ...]:
        return tuple(s for s in self._anchors.probes if s.prompt not in prompts)
