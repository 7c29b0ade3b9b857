# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
How many threads compute on a CPU: as many as other programs leave cores.

The threads of an operation wait for each other. If another program takes the core of one thread,
the other threads spin until that thread has a core again, in each of thousands of operations.
Computing with one thread less is then several times faster
(docs/log/2026-12-01-threads-and-cores.md).
"""

from __future__ import annotations

from collections.abc import Callable
import os
from pathlib import Path
import time

import torch

INTERVAL_S = 1.0            # between two decisions
# A program that takes less than this share of a core leaves it free. Beside spinning threads, one
# that wants a whole core gets half of it.
SMALL_SHARE = 0.4

BUSY = 0, 1, 2, 5, 6, 7     # columns: user, nice, system, irq, softirq, steal (man proc_stat)


class CpuThreads:
    """Sets how many threads compute the operations that the calling thread starts."""

    def __init__(self, fixed: int = 0, *, clock: Callable[[], float] = time.monotonic,
                 used: Callable[[frozenset[int]], float] | None = None) -> None:
        """
        Set ``fixed`` threads for good; if that is 0, one for each core of this process for now.

        ``used`` is called instead of :func:`used_by_others`.
        """
        # The affinity instead of cpu_count(): cores that the node is not pinned to stay free.
        self._cores = frozenset(os.sched_getaffinity(0))
        self._adapts, self._clock, self._used = not fixed, clock, used or used_by_others
        self._decided, self._used_then = clock(), self._used(self._cores)
        torch.set_num_threads(fixed or len(self._cores))

    def adapt(self) -> None:
        """Decide again, from the CPU time of other programs since the last decision."""
        passed = self._clock() - self._decided
        if not self._adapts or passed < INTERVAL_S:
            return
        used = self._used(self._cores)
        taken = (used - self._used_then) / passed       # cores
        self._decided += passed
        self._used_then = used
        free = int(len(self._cores) - taken + SMALL_SHARE)
        threads = min(max(free, 1), len(self._cores))
        if threads != torch.get_num_threads():      # setting it empties oneDNN's cache of kernels
            torch.set_num_threads(threads)


def used_by_others(cores: frozenset[int]) -> float:
    """
    Return the seconds of CPU time that other programs have used on some cores since the boot.

    Only the difference of two results has a meaning. Returns 0 if there is no ``/proc/stat``.
    """
    try:
        lines = Path('/proc/stat').read_text().splitlines()
    except OSError:
        return 0.0
    ticks = 0
    for name, *columns in map(str.split, lines):
        if name.startswith('cpu') and name[3:].isdigit() and int(name[3:]) in cores:
            ticks += sum(int(columns[i]) for i in BUSY)
    return ticks / os.sysconf('SC_CLK_TCK') - time.process_time()
