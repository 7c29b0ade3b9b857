# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""How long the device works at what it is given, whatever this thread does meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import torch


class DeviceTimer:
    """Runs from its making to :meth:`stop`, on the device's own clock where it has one."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        """Begin; ``clock`` tells the seconds of a device that works in this thread."""
        self._clock = clock
        self._events = tuple(
            torch.cuda.Event(enable_timing=True) for _ in range(2 * (device.type == 'cuda')))
        self._began = self._ended = clock()
        if self._events:
            self._events[0].record()

    def stop(self) -> None:
        """End after what the device has been given so far; does not wait for it."""
        self._ended = self._clock()
        if self._events:
            self._events[1].record()

    def seconds(self) -> float:
        """Return the time; waits for its end."""
        if not self._events:
            return self._ended - self._began
        first, last = self._events
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3
