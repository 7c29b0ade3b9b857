# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The weights that a job trains, its steps over them, and the scores that they give.

There is one set of them on the device, whatever the profile: one job at a time has it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
import math

import torch
from torch import Tensor

from mace_ros.api.events import Event
from mace_ros.api.settings import FinetuneSettings
from mace_ros.finetune.null_space import InputSubspace
from mace_ros.finetune.sample import packed_tokens, Preference, Sample, SampleScore, shared_tokens
from mace_ros.finetune.step import FinetuneStep
from mace_ros.finetune.trainer import AccumulationWindow, Trainer
from mace_ros.learning.gate import BATCH_TOKENS, batches
from mace_ros.learning.job import Job, PullingBack, Scoring
from mace_ros.memory.budget import MIN_CHUNK_TOKENS
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.packed_model import PackedModel

# How exactly it is found how far weights can be pulled back: three halvings.
CLOSE = 1 / 8


class Training:
    """Makes the steps that the engine runs."""

    def __init__(self, model: PackedModel, bank: LoRAManager,
                 oldest_correction_at: Callable[[], float]) -> None:
        """``oldest_correction_at`` tells, on the engine's clock, since when one is not learned."""
        self._model, self.bank = model, bank
        self._oldest_correction_at = oldest_correction_at
        self.settings = FinetuneSettings()
        # How many tokens a step may have whose pieces end within so many seconds.
        self.tokens_within: Callable[[float], int] = lambda seconds: 512

    @property
    def step_tokens(self) -> int:
        """How many tokens a step may have: a piece of learning is a layer of all of them."""
        return self.tokens_within(self.settings.max_blocking_ms / 1e3)

    # -- the weights -----------------------------------------------------------------

    def take_up(self, job: Job, tensors: dict[str, Tensor] | None) -> None:
        """Go on with a version, and an optimizer that knows nothing; None is the base model."""
        if tensors is None:
            self.bank.reset()
        else:
            self.bank.load(tensors)
        job.trainer = Trainer(self.bank, self.settings.learning_rate)

    def swap_out(self, job: Job) -> None:
        """Put what the job began with in place of what it trains, until :meth:`go_on`."""
        job.trained = self.bank.copies()
        self._load(job, job.began_with)

    def go_on(self, job: Job) -> None:
        """Train on what was set aside."""
        assert job.trained is not None
        self._load(job, job.trained)
        job.trained = None

    def pull_back(self, job: Job, samples: Sequence[Sample],
                  still_learned: Callable[[Sequence[SampleScore]], bool],
                  done: Callable[[], list[Event]]) -> list[Event]:
        """
        Pull the weights back towards those that the job began with, and go on with ``done``.

        As far as the scores of ``samples`` allow, which is found by halving three times what lies
        between.
        """
        return self._halve(job, PullingBack(samples, still_learned, done, self.bank.copies()))

    def _halve(self, job: Job, search: PullingBack) -> list[Event]:
        last = search.enough - search.too_little <= CLOSE
        share = search.enough if last else (search.too_little + search.enough) / 2
        self._load(job, {name: torch.lerp(job.began_with[name], end, share)
                         for name, end in search.trained.items()})
        return search.done() if last else self.score(
            job, search.samples, partial(self._go_on_halving, job, search, share))

    def _go_on_halving(self, job: Job, search: PullingBack, share: float,
                       scores: list[SampleScore], taught: list[Sample]) -> list[Event]:
        if search.still_learned(scores):
            search.enough = share
        else:
            search.too_little = share
        return self._halve(job, search)

    def _load(self, job: Job, tensors: dict[str, Tensor]) -> None:
        assert job.trainer is not None
        self.bank.load(tensors)
        job.trainer.sync_slot()

    # -- steps over them -------------------------------------------------------------

    def begin_step(self, job: Job, parts: Sequence[list[Sample]],
                   preferences: Sequence[Preference]) -> None:
        """Begin a step, of parts that are done one after the other."""
        assert job.trainer is not None
        worse = {pair.worse for pair in preferences}
        whole = AccumulationWindow(
            weight=math.fsum(w for k, part in enumerate(parts) for i, s in enumerate(part)
                             if k or i not in worse for w in s.weights[1:]),
            tokens=sum(map(packed_tokens, parts)))
        job.judged, job.chunk_tokens = False, max(self.step_tokens, MIN_CHUNK_TOKENS)
        job.trainer.set_learning_rate(self.settings.learning_rate)
        job.parts = deque(
            (part, replace(whole, begins=k == 0, ends=k == len(parts) - 1))
            for k, part in enumerate(parts))
        self.next_part(job, preferences)

    def next_part(self, job: Job, preferences: Sequence[Preference] = ()) -> None:
        """Go on with the step's next part; the first one has the preferences."""
        assert job.trainer is not None
        samples, whole = job.parts.popleft()
        recompute = self.settings.recompute
        job.step = FinetuneStep(
            self._model, job.trainer, samples, keep_graphs=recompute != 'always',
            may_piggyback=recompute != 'never', preferences=preferences, window=whole,
            chunk_tokens=job.chunk_tokens, oldest_correction_at=self._oldest_correction_at())

    # -- and scores ------------------------------------------------------------------

    def score(self, job: Job, samples: Sequence[Sample],
              done: Callable[[list[SampleScore], list[Sample]], list[Event]],
              directions: InputSubspace | None = None) -> list[Event]:
        """Score samples under the weights as they are, and go on with ``done``."""
        most = self.step_tokens
        job.step, job.scoring = None, Scoring(
            batches(samples, min(most, BATCH_TOKENS), shared=shared_tokens(samples)), done,
            max(most, MIN_CHUNK_TOKENS), directions)
        return self.go_on_scoring(job, job.scoring)

    def go_on_scoring(self, job: Job, scoring: Scoring) -> list[Event]:
        """Score the next batch once the one before it is done."""
        if scoring.step is not None:
            if not scoring.step.done:
                return []
            scoring.scores += scoring.step.scores()
            scoring.taught += scoring.step.soft_targets()
        batch = next(scoring.batches, None)
        if batch is not None:
            assert job.trainer is not None
            scoring.step = FinetuneStep(
                self._model, job.trainer, batch, learns=False, chunk_tokens=scoring.chunk_tokens,
                observer=scoring.directions, oldest_correction_at=self._oldest_correction_at())
            return []
        job.scoring = None
        return scoring.done(scoring.scores, scoring.taught)
