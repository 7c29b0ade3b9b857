# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Plain LoRA fine-tuning of one edit after the other, all on one adapter, by PEFT."""

from __future__ import annotations

from collections.abc import Sequence

from peft import get_peft_model, LoraConfig
import torch

from bench.edits.baselines.plain_model import LEARNED_LOSS, PlainModel, Stopwatch, user_turn
from bench.edits.edit_set import Edit
from bench.edits.edited_model import Learned, Reply
from mace_ros.api.settings import Settings
from mace_ros.learning.training import EVERYWHERE_SHARE

# The layers that 'output-linear' stands for in most families.
OUTPUT_LINEAR = ('o_proj', 'down_proj')


class LoraPerEdit:
    """
    Trains each edit until its loss is low, with an optimizer of its own.

    Rank, layers, learning rate and the limit of steps are those of the node's adapters for every
    question.
    """

    def __init__(self, settings: Settings, seed: int) -> None:
        """Load the model and attach a fresh adapter."""
        self._plain, self._finetune = PlainModel(settings, seed), settings.finetune
        adapter = settings.adapter
        self._plain.model = get_peft_model(self._plain.model, LoraConfig(
            r=adapter.rank, lora_alpha=adapter.alpha, task_type='CAUSAL_LM',
            target_modules=peft_targets(adapter.target_modules)))

    def ask(self, questions: Sequence[str]) -> list[Reply]:
        """Return the answers to questions."""
        return self._plain.ask([[user_turn(question)] for question in questions])

    def learn(self, edits: Sequence[Edit]) -> list[Learned]:
        """Learn one edit after the other."""
        return [self._learn(edit) for edit in edits]

    def _learn(self, edit: Edit) -> Learned:
        watch = Stopwatch(self._plain)
        optimizer = torch.optim.AdamW(
            [p for p in self._plain.model.parameters() if p.requires_grad],
            lr=self._finetune.learning_rate * EVERYWHERE_SHARE, weight_decay=0.0)
        learned = any(self._plain.step(optimizer, [edit]) < LEARNED_LOSS
                      for _ in range(self._finetune.max_steps))
        seconds, tokens = watch.read()
        return Learned('', 'LEARNED' if learned else 'FAILED', seconds, seconds, tokens)

    def restart(self) -> None:
        """Do nothing: only the robot is measured after a restart."""

    def close(self) -> None:
        """Do nothing: the model is freed with this object."""


def peft_targets(target_modules: str) -> str | list[str]:
    """Return the setting ``adapter.target_modules`` as PEFT takes it."""
    if target_modules == 'output-linear':
        return list(OUTPUT_LINEAR)
    if target_modules == 'all-linear':
        return target_modules
    return [name.strip() for name in target_modules.split(',')]
