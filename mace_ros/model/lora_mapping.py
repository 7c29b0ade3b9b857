# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Adapter slots, and the slot that each token of a packed pass uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn, Tensor

BASE_SLOT = 0               # the base model, without an update
TRAINING_SLOT = 1           # the adapter that is being trained
FIRST_SERVED_SLOT = 2       # this slot and those after it hold served versions


class InputObserver(Protocol):
    """Receives the inputs of adapted layers during a training forward."""

    def observe(self, layer: nn.Module, x: Tensor) -> None:
        """Process the input ``x``, ``[..., in]``, of a merged linear layer."""


@dataclass
class LoRAMapping:
    """
    The adapter slot of each token in the current pass; shared by all linear layers of a model.

    All tokens use ``slot``, unless :meth:`mix` was called: then either ``one_hot`` is given, a
    ``[tokens, slots]`` matrix with a one at the slot of each token, or, with ``fused``, the slots
    themselves, ``token_slots``, for :mod:`mace_ros.model.mixed_lora`. With ``training``, all tokens
    use :data:`TRAINING_SLOT` and the master weights receive gradients; ``observer`` receives the
    layers' inputs.
    """

    slots: int = FIRST_SERVED_SLOT
    slot: int = BASE_SLOT
    one_hot: Tensor | None = None
    token_slots: Tensor | None = None
    fused: bool = False
    training: bool = False
    observer: InputObserver | None = None

    @property
    def is_base(self) -> bool:
        """Whether all tokens use the base model."""
        return self.slot == BASE_SLOT and self.one_hot is None and self.token_slots is None

    def mix(self, token_slots: Tensor, dtype: torch.dtype) -> None:
        """Let each token use its own slot, ``[tokens]``, until :meth:`clear`."""
        if self.fused:
            self.token_slots = token_slots
        else:
            every = torch.arange(self.slots, device=token_slots.device)
            self.one_hot = (token_slots[:, None] == every).to(dtype)

    def clear(self) -> None:
        """Drop the slots of the last pass's tokens."""
        self.one_hot = self.token_slots = None
