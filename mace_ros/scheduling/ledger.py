# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Accounts of the device time that serving and learning used, and of what learning may use."""

from __future__ import annotations

import math

from mace_ros.api.settings import Settings
from mace_ros.scheduling.token_bucket import TokenBucket

# Window over which shares are reported. Learning that the budget held back can be made up for
# within this time.
WINDOW_S = 10.0

# Rounding may leave a bucket this far below zero at the time at which it should be refilled.
ROUNDING_S = 1e-6


class Ledger:
    """
    Device time of serving and of learning, on the scheduler's clock.

    ``finetune.budget`` bounds learning's share of all time, idle time included, which keeps a
    robot cool. ``finetune.min_share`` is the share that learning may claim while corrections
    are overdue. Both are token buckets of device seconds.
    """

    def __init__(self, settings: Settings) -> None:
        """Start with nothing spent and nothing saved."""
        self.serving_s = 0.0
        self.learning_s = 0.0
        self.budget = TokenBucket(0.0, 0.0)
        self.claim = TokenBucket(0.0, 0.0)
        # Sums that fade over the window.
        self._serving, self._learning, self._wall = 0.0, 0.0, 0.0
        self._now: float | None = None
        self.update(settings)

    def update(self, settings: Settings) -> None:
        """Apply new settings."""
        budget = settings.finetune.budget
        self.budget.resize(budget, budget * WINDOW_S)
        # The capacity is a single learning slice, so that the claim is spread evenly.
        self.claim.resize(min(settings.finetune.min_share, budget),
                          settings.finetune.max_blocking_ms / 1000.0)

    def advance(self, now: float) -> None:
        """Move the clock to ``now``."""
        if self._now is None:
            self._now = now
            self.budget.advance(now)
            self.claim.advance(now)
        elapsed = now - self._now
        if elapsed <= 0.0:
            return
        self._now = now
        fade = math.exp(-elapsed / WINDOW_S)
        self._serving *= fade
        self._learning *= fade
        self._wall = self._wall * fade + WINDOW_S * (1.0 - fade)
        self.budget.advance(now)
        self.claim.advance(now)

    def spend(self, serving_s: float, learning_s: float, now: float) -> None:
        """Record the device time of an iteration that ended at ``now``."""
        self.advance(now)
        self.serving_s += serving_s
        self.learning_s += learning_s
        self._serving += serving_s
        self._learning += learning_s
        self.budget.spend(learning_s)
        # Learning that needed no claim counts towards the minimum share, up to one window.
        self.claim.spend(learning_s, lowest=-WINDOW_S * self.claim.rate)

    @property
    def may_learn(self) -> bool:
        """Whether the budget allows another learning slice."""
        return self.budget.rate >= 1.0 or (
            self.budget.rate > 0.0 and self.budget.tokens >= -ROUNDING_S)

    @property
    def learns_again_at(self) -> float | None:
        """When the budget will allow learning again; None if it does now, or never will."""
        if self.may_learn or self.budget.rate <= 0.0:
            return None
        return self.budget.available_at()

    @property
    def claim_s(self) -> float:
        """Seconds by which learning is below its minimum share."""
        return max(self.claim.tokens, 0.0)

    @property
    def may_claim(self) -> bool:
        """Whether learning has a minimum share."""
        return self.claim.rate > 0.0

    @property
    def serving_share(self) -> float:
        """Share of recent time in which the device served requests."""
        return min(self._serving / self._wall, 1.0) if self._wall else 0.0

    @property
    def learning_share(self) -> float:
        """Share of recent time in which the device learned."""
        return min(self._learning / self._wall, 1.0) if self._wall else 0.0
