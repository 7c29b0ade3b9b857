# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Weights of 4 bits in the form that FBGEMM dequantises, which PyTorch uses for embeddings.

On an x86 CPU that takes at most a third of the time of PyTorch's other operators, which is worth
a second copy of the weights. A row is a group: its values, its scale, and the value of its lowest
level, both in float16, as in Q4_1 of GGUF files.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor

# Fresh memory for more values than these would be mapped, see mace_ros.model.heap.
UNPACKED_AT_ONCE = 2 ** 17


def pack_rows(q: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Return rows; ``q`` is uint8, ``[out, in]``, the others are ``[out, groups]``."""
    grid = q.view(scales.numel(), -1)
    scale, lowest = (x.reshape(-1, 1).half().view(torch.uint8)
                     for x in (scales, zeros - 8 * scales))
    return torch.cat([grid[:, ::2] | grid[:, 1::2] << 4, scale, lowest], 1)


def unpack_rows(rows: Tensor, target: Tensor) -> None:
    """Write the values of ``rows`` into ``target``, contiguous, ``[outputs, in]``."""
    group = 2 * (rows.shape[1] - 4)
    count = UNPACKED_AT_ONCE // group
    for part, values in zip(rows.split(count), target.view(-1, group).split(count), strict=True):
        values.copy_(torch.ops.quantized.embedding_bag_4bit_unpack(part))


def unpacks_rows(device: torch.device) -> bool:
    """Return whether :func:`unpack_rows` is fast on ``device`` and gives the right values."""
    if device.type != 'cpu' or platform.machine() not in ('x86_64', 'AMD64'):
        return False
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(16, (64, 64), generator=generator, dtype=torch.uint8)
    scales, zeros = (torch.randint(1, 9, (64, 2), generator=generator) / 8 for _ in range(2))
    result = torch.empty(64, 64)
    try:
        unpack_rows(pack_rows(q, scales, zeros), result)
    except (AttributeError, RuntimeError):      # not in this build
        return False
    expected = (q.view(64, 2, 32).float() - 8) * scales[..., None] + zeros[..., None]
    return torch.equal(result, expected.view(64, 64))
