# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The corrections that wait to be learned, and which profile is next."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
import math

from mace_ros.store.records import CorrectionRecord


@dataclass
class PendingCorrection:
    """
    A correction that is not learned yet; times are on the engine's clock, in seconds.

    ``log_probabilities`` are the mean log p per token of its :func:`texts`, under the version
    that was live when they were scored; empty until then. ``reference`` is log p(corrected) -
    log p(rejected), summed over tokens, under the live version.
    """

    record: CorrectionRecord
    arrived: float
    tries: int = 1
    repeats: int = 0            # earlier corrections of the same question that it replaced
    since: float = math.inf     # arrival of the first of those
    log_probabilities: tuple[float, ...] = ()
    reference: float = 0.0

    @property
    def waits_since(self) -> float:
        """When the question was first corrected."""
        return min(self.arrived, self.since)


def texts(record: CorrectionRecord) -> list[str]:
    """Return the corrected text and, if it is known, the rejected one."""
    return [record.corrected, *([record.rejected] if record.rejected.strip() else [])]


class CorrectionQueue:
    """The waiting corrections, oldest first."""

    def __init__(self) -> None:
        """Begin empty."""
        self._waiting: list[PendingCorrection] = []
        self._turns: dict[str, int] = {}    # latest turn by profile

    def __iter__(self) -> Iterator[PendingCorrection]:
        """Iterate over all waiting corrections."""
        return iter(self._waiting)

    def __len__(self) -> int:
        """Return the number of waiting corrections."""
        return len(self._waiting)

    def add(self, record: CorrectionRecord, arrived: float) -> None:
        """Append a correction; it replaces those of the same question and profile."""
        older = [c for c in self._waiting if c.record.prompt_ids == record.prompt_ids
                 and c.record.profile == record.profile]
        self.remove(older)
        self._waiting.append(PendingCorrection(
            record, arrived, repeats=sum(1 + c.repeats for c in older),
            since=min((c.waits_since for c in older), default=math.inf)))

    def put_back(self, again: Iterable[PendingCorrection]) -> None:
        """Reinsert corrections in order of arrival."""
        self._waiting = sorted([*again, *self._waiting], key=lambda c: c.arrived)

    def remove(self, chosen: Collection[PendingCorrection]) -> None:
        """Remove these corrections."""
        self._waiting = [c for c in self._waiting if c not in chosen]

    def of(self, profile: str) -> list[PendingCorrection]:
        """Return the corrections of one profile."""
        return [c for c in self._waiting if c.record.profile == profile]

    def next_profile(self, ready: Sequence[PendingCorrection], turn: int) -> str:
        """
        Return the profile whose turn is longest ago, so that no profile starves the others.

        ``turn`` grows from call to call.
        """
        turns = {c.record.profile: self._turns.get(c.record.profile, 0) for c in ready}
        profile = min(turns, key=turns.__getitem__)
        self._turns = {**turns, profile: turn}
        return profile
