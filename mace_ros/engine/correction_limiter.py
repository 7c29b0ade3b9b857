# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Limits on incoming corrections: their rate, and the backlog of the journal."""

from __future__ import annotations

import math
import threading

from mace_ros.api.events import InvalidCorrection
from mace_ros.api.validation import MAX_UNWRITTEN
from mace_ros.api.wording import counted
from mace_ros.scheduling.token_bucket import TokenBucket


class CorrectionLimiter:
    """
    Bounds how many corrections are admitted and how many wait for the disk; thread-safe.

    In any t minutes, at most ``(t + 1) * per_minute`` corrections are admitted.
    """

    def __init__(self) -> None:
        """Start with a full minute's allowance, whatever the limit."""
        self._lock = threading.Lock()
        self._bucket = TokenBucket(rate=0.0, capacity=math.inf, tokens=math.inf)

    def admit(self, now: float, per_minute: int, backlog: int) -> None:
        """
        Count a correction that arrived at ``now``; raises :class:`InvalidCorrection`.

        ``backlog`` is the number of journal writes that wait for the disk.
        """
        if backlog >= MAX_UNWRITTEN:
            raise InvalidCorrection(
                f'the disk is slow: {backlog} writes of the journal wait for it; try again later')
        with self._lock:
            self._bucket.resize(per_minute / 60.0, per_minute)
            self._bucket.advance(now)
            if self._bucket.tokens < 1.0:
                raise InvalidCorrection(
                    'more than ' + counted(
                        per_minute, 'correction in a minute (correction.max_per_minute)',
                        'corrections in a minute (correction.max_per_minute)')
                    + '; try again later')
            self._bucket.spend(1.0)
