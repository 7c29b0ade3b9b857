# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What an engine begins with: the model on its device, and how much memory there is beside it."""

from __future__ import annotations

import math
import os

import torch

from mace_ros.api.settings import InvalidSetting, Settings
from mace_ros.memory.budget import MB, MemoryBudget
from mace_ros.model.cpu_matmul import multiplies_int8
from mace_ros.model.hardware import free_memory, hardware, limit_kernel_caches
from mace_ros.model.heap import limit_heap
from mace_ros.model.loading import best_device, best_dtype, load_model, LoadedModel, Progress
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.packing import pack
from mace_ros.telemetry.device_counters import DeviceCounters
from mace_ros.telemetry.status import Hardware

CUDA_KV_SHARE = 0.5        # of the budget, at most, for a KV cache that can't shrink


def budget_bytes(settings: Settings, free: float) -> float:
    """Return the budget in force, where ``free`` bytes were free beside the base model."""
    memory = settings.memory
    return memory.budget_mb * MB if memory.budget_mb else free - memory.headroom_mb * MB


def check_budget(budget: MemoryBudget) -> None:
    """Raise :class:`InvalidSetting` if there is no room for a single short answer."""
    if budget.total < budget.minimum:
        raise InvalidSetting(
            f'memory.budget_mb: {budget.total / MB:.0f} MB for all but the base model, and '
            f'{budget.minimum / MB:.0f} are needed; lower adapter.slots, adapter.rank or '
            'scheduler.max_batch_tokens, or memory.headroom_mb if it is 0')


def best_weight_dtype(device: str) -> str:
    """Return what ``auto`` stands for: what answers fastest there."""
    dtype = best_dtype(device)
    fast = device == 'cpu' and multiplies_int8(getattr(torch, dtype))
    return 'int8' if fast else dtype


def load(settings: Settings, progress: Progress,
         ) -> tuple[LoadedModel, PackedModel, Hardware, float]:
    """Return the model, what it runs on, and the bytes that are free beside it."""
    model = settings.model
    device = best_device() if model.device == 'auto' else model.device
    dtype = model.weight_dtype
    if dtype == 'auto':
        dtype = best_weight_dtype(device)
    if dtype == 'int8' and device != 'cpu':
        raise InvalidSetting(f'model.weight_dtype: int8 is for CPUs alone, not for {device}')
    if device == 'cpu':
        # Not cpu_count(): who pins the node to some cores leaves the others to the robot.
        torch.set_num_threads(model.threads or len(os.sched_getaffinity(0)))
        limit_kernel_caches()
        limit_heap()
    loaded = load_model(
        model.source, device=device, dtype='auto' if dtype == 'int8' else dtype,
        cache=settings.storage.model_cache, progress=progress)
    kind = hardware(loaded.model.device)
    free = free_memory(loaded.model.device, DeviceCounters(kind).read().memory_free_mb)
    # Elsewhere it takes memory as it is filled, and gives it back.
    kv_bytes = budget_bytes(settings, free) * CUDA_KV_SHARE if device == 'cuda' else math.inf
    if dtype == 'int8':
        progress('rounding its linear layers to 8 bits')
    hybrid = pack(loaded.model, kv_tokens=settings.memory.kv_cache_tokens,
                         kv_bytes=kv_bytes, int8=dtype == 'int8')
    if device == 'cpu':     # less what the 8 bits took
        free = free_memory(hybrid.device, DeviceCounters(kind).read().memory_free_mb)
    return loaded, hybrid, kind, free
