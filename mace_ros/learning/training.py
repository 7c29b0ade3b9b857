# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The adapter in training: its weights, optimizer steps over it, and scores under it.

The device holds one set of master weights for all profiles, so one job at a time uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
import math
from typing import Protocol

from torch import Tensor

from mace_ros.api.settings import FinetuneSettings
from mace_ros.finetune.null_space import InputSubspace
from mace_ros.finetune.sample import Sample, SampleScore
from mace_ros.finetune.step import FinetuneStep
from mace_ros.finetune.trainer import AccumulationWindow, Trainer
from mace_ros.learning.gate import BATCH_TOKENS, batches
from mace_ros.learning.prefixes import Prefixes
from mace_ros.learning.step_plan import StepPlan
from mace_ros.learning.task import Task
from mace_ros.memory.budget import MIN_CHUNK_TOKENS
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.packed_model import PackedModel

# Share of the learning rate with which adapters for every question are trained: they must also
# preserve all other answers.
EVERYWHERE_SHARE = 0.6


class StepCost(Protocol):
    """The cost of a fine-tune step on this device."""

    def tokens_within(self, seconds: float) -> int:
        """Return the tokens of a step whose segments take this long at most and fit into memory."""

    def step_s(self, tokens: int) -> float:
        """Return the device time of a step, in seconds."""


@dataclass
class Scored:
    """Scores of samples, and the samples with the scoring version's predictions as targets."""

    scores: list[SampleScore] = field(default_factory=list)
    soft_targets: list[Sample] = field(default_factory=list)


class Training:
    """Loads weights, and makes the steps that the engine runs."""

    def __init__(self, model: PackedModel, lora: LoRAManager, cost: StepCost,
                 settings: FinetuneSettings, oldest_at: Callable[[], float]) -> None:
        """``oldest_at`` returns the arrival of the oldest correction that is not learned yet."""
        self.lora, self.cost = lora, cost
        self._settings = settings
        self._model, self._oldest_at = model, oldest_at
        self.prefixes = Prefixes()
        self._loaded: Trainer | None = None     # the optimizer of the version that was loaded

    def update(self, settings: FinetuneSettings) -> None:
        """Use other settings from the next step on."""
        self._settings = settings

    @property
    def step_tokens(self) -> int:
        """Tokens of a step: one layer of all of them is the longest segment that may run."""
        return self.cost.tokens_within(self._settings.max_blocking_ms / 1e3)

    # -- weights ---------------------------------------------------------------------

    def load(self, tensors: Mapping[str, Tensor] | None, *, protecting: bool = False) -> None:
        """
        Load a version, None for the base model, with a fresh optimizer.

        With ``protecting``, for an adapter for every question, updates leave the protected
        directions alone and are smaller.
        """
        self.lora.protecting = protecting
        if tensors is None:
            self.lora.reset()
        else:
            self.lora.load(tensors)
        self._loaded = Trainer(self.lora, self._learning_rate)

    @property
    def _learning_rate(self) -> float:
        share = EVERYWHERE_SHARE if self.lora.protecting else 1.0
        return self._settings.learning_rate * share

    @property
    def _trainer(self) -> Trainer:
        assert self._loaded is not None, 'load() comes first'
        return self._loaded

    def set_weights(self, tensors: dict[str, Tensor]) -> None:
        """Replace the weights and keep the optimizer's state."""
        self.lora.load(tensors)
        self._trainer.sync_slot()

    def swap_out(self, start: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put the weights that a job began with in place; return the trained ones."""
        trained = self.lora.copies()
        self.set_weights(start)
        return trained

    def swap_in(self, trained: dict[str, Tensor]) -> None:
        """Put weights that were swapped out back in place."""
        self.set_weights(trained)

    # -- steps -----------------------------------------------------------------------

    def steps(self, plan: StepPlan) -> Iterator[FinetuneStep]:
        """
        Yield the parts of an optimizer step; each is made when the one before it is done.

        :attr:`prefixes` must be prepared for the samples.
        """
        worse = {pair.worse for pair in plan.preferences}
        weight = math.fsum(w for k, part in enumerate(plan.parts) for i, s in enumerate(part)
                           if k or i not in worse for w in s.weights[1:])
        tokens = sum(s.own_tokens for part in plan.parts for s in part)
        chunk_tokens = max(self.step_tokens, MIN_CHUNK_TOKENS)
        self._trainer.set_learning_rate(self._learning_rate)
        for k, samples in enumerate(plan.parts):
            recompute = self._settings.recompute
            yield FinetuneStep(
                self._model, self._trainer, samples, keep_graphs=recompute != 'always',
                may_piggyback=recompute != 'never',
                preferences=() if k else plan.preferences,
                window=AccumulationWindow(
                    weight, tokens, begins=k == 0, ends=k == len(plan.parts) - 1),
                chunk_tokens=chunk_tokens, oldest_correction_at=self._oldest_at(),
                pauses_when_scored=k == 0, prefixes=self.prefixes)

    # -- scores ----------------------------------------------------------------------

    def score(self, samples: Sequence[Sample], subspace: InputSubspace | None = None,
              ) -> Task[Scored]:
        """
        Score samples under the current weights, batch by batch.

        ``subspace`` observes the inputs of the adapted layers.
        """
        step_tokens = self.step_tokens
        result = Scored()
        for batch in batches(samples, min(step_tokens, BATCH_TOKENS)):
            yield from self.prefixes.prepare(batch)
            step = FinetuneStep(
                self._model, self._trainer, batch, learns=False,
                chunk_tokens=max(step_tokens, MIN_CHUNK_TOKENS), observer=subspace,
                oldest_correction_at=self._oldest_at(), prefixes=self.prefixes)
            while not step.done:
                yield step
            result.scores += step.scores()
            result.soft_targets += step.soft_targets()
        return result
