# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Memory for large intermediate results, which is used again."""

from __future__ import annotations

from collections.abc import Sequence
import math

import torch
from torch import Tensor


class Workspace:
    """
    Named tensors on a device that share their memory from one use to the next.

    A CPU takes as long to map fresh memory of some megabytes as to compute what is written there.
    """

    def __init__(self, device: torch.device | str = 'cpu') -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor of any content, valid until the same ``name`` is asked for again."""
        count = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or len(buffer) < count:
            buffer = self._buffers[name, dtype] = torch.empty(
                count, dtype=dtype, device=self._device)
        return buffer[:count].view(*shape)

    def clear(self) -> None:
        """Free the memory."""
        self._buffers.clear()
