# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The corrections that wait to be learned, and whose turn it is."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
import math

from mace_ros.learning.job import PendingCorrection
from mace_ros.store.journal import CorrectionRecord

JOB_CORRECTIONS = 4     # corrections learned together at most


class CorrectionQueue:
    """What waits, oldest first."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._waiting: list[PendingCorrection] = []
        self._turns: dict[str, int] = {}    # of profiles: their latest turn

    def __iter__(self) -> Iterator[PendingCorrection]:
        """Go through all."""
        return iter(self._waiting)

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._waiting)

    def add(self, record: CorrectionRecord, arrived: float) -> None:
        """Append a correction, in the place of what it supersedes."""
        older = [w for w in self._waiting if w.record.prompt_ids == record.prompt_ids
                 and w.record.profile == record.profile]
        self.remove(older)
        self._waiting.append(PendingCorrection(
            record, arrived, repeats=sum(1 + w.repeats for w in older),
            since=min((w.waits_since for w in older), default=math.inf)))

    def put_back(self, again: Iterable[PendingCorrection]) -> None:
        """Let corrections wait again that had been removed."""
        self._waiting = sorted([*again, *self._waiting], key=lambda w: w.arrived)

    def remove(self, chosen: Collection[PendingCorrection]) -> None:
        """Take some out."""
        self._waiting = [w for w in self._waiting if w not in chosen]

    def of(self, profile: str) -> list[PendingCorrection]:
        """Return those of one profile."""
        return [w for w in self._waiting if w.record.profile == profile]

    def next_profile(self, ready: Sequence[PendingCorrection], turn: int) -> str:
        """
        Return whose turn it is: who is corrected without end must not hold up the others.

        ``turn`` grows from call to call.
        """
        turns = {w.record.profile: self._turns.get(w.record.profile, 0) for w in ready}
        profile = min(turns, key=turns.__getitem__)
        self._turns = {**turns, profile: turn}
        return profile
