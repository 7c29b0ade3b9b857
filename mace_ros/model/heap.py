# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The heap of this process: how much free memory glibc may keep.

Passes and fine-tune steps change in size, and leave gaps in the heap into which the next ones do
not fit.
"""

from __future__ import annotations

from contextlib import suppress
import ctypes
import math
import os
from pathlib import Path
import time

M_MMAP_THRESHOLD = -3       # of malloc.h
MAPPED_BYTES = 1 << 20
CHECK_S = 1.0               # between two checks of the process's memory
NEAR = 0.97                 # share of the budget from which free memory is returned
TRIM_SHARE = 0.02           # of the time that returning memory may take
AFTER_LEARNING_S = 10.0     # delay until the memory of finished fine-tune steps is returned


def limit_heap() -> None:
    """
    Make glibc map large tensors separately, unless the environment sets the threshold.

    Mapped memory returns to the system when it is freed. By default glibc raises the threshold
    and puts large tensors into its heap between others: half a gigabyte of gaps in an hour.
    Mapping smaller tensors would cost time.
    """
    if 'MALLOC_MMAP_THRESHOLD_' not in os.environ:
        with suppress(OSError, AttributeError):     # another C library
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


def return_free_memory() -> None:
    """
    Return free memory between blocks in use to the system; takes some milliseconds.

    After loading a model this is a third of the memory.
    """
    with suppress(OSError, AttributeError):     # another C library
        ctypes.CDLL(None).malloc_trim(0)


def private_bytes() -> float:
    """Return the resident memory of this process without file mappings; NaN if unknown."""
    try:
        _, resident, shared = Path('/proc/self/statm').read_text().split()[:3]
        return (int(resident) - int(shared)) * os.sysconf('SC_PAGE_SIZE')
    except (OSError, ValueError):
        return math.nan


class HeapTrimmer:
    """Returns free memory near the budget's limit, and after fine-tune steps have ended."""

    def __init__(self, counted: float, now: float) -> None:
        """Create it after loading; ``counted`` bytes of the process belong to the budget."""
        return_free_memory()
        self._base = private_bytes() - counted
        self._next_check = now
        self._gaps_since: float | None = None

    def step_ended(self, now: float) -> None:
        """Record that a fine-tune step has ended and left gaps."""
        if self._gaps_since is None:
            self._gaps_since = now

    def trim(self, now: float, budget: float, *, idle: bool = False) -> None:
        """
        Return free memory if the process comes near its ``budget`` in bytes.

        The gaps of fine-tune steps are returned at once if the device is ``idle`` and no
        correction waits, otherwise after :data:`AFTER_LEARNING_S`.
        """
        idle_gaps = idle and self._gaps_since is not None
        if now < self._next_check and not idle_gaps:
            return
        self._next_check = now + CHECK_S
        due = idle_gaps or (
            self._gaps_since is not None and now - self._gaps_since >= AFTER_LEARNING_S)
        if due or private_bytes() - self._base > NEAR * budget:
            began = time.perf_counter()
            return_free_memory()
            self._gaps_since = None
            # If the memory can't be returned, do not spend all time on trying.
            self._next_check += (time.perf_counter() - began) / TRIM_SHARE
