# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Adapter slots, and the slot that each token of a packed pass uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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

    All tokens use ``slot``, unless ``one_hot`` is given: a ``[tokens, slots]`` matrix with a
    one at the slot of each token. With ``training``, all tokens use :data:`TRAINING_SLOT` and
    the master weights receive gradients; ``observer`` receives the layers' inputs.
    """

    slots: int = FIRST_SERVED_SLOT
    slot: int = BASE_SLOT
    one_hot: Tensor | None = None
    training: bool = False
    observer: InputObserver | None = None
