# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Breadth-first fine-tuning over all edits at once: LocFT-BF.

Yang et al., Fine-tuning Done Right in Model Editing, ICLR 2026 (arXiv:2509.22072). One weight, the
MLP's down projection of one layer, is trained in shuffled mini-batches for up to 25 epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
import random

import torch

from bench.edits.baselines.plain_model import LEARNED_LOSS, PlainModel, Stopwatch, user_turn
from bench.edits.edit_set import Edit
from bench.edits.edited_model import Learned, Reply
from mace_ros.api.settings import Settings

EPOCHS = 25             # as published
BATCH = 8               # published: 100 of 3,000 edits; a hundred edits would be a single batch
# Published for Llama-3-8B and Qwen2.5-7B: 5e-4, at layer 22 of 32 and 6 of 28. SmolLM2-135M learns
# one of 16 edits at 5e-4, and all of 8 with these (rows 1000 and following of WikiBigEdit).
LEARNING_RATE = 2e-3
LAYER_SHARE = 0.5


class LocFtBf:
    """Trains a weight of the base model on all edits; there are no answers in between."""

    def __init__(self, settings: Settings, seed: int) -> None:
        """Load the model; only the trained weight gets gradients."""
        self._plain, self._random = PlainModel(settings, seed), random.Random(seed)
        layers = self._plain.model.model.layers
        self._weight = layers[int(LAYER_SHARE * len(layers))].mlp.down_proj.weight
        self._weight.requires_grad_(True)

    def ask(self, questions: Sequence[str]) -> list[Reply]:
        """Return the answers to questions."""
        return self._plain.ask([[user_turn(question)] for question in questions])

    def learn(self, edits: Sequence[Edit]) -> list[Learned]:
        """Learn all edits; each of them waits for all, and has its share of the cost."""
        watch = Stopwatch(self._plain)
        optimizer = torch.optim.Adam([self._weight], lr=LEARNING_RATE)
        for _ in range(EPOCHS):
            order = self._random.sample(edits, len(edits))
            batches = [order[i:i + BATCH] for i in range(0, len(order), BATCH)]
            losses = [self._plain.step(optimizer, batch) * len(batch) for batch in batches]
            if sum(losses) / len(edits) < LEARNED_LOSS:
                break
        seconds, tokens = watch.read()
        share = 1.0 / len(edits)
        return [Learned('', 'LEARNED', seconds, seconds * share, tokens * share)] * len(edits)

    def restart(self) -> None:
        """Do nothing: only the robot is measured after a restart."""

    def close(self) -> None:
        """Do nothing: the model is freed with this object."""
