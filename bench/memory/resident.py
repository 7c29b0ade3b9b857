# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The memory of this process."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
import re
import threading

SAMPLE_S = 0.004     # between two samples of the memory


def resident_mb(column: str = 'VmRSS') -> float:
    """Return a value of /proc/self/status in MB; ``VmHWM`` is the peak of resident memory."""
    found = re.search(rf'{column}:\s+(\d+) kB', Path('/proc/self/status').read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def settle() -> float:
    """Return free memory to the system, reset the peak, and return the resident memory in MB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')
    return resident_mb()


class AnonymousPeak:
    """
    Samples the private memory of this process in a thread, in MB.

    Resident memory would include pages of files, such as libraries and weights, which the
    system reclaims when it needs memory.
    """

    def __init__(self) -> None:
        """Start sampling."""
        self.peak = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.peak = max(self.peak, resident_mb('RssAnon'))

    def end(self) -> float:
        """Stop sampling; return the peak."""
        self._stop.set()
        self._thread.join()
        return self.peak
