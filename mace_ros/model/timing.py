# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Measure how long the device works, whatever the calling thread does meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import torch


class DeviceTimer:
    """Measures from its creation to :meth:`stop`, by the device's own clock if it has one."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        """Start; ``clock`` returns seconds, for a device that works in the calling thread."""
        self._clock = clock
        self._events = tuple(
            torch.cuda.Event(enable_timing=True) for _ in range(2 * (device.type == 'cuda')))
        self._began = self._ended = clock()
        if self._events:
            self._events[0].record()

    def stop(self) -> None:
        """Stop after the work submitted so far; does not wait for it."""
        self._ended = self._clock()
        if self._events:
            self._events[1].record()

    def seconds(self) -> float:
        """Return the measured time in seconds; waits for the end of the work."""
        if not self._events:
            return self._ended - self._began
        first, last = self._events
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3
