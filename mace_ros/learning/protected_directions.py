# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Null-space projection: updates leave the main input directions of the base model alone."""

from __future__ import annotations

from mace_ros.finetune.null_space import InputSubspace
from mace_ros.learning.task import Pause, Task
from mace_ros.model.lora_manager import LoRAManager


def input_subspace(lora: LoRAManager) -> InputSubspace | None:
    """Return an observer of the adapted layers' inputs; None if no direction is protected."""
    return InputSubspace(lora.direction_count) if lora.null_space_nbytes else None


def protect(lora: LoRAManager, subspace: InputSubspace) -> Task[None]:
    """Protect the directions that were observed, one group of layers per poll."""
    for group, directions in subspace.bases():
        lora.protect(group, directions)
        yield Pause.NEXT_POLL
