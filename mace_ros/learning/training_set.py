# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What a job learns, what it keeps, and what the gate looks at."""

from __future__ import annotations

from itertools import zip_longest

from mace_ros.api.settings import FinetuneSettings
from mace_ros.finetune.sample import Preference, Sample, shared_tokens
from mace_ros.learning.anchors import PROBE_EVERY
from mace_ros.learning.gate import batches, Gate, Group, Measure
from mace_ros.learning.job import Job
from mace_ros.learning.paraphrases import JUDGED, paraphrases, TRAINED
from mace_ros.learning.samples import first_within, own_tokens, sample, turn, weighted
from mace_ros.model.chat import ChatTokenizer
from mace_ros.store.journal import CorrectionRecord

GUARDED = 32    # earlier corrections that the gate looks at, by turns
RELEARNED = 3   # forgotten ones that a step trains again, beside what is replayed


class TrainingSetBuilder:
    """Makes samples of corrections, earlier ones, and answers that are to stay."""

    def __init__(self, chat: ChatTokenizer) -> None:
        """Begin without the base model's answers."""
        self._chat = chat
        self.anchors: list[tuple[list[int], list[int]]] | None = None    # prompt, output
        self.teachers: list[Sample] | None = None   # those replayed, as the base model predicts
        self._steps = 0     # of all jobs: a short one goes on with replay where the last one ended

    @property
    def replayed_anchors(self) -> list[Sample]:
        """The base model's answers that are replayed."""
        assert self.anchors is not None
        return [sample(p, o) for i, (p, o) in enumerate(self.anchors) if i % PROBE_EVERY]

    def gather(self, job: Job, finetune: FinetuneSettings, number: int) -> list[Sample]:
        """
        Fill in what the job trains and guards; return the answers of this robot among it.

        ``number`` says whose turn it is among many earlier corrections.
        """
        assert self.anchors is not None and self.teachers is not None
        fetched = job.fetched.result()
        job.samples = [
            sample(w.record.prompt_ids, self._chat.answer(w.record.corrected), w.record.weight)
            for w in job.corrections]
        prompts = {tuple(w.record.prompt_ids) for w in job.corrections}
        # The newest correction of a question is the one to keep.
        newest = {r.prompt_ids: r for r in fetched.learned if r.prompt_ids not in prompts}
        job.kept = [sample(r.prompt_ids, self._chat.answer(r.corrected)) for r in newest.values()]
        prompts |= newest.keys()
        own = [sample(a.prompt_ids, a.output_ids) for a in fetched.answers
               if a.prompt_ids not in prompts and a.output_ids
               and len(a.prompt_ids) + len(a.output_ids) <= finetune.max_sample_tokens]
        # The first template of each correction before the second of any.
        variants = [[sample(self._chat.prompt(messages), self._chat.answer(w.record.corrected))
                     for messages in paraphrases(w.record.messages, TRAINED)]
                    for w in job.corrections]
        job.variants = [s for same in zip_longest(*variants) for s in same if s is not None]
        job.replayed = [s for s in self.teachers if s.prompt not in prompts]
        job.gate = Gate([
            Group('paraphrases', tuple(
                sample(self._chat.prompt(messages), self._chat.answer(w.record.corrected))
                for w in job.corrections
                for messages in paraphrases(w.record.messages, JUDGED)),
                Measure.PROBABILITY, must_rise=True),
            Group('earlier corrections', tuple(
                turn(job.kept, min(GUARDED, len(job.kept)), number)), Measure.EXACT),
            Group('probes', tuple(sample(p, o) for p, o in self.anchors[::PROBE_EVERY]
                                  if tuple(p) not in prompts), Measure.PROBABILITY),
            Group('good answers', tuple(own), Measure.PROBABILITY)])
        return own

    def step(self, job: Job, finetune: FinetuneSettings,
             most: int) -> tuple[list[list[Sample]], list[Preference]]:
        """
        Return the parts of the job's next step, ``most`` tokens each if possible.

        The first one has the preferences, and what must be right before the job may end.
        """
        count = finetune.replay_samples * (2 if job.rejections else 1)
        now, self._steps = self._steps, self._steps + 1
        # Up to a quarter of what is replayed are earlier corrections; all in their turn.
        kept = turn(job.kept, min((count + 3) // 4, len(job.kept)), now)
        needed = [*job.samples, *job.lost, *(s for s in kept if s not in job.lost)]
        rejected = [(i, waiting, sample(waiting.record.prompt_ids, self._chat.answer(text)))
                    for i, waiting in enumerate(job.corrections if finetune.objective == 'dpo'
                                                else ())
                    for text in texts(waiting.record)[1:]]
        worse = [s for _, _, s in rejected]
        again = [s for s in turn(job.forgotten, min(RELEARNED, len(job.forgotten)), now)
                 if s not in needed]
        replayed = [weighted(s, finetune.replay_weight)
                    for s in turn(job.replayed, max(count - len(kept), 0), now)]
        others = [*turn(job.variants, 1, job.steps), *again, *replayed]
        shared = shared_tokens([*needed, *worse, *others])
        room = most - shared
        must_be_right = first_within(
            needed, room - sum(own_tokens(s, shared) for s in worse),
            at_least=len(job.samples), shared=shared)
        job.must_be_right = len(must_be_right)
        preferences = [
            Preference(i, len(must_be_right) + k, waiting.reference, finetune.dpo_beta)
            for k, (i, waiting, _) in enumerate(rejected)]
        others = [*needed[len(must_be_right):], *others]
        first = [*must_be_right, *worse]
        beside = first_within(
            others, room - sum(own_tokens(s, shared) for s in first), shared=shared)
        return [[*first, *beside],
                *batches(others[len(beside):], most, shared=shared)], preferences


def texts(record: CorrectionRecord) -> list[str]:
    """Return the corrected text, and the rejected one if it is known."""
    return [record.corrected, *([record.rejected] if record.rejected.strip() else [])]
