# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The identity of the device that the engine runs on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """The device that the engine runs on."""

    kind: str = 'cpu'       # or 'cuda'
    name: str = ''
    uuid: str = ''          # of a CUDA device, in NVML's format
    integrated: bool = False    # it shares the system's memory, as on a Jetson
