# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The optimizer of the adapter that is being trained, with gradient accumulation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.lora_mapping import TRAINING_SLOT


@dataclass(frozen=True)
class AccumulationWindow:
    """
    The optimizer step to which a part belongs, with the weights and tokens of all its parts.

    Gradients accumulate from the part that ``begins`` the window to the part that ``ends`` it;
    the update follows the last part.
    """

    weight: float
    tokens: int
    begins: bool = True
    ends: bool = True


class Trainer:
    """AdamW over the master weights, which are copied to the training slot after each update."""

    def __init__(self, lora: LoRAManager, learning_rate: float) -> None:
        self._lora = lora
        self._optimizer = torch.optim.AdamW(
            lora.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
        self._accumulated: list[Tensor] = []     # gradients of the parts before the current one
        self.sync_slot()

    def sync_slot(self) -> None:
        """Copy the master weights to the training slot."""
        self._lora.write_slot(TRAINING_SLOT)

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of the next updates."""
        for group in self._optimizer.param_groups:
            group['lr'] = rate

    def zero_grad(self, *, accumulated: bool = True) -> None:
        """Drop the gradients of an unfinished backward, and also the ``accumulated`` ones."""
        self._optimizer.zero_grad(set_to_none=True)
        if accumulated:
            self._accumulated = []

    def accumulate(self) -> None:
        """Add the current gradients to the accumulated ones, for the update after the last part."""
        parameters = self._lora.parameters()
        if self._accumulated:
            pairs = [(total, p.grad) for total, p
                     in zip(self._accumulated, parameters, strict=True) if p.grad is not None]
            torch._foreach_add_(*map(list, zip(*pairs, strict=True)))
        else:
            # Copies, since the next replay of a device graph overwrites its gradients.
            self._accumulated = [torch.zeros_like(p) if p.grad is None else p.grad.clone()
                                 for p in parameters]
        self._optimizer.zero_grad(set_to_none=True)

    def update(self) -> None:
        """
        Apply the accumulated and current gradients to the master weights and the training slot.

        Gradients that are not finite are dropped: a NaN weight in the training slot would
        reach, as 0 * NaN, all tokens of a pass that contains fine-tune tokens.
        """
        if self._accumulated:
            for parameter, total in zip(self._lora.parameters(), self._accumulated, strict=True):
                parameter.grad = total if parameter.grad is None else total.add_(parameter.grad)
            self._accumulated = []
        gradients = [p.grad for p in self._lora.parameters() if p.grad is not None]
        if torch.stack(torch._foreach_norm(gradients)).isfinite().all():
            self._optimizer.step()
            self._lora.project_update()
            self.sync_slot()
        self._optimizer.zero_grad(set_to_none=True)
