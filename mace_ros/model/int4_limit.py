# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Measure up to how many tokens CUDA multiplies 4-bit weights faster than it writes them out.

The product reads the weights once for every 16 tokens. Writing them out takes several kernels
that move 9 bytes per weight, but does so once. Which is faster depends on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
import time
from typing import TypeAlias

import torch

from mace_ros.model.graph_check import relative_error
from mace_ros.model.int4 import Int4Values, Int4Weight
from mace_ros.model.int4_kernels import Int4Kernel, PROBE_ERROR, PROBE_GROUP
from mace_ros.model.timing import DeviceTimer

TOKENS = (32, 64, 128, 256, 512, 1024)
OUTPUTS = INPUTS = 4096     # of the weight that is timed
# Calls in a row: while the device runs the first, the host launches the kernels of the next.
REPEATS, CALLS = 3, 10

Seconds: TypeAlias = Callable[[Callable[[], object]], float]


def with_measured_limit(kernel: Int4Kernel) -> Int4Kernel:
    """Return ``kernel`` with the limit of its device, or as it is where nothing is to choose."""
    if kernel.device.type != 'cuda' or not kernel.has_product:
        return kernel
    most = most_tokens(kernel, partial(device_seconds, kernel.device))
    torch.cuda.empty_cache()    # else it would count as used, when free memory is measured
    return replace(kernel, max_tokens=most)


def most_tokens(kernel: Int4Kernel, seconds: Seconds) -> int:
    """
    Return the most of :data:`TOKENS` for which the product is right and the faster way.

    ``seconds`` measures a call. Returns 0, which means the default, if it never is.
    """
    generator, most = torch.Generator().manual_seed(0), 0
    scales = torch.rand(OUTPUTS, INPUTS // PROBE_GROUP, generator=generator)
    weight = Int4Weight.of(Int4Values(
        torch.randint(16, (OUTPUTS, INPUTS), generator=generator, dtype=torch.uint8),
        scales, scales - 0.5), kernel)
    for tokens in TOKENS:
        rows = torch.randn(tokens, INPUTS, generator=generator).to(kernel.device, kernel.dtype)
        packed, written = weight.packed_product(rows), weight.written_out_product(rows)
        if (relative_error(packed.float(), written.float()) > PROBE_ERROR
                or seconds(partial(weight.packed_product, rows))
                >= seconds(partial(weight.written_out_product, rows))):
            break
        most = tokens
    return most


def device_seconds(device: torch.device, call: Callable[[], object]) -> float:
    """Return the time of a call on a device: the least of a few measurements."""
    def timed() -> float:
        timer = DeviceTimer(device, time.perf_counter)
        for _ in range(CALLS):
            call()
        timer.stop()
        return timer.seconds() / CALLS

    return min(timed() for _ in range(REPEATS))
