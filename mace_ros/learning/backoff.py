# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Exponential backoff after a failure of the disk or the device."""

from __future__ import annotations

LONGEST_S = 30.0


class Backoff:
    """Waits twice as long after each failure, up to :data:`LONGEST_S`."""

    def __init__(self) -> None:
        """Begin without a failure."""
        self._failures = 0
        self.until = 0.0    # when to try again, on the caller's clock

    def failed(self, now: float) -> None:
        """Note a failure at this time, and wait."""
        self._failures += 1
        self.until = now + min(2.0 ** self._failures, LONGEST_S)

    def succeeded(self) -> None:
        """Reset to the shortest wait."""
        self._failures, self.until = 0, 0.0
