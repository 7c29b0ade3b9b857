# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The time that a shutdown may take, and what it was spent on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import time

SHORTEST_S = 0.1        # every step may wait this long, even after the limit
NOTED_S = 0.05          # shorter waits are not mentioned


class Shutdown:
    """Shares one time limit between the steps of a shutdown, and names those that took time."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin now; all steps together have ``limit_s``."""
        self._limit_s, self._clock = limit_s, clock
        self._begun = clock()
        self._waits: list[tuple[str, float]] = []

    def left(self, at_most_s: float) -> float:
        """Return the seconds that the next step may wait."""
        left = self._limit_s - (self._clock() - self._begun)
        return min(at_most_s, max(left, SHORTEST_S))

    @contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Note how long the body takes."""
        started = self._clock()
        try:
            yield
        finally:
            self._waits.append((what, self._clock() - started))

    def __str__(self) -> str:
        """Return the whole time, and what it was spent on, as a line for the log."""
        waits = [f'{seconds:.1f} s for {what}' for what, seconds in self._waits
                 if seconds >= NOTED_S]
        text = f'stopped after {self._clock() - self._begun:.1f} s'
        return f'{text}: {", ".join(waits)}' if waits else text
