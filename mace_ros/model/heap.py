# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The memory of this process on a CPU: what glibc's heap may keep of it.

Passes and fine-tune steps of ever other sizes leave gaps in the heap that fit none of the next.
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
LOOK_S = 0.25               # between two looks at the memory of the process
NEAR = 0.97                 # of the budget: from there on what is free goes back
TRIM_SHARE = 0.02           # of the time may go into giving memory back
AFTER_LEARNING_S = 10.0     # what fine-tune steps have left goes back after so long


def limit_heap() -> None:
    """
    Let glibc map large tensors by themselves, unless the environment says how.

    They go back to the system when they are freed. By default glibc puts ever larger ones into
    its heap, between others that stay: gaps that fit none of the next steps and passes, and in
    an hour half a gigabyte of them. Smaller ones would cost time to map.
    """
    if 'MALLOC_MMAP_THRESHOLD_' not in os.environ:
        with suppress(OSError, AttributeError):     # another C library
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


def return_free_memory() -> None:
    """
    Give the system back what lies free between blocks in use; takes some milliseconds.

    glibc keeps it: a third of the memory after a model.
    """
    with suppress(OSError, AttributeError):     # another C library
        ctypes.CDLL(None).malloc_trim(0)


def private_bytes() -> float:
    """Return the resident memory of this process that is in no file; NaN if that is unknown."""
    try:
        _, resident, shared = Path('/proc/self/statm').read_text().split()[:3]
        return (int(resident) - int(shared)) * os.sysconf('SC_PAGE_SIZE')
    except (OSError, ValueError):
        return math.nan


class HeapTrimmer:
    """Gives free memory back: when the process comes near its budget, or steps have ended."""

    def __init__(self, counted: float, now: float) -> None:
        """Begin when all is loaded; ``counted`` bytes of the process are of the budget."""
        return_free_memory()
        self._base = private_bytes() - counted
        self._looks_at = now
        self._gaps_since: float | None = None

    def left_gaps(self, now: float) -> None:
        """Note that a fine-tune step has ended."""
        if self._gaps_since is None:
            self._gaps_since = now

    def tend(self, now: float, budget: float, *, idle: bool = False) -> None:
        """
        Give memory back if the process comes near its ``budget`` of bytes.

        And what fine-tune steps have left: at once if the device is ``idle`` and nothing is to be
        learned, or else later.
        """
        rests = idle and self._gaps_since is not None
        if now < self._looks_at and not rests:
            return
        self._looks_at = now + LOOK_S
        late = rests or (
            self._gaps_since is not None and now - self._gaps_since >= AFTER_LEARNING_S)
        if late or private_bytes() - self._base > NEAR * budget:
            began = time.perf_counter()
            return_free_memory()
            self._gaps_since = None
            # What can't be given back is not to be asked for all the time.
            self._looks_at += (time.perf_counter() - began) / TRIM_SHARE
