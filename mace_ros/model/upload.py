# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Copies from the host to the device for which the host does not wait."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to the device without waiting for what the device is doing."""
    tensor = torch.from_numpy(array)
    if device.type == 'cuda':   # copies from pageable memory wait
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
