# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The device itself: what it is, and how it gets its memory back."""

from __future__ import annotations

import gc
import math
import os

import torch

from mace_ros.memory.budget import MB
from mace_ros.model.heap import return_free_memory
from mace_ros.telemetry.status import Hardware

# Of the kernels that oneDNN makes for products on a CPU, one for each pair of shapes, so many are
# kept. They take half a megabyte each and milliseconds to make; by default 1024 are kept, and
# again by torch, which steps and passes of ever other sizes would fill: half a gigabyte.
KERNELS_KEPT = 64


def limit_kernel_caches() -> None:
    """Bound the memory of kernels, unless the environment says how; before the first product."""
    for name in ('ONEDNN_PRIMITIVE_CACHE_CAPACITY', 'LRU_CACHE_CAPACITY'):
        os.environ.setdefault(name, str(KERNELS_KEPT))


def hardware(device: torch.device) -> Hardware:
    """Return what telemetry needs to find the counters of a device."""
    if device.type != 'cuda':
        return Hardware()
    properties = torch.cuda.get_device_properties(device)
    uuid = getattr(properties, 'uuid', '')    # not with every build of torch
    return Hardware('cuda', properties.name, f'GPU-{uuid}' if uuid else '')


def free_memory(device: torch.device, counted_mb: float) -> float:
    """
    Return the bytes of free memory, ``counted_mb`` by telemetry's counters; inf if unknown.

    Where memory is unified they know better than CUDA, which takes the page cache for used.
    """
    if not math.isnan(counted_mb):
        return counted_mb * MB
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == 'cuda' else math.inf


def release_memory() -> None:
    """Give back what an engine held that was closed and that nobody refers to any more."""
    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return_free_memory()
