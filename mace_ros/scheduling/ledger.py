# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Who got how much of the device, and how much more learning may take."""

from __future__ import annotations

import math

from mace_ros.api.settings import Settings

# Learning that was held up may be made up for within this time; also the window over
# which shares are reported.
WINDOW_S = 10.0

# Rounding may leave a credit so much short of zero at the time that it was to be there.
ROUNDING_S = 1e-6


class Credit:
    """
    Device time that accrues at a rate and is spent in pieces that may overdraw it.

    Over any stretch of t seconds no more than ``rate * t + most`` and one piece is
    spent, if nothing is spent while ``seconds`` is negative.
    """

    def __init__(self, rate: float, most: float) -> None:
        """``rate`` is in seconds per second, ``most`` the seconds that may be saved up."""
        self.rate = rate
        self.most = most
        self.seconds = 0.0

    def advance(self, elapsed: float) -> None:
        """Let ``elapsed`` seconds pass."""
        self.seconds = min(self.seconds + self.rate * elapsed, self.most)

    def change(self, rate: float, most: float) -> None:
        """Set another rate and limit from now on."""
        self.rate, self.most = rate, most
        self.seconds = min(self.seconds, most)


class Ledger:
    """
    Device time of serving and of learning, on the scheduler's clock.

    ``finetune.budget`` bounds learning's share of all time, idle time included: it is
    what keeps a robot cool. ``finetune.min_share`` is what learning may claim while
    corrections are overdue.
    """

    def __init__(self, settings: Settings) -> None:
        """Begin with nothing spent and nothing saved."""
        self.serving_s = 0.0
        self.learning_s = 0.0
        self._serving, self._learning, self._wall = 0.0, 0.0, 0.0   # fading sums
        self._now: float | None = None
        self._budget = Credit(0.0, 0.0)
        self._claim = Credit(0.0, 0.0)
        self.update(settings)

    def update(self, settings: Settings) -> None:
        """Put other settings in force."""
        budget = settings.finetune.budget
        self._budget.change(budget, budget * WINDOW_S)
        # A claim isn't saved up beyond one piece: it is to be taken evenly.
        self._claim.change(min(settings.finetune.min_share, budget),
                           settings.finetune.max_blocking_ms / 1000.0)

    def advance(self, now: float) -> None:
        """Move on to ``now``."""
        if self._now is None:
            self._now = now
        elapsed = now - self._now
        if elapsed <= 0.0:
            return
        self._now = now
        fade = math.exp(-elapsed / WINDOW_S)
        self._serving *= fade
        self._learning *= fade
        self._wall = self._wall * fade + WINDOW_S * (1.0 - fade)
        self._budget.advance(elapsed)
        self._claim.advance(elapsed)

    def spend(self, serving_s: float, learning_s: float, now: float) -> None:
        """Note device time that was spent until ``now``."""
        self.advance(now)
        self.serving_s += serving_s
        self.learning_s += learning_s
        self._serving += serving_s
        self._learning += learning_s
        self._budget.seconds -= learning_s
        # Learning that came about without a claim counts towards it, up to a window.
        self._claim.seconds = max(
            self._claim.seconds - learning_s, -WINDOW_S * self._claim.rate)

    @property
    def may_learn(self) -> bool:
        """Whether the budget allows another piece of learning."""
        return self._budget.rate >= 1.0 or (
            self._budget.rate > 0.0 and self._budget.seconds >= -ROUNDING_S)

    @property
    def learns_again_at(self) -> float | None:
        """When the budget will allow it; None if never, or at once."""
        if self.may_learn or self._budget.rate <= 0.0 or self._now is None:
            return None
        return self._now - self._budget.seconds / self._budget.rate

    @property
    def claim_s(self) -> float:
        """Seconds of learning that are missing from its minimum share."""
        return max(self._claim.seconds, 0.0)

    @property
    def may_claim(self) -> bool:
        """Whether learning has a minimum share."""
        return self._claim.rate > 0.0

    @property
    def claims_at(self) -> float:
        """When time will be missing from its minimum share, if learning gets none till then."""
        if self._now is None or self._claim.rate <= 0.0:
            return math.inf
        return self._now - min(self._claim.seconds, 0.0) / self._claim.rate

    @property
    def serving_share(self) -> float:
        """Share of the latest device time that went into answers."""
        return min(self._serving / self._wall, 1.0) if self._wall else 0.0

    @property
    def learning_share(self) -> float:
        """Share of the latest device time that went into learning."""
        return min(self._learning / self._wall, 1.0) if self._wall else 0.0
