# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Time calls on a device, and count what they must read."""

from __future__ import annotations

from collections.abc import Callable
import time
from typing import Any


def weight_bytes(model: Any) -> int:
    """Return the bytes of the weights that a token reads, adapters not counted."""
    layers = [*model.linears, *model.head]
    return sum(x.stored.nbytes if x.stored is not None else x.weight.nbytes for x in layers)


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
