# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Time calls on a device, and count what they must read."""

from __future__ import annotations

from collections.abc import Callable
import time
from typing import Any, TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Read again and again for a floor: more than a cache holds, and little beside the weights.
BUFFER_BYTES = 2 ** 30


def weight_bytes(model: Any) -> int:
    """Return the bytes of the weights that a token reads, adapters not counted."""
    layers = [*model.linears, *model.head]
    return sum(x.stored.nbytes if x.stored is not None else x.weight.nbytes for x in layers)


def reading(nbytes: int, device: str) -> Callable[[], Tensor]:
    """Return a function that lets a device read ``nbytes`` of its memory, the least of a pass."""
    import torch

    buffer = torch.zeros(min(nbytes, BUFFER_BYTES) // 4, dtype=torch.float32, device=device)
    times, rest = divmod(nbytes // 4, len(buffer))

    def read() -> Tensor:
        for _ in range(times):
            buffer.sum()
        return buffer[:rest].sum()

    return read


def repeated(timer: Callable[[], float], repeats: int) -> list[float]:
    """Return the milliseconds of each repeat, after two warm-ups."""
    return [timer() * 1e3 for _ in range(repeats + 2)][2:]


def timed(model: Any, call: Callable[[], object]) -> Callable[[], float]:
    """Return a function that runs ``call``, waits for the device, and returns the seconds."""
    def measure_call() -> float:
        model.synchronize()
        began = time.perf_counter()
        call()
        model.synchronize()
        return time.perf_counter() - began
    return measure_call
