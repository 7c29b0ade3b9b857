# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The device itself: what it is, and how it gets its memory back."""

from __future__ import annotations

from contextlib import suppress
import ctypes
import gc

import torch

from mace_ros.telemetry.status import Hardware


def hardware(device: torch.device) -> Hardware:
    """Return what telemetry needs to find the counters of a device."""
    if device.type != 'cuda':
        return Hardware()
    properties = torch.cuda.get_device_properties(device)
    uuid = getattr(properties, 'uuid', '')    # not with every build of torch
    return Hardware('cuda', properties.name, f'GPU-{uuid}' if uuid else '')


def release_memory() -> None:
    """Give back what an engine held that was closed and that nobody refers to any more."""
    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    # glibc keeps what lies below a block that is in use: a third of the memory after a model.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
