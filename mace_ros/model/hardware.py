# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The device that runs the model: its identity and its memory."""

from __future__ import annotations

import gc
import math
import os

import torch

from mace_ros.api.hardware import Hardware
from mace_ros.memory.budget import MB
from mace_ros.model.heap import return_free_memory

# Kernels that oneDNN keeps per CPU product, one for each pair of shapes. A kernel takes half a
# megabyte and milliseconds to build. oneDNN and torch keep 1024 each by default, which the
# changing sizes of steps and passes would fill: half a gigabyte.
CACHED_KERNELS = 64


def limit_kernel_caches() -> None:
    """Bound the kernel caches, unless the environment does; call before the first product."""
    for name in ('ONEDNN_PRIMITIVE_CACHE_CAPACITY', 'LRU_CACHE_CAPACITY'):
        os.environ.setdefault(name, str(CACHED_KERNELS))


def avoid_cudnn_attention() -> None:
    """
    Keep PyTorch from cuDNN's attention, which builds a plan for each new shape.

    That takes tens of milliseconds: passes run at every length of a prompt and its context.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def hardware(device: torch.device) -> Hardware:
    """Return the identity by which telemetry finds the counters of a device."""
    if device.type != 'cuda':
        return Hardware()
    properties = torch.cuda.get_device_properties(device)
    uuid = getattr(properties, 'uuid', '')    # missing in some builds of torch
    return Hardware('cuda', properties.name, f'GPU-{uuid}' if uuid else '',
                    integrated=bool(getattr(properties, 'is_integrated', False)))


def free_memory(device: torch.device, counted_mb: float) -> float:
    """
    Return the free memory in bytes, or inf if unknown.

    ``counted_mb`` is the value of telemetry's counters in MB, or NaN. It has priority: with
    unified memory, CUDA counts the page cache as used.
    """
    if not math.isnan(counted_mb):
        return counted_mb * MB
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == 'cuda' else math.inf


def release_memory() -> None:
    """
    Free the memory of a closed engine that is no longer referenced.

    No other engine of this process may hold device graphs, since these use cuBLAS's workspaces.
    """
    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_initialized():
        # cuBLAS keeps one for each stream that it ran on, and each engine has had its own.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
    return_free_memory()
