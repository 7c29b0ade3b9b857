# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The LoRA update of a pass that mixes adapters, computed with each token's own slot only.

Plain products multiply every token by all slots, and then drop what is not its own. The kernels
here (:mod:`mixed_lora_kernels`) take tiles of tokens, and skip the slots that no token of a tile
uses. So nothing must be sorted first, and a launch depends only on shapes, never on the slots: a
CUDA graph can hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mace_ros.model.triton_operator import triton_operator

ROW_TILE = 16               # tokens of a tile; the product of tensor cores takes 16 at least
# The inputs of a tile are split among several programs. A split has at least SPLIT_INPUTS, and the
# splits of all tiles are at most MAX_PROGRAMS, unless there are more tiles than that.
SPLIT_INPUTS, MAX_PROGRAMS = 512, 16


def add_update(y: Tensor, x: Tensor, slots_a: Tensor, slots_b: Tensor, token_slots: Tensor,
               width: int) -> Tensor:
    """
    Add to ``y`` in place the update of each token's slot, and return it.

    ``y`` is ``[..., out]`` and contiguous, ``x`` ``[..., in]``, ``slots_a`` ``[slots * width,
    in]``, and ``slots_b``, already scaled, ``[slots * width, out]``. ``token_slots`` are
    ``[tokens]``. Tokens of slot 0, the base model, are skipped.
    """
    x = x.reshape(-1, x.shape[-1])
    tokens, inputs = x.shape
    low = x.new_empty(splits(tokens, inputs), tokens, width, dtype=torch.float32)
    torch.ops.mace_ros.add_lora(
        y.view(tokens, -1), low, x if x.stride(1) == 1 else x.contiguous(), slots_a, slots_b,
        token_slots)
    return y


def splits(tokens: int, inputs: int) -> int:
    """Return among how many programs the inputs of a tile of tokens are split."""
    tiles = -(-tokens // ROW_TILE)
    return max(min(inputs // SPLIT_INPUTS, MAX_PROGRAMS // tiles), 1)


@triton_operator(
    'add_lora(Tensor(a!) y, Tensor(b!) low, Tensor x, Tensor slots_a, Tensor slots_b, '
    'Tensor token_slots) -> ()')
def _launch(y: Tensor, low: Tensor, x: Tensor, slots_a: Tensor, slots_b: Tensor,
            token_slots: Tensor) -> None:
    """Run the kernels; on a CPU, only Triton's interpreter can."""
    from mace_ros.model.mixed_lora_kernels import launch  # needs Triton

    launch(y, low, x, slots_a, slots_b, token_slots, row_tile=ROW_TILE)
