# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A token bucket: bounds spending in any interval."""

from __future__ import annotations

import math


class TokenBucket:
    """
    Tokens that accrue at ``rate`` per second up to ``capacity``.

    Spending may overdraw the bucket. A caller that spends only while ``tokens`` is not negative
    spends at most ``rate * t + capacity`` tokens, plus its last withdrawal, in any ``t`` seconds.

    Time is an argument. Not thread-safe.
    """

    def __init__(self, rate: float, capacity: float, tokens: float = 0.0) -> None:
        """Start with ``tokens``; the clock starts at the first :meth:`advance`."""
        self.rate = rate
        self.capacity = capacity
        self.tokens = tokens
        self._updated_at: float | None = None

    def resize(self, rate: float, capacity: float) -> None:
        """Change rate and capacity from now on; excess tokens are lost."""
        self.rate, self.capacity = rate, capacity
        self.tokens = min(self.tokens, capacity)

    def advance(self, now: float) -> None:
        """Add what has accrued up to ``now``; a time before the last one changes nothing."""
        if self._updated_at is None:
            self._updated_at = now
        elapsed = now - self._updated_at
        if elapsed > 0.0:
            self._updated_at = now
            self.tokens = min(self.tokens + self.rate * elapsed, self.capacity)

    def spend(self, tokens: float, *, lowest: float = -math.inf) -> None:
        """Remove tokens, but leave at least ``lowest``."""
        self.tokens = max(self.tokens - tokens, lowest)

    def available_at(self) -> float:
        """Return when the bucket is no longer overdrawn; infinity if that never happens."""
        if self.rate <= 0.0 or self._updated_at is None:
            return math.inf
        return self._updated_at - min(self.tokens, 0.0) / self.rate
