# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The base model's answers to the anchors, which are replayed.

Replay trains on soft targets, the base model's own predictions. They are computed once, by the
first job of a process.
"""

from __future__ import annotations

from collections.abc import Iterable

from mace_ros.finetune.sample import Sample
from mace_ros.learning.protected_directions import input_subspace, protect
from mace_ros.learning.samples import sample
from mace_ros.learning.task import Pause, Task
from mace_ros.learning.training import Training
from mace_ros.model.chat import ChatTokenizer


class AnchorReplay:
    """Keeps the answers to the anchors and their soft targets."""

    def __init__(self, chat: ChatTokenizer) -> None:
        """Begin without the answers."""
        self._chat = chat
        self._answers: list[Sample] | None = None
        self._replayed: list[Sample] | None = None

    @property
    def is_missing(self) -> bool:
        """Whether the answers are still unknown."""
        return self._answers is None

    def give(self, answers: Iterable[tuple[list[int], list[int]]]) -> None:
        """Set the answers, as (prompt, output) ids in the order of the anchors."""
        self._answers = [sample(self._chat, prompt, output) for prompt, output in answers]

    @property
    def replayed(self) -> list[Sample]:
        """The answers, with soft targets."""
        assert self._replayed is not None
        return self._replayed

    def prepare(self, training: Training) -> Task[None]:
        """
        Compute the soft targets and the directions to protect, once; wait for the answers.

        Leaves the base model's weights in training.
        """
        while self._answers is None:
            yield Pause.ANCHORS
        if self._replayed is not None:
            return
        training.load(None)
        subspace = input_subspace(training.lora)
        scored = yield from training.score(self._answers, subspace)
        if subspace is not None:
            yield from protect(training.lora, subspace)
        self._replayed = scored.soft_targets
