# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Whether the live version is to blame for what was corrected, or an earlier one is no better.

Corrected texts are scored under both, the live one as it was when they came: by now it may
have learned them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from mace_ros.finetune.sample import SampleScore
from mace_ros.learning.job import JobInputs
from mace_ros.learning.outcomes import older_is_better, SuspectedRegression
from mace_ros.learning.rollback import rollback_target, RollbackRefused
from mace_ros.store.adapter_store import AdapterStore
from mace_ros.store.journal import CorrectionRecord, Journal
from mace_ros.store.lineage import Lineage

REMEMBERED = 1000       # corrections whose first score is
MAX_TRIES = 3           # to compare, if device or disk fails


class RegressionCheck:
    """Keeps what is suspected, and what is known of the corrections that speak for it."""

    def __init__(self, store: AdapterStore) -> None:
        """Begin without a suspicion."""
        self._store = store
        self.suspicion: SuspectedRegression | None = None
        self._tries = 0
        # Mean log p of corrected texts under the version that was live when they came.
        self._first_scores: dict[str, float] = {}
        self.compared: deque[str] = deque(maxlen=REMEMBERED)    # corrections

    def scored(self, correction_id: str, log_probability: float) -> None:
        """Note the first score of a corrected text, in mean log p per token."""
        self._first_scores[correction_id] = log_probability
        if len(self._first_scores) > REMEMBERED:
            del self._first_scores[next(iter(self._first_scores))]

    def suspect(self, suspicion: SuspectedRegression) -> None:
        """Wait to compare, unless most of what speaks against the version was compared already."""
        new = sum(r.id not in self.compared for r in suspicion.corrections)
        if 2 * new >= len(suspicion.corrections):
            self.suspicion, self._tries = suspicion, 0

    def forget(self, profile: str) -> None:
        """Drop what is suspected of a profile's version: it is being taken back."""
        if self.suspicion is not None and self.suspicion.profile == profile:
            self.suspicion = None

    def begin(self, suspicion: SuspectedRegression) -> None:
        """Note that versions are compared now."""
        self.suspicion, self._tries = None, self._tries + 1
        self.compared.extend(r.id for r in suspicion.corrections if r.id not in self.compared)

    def broke_off(self, suspicion: SuspectedRegression) -> None:
        """Wait to compare again, since device or disk failed; a few times."""
        if self.suspicion is None and self._tries < MAX_TRIES:
            self.suspicion = suspicion

    def fetch(self, journal: Journal, suspicion: SuspectedRegression) -> JobInputs:
        """
        Read both versions; for the journal's thread.

        Raises :class:`RollbackRefused` if there is no way back from what is live by now.
        """
        profile, better = suspicion.profile, suspicion.better
        live = journal.live(profile)
        line = Lineage(journal.versions(profile), live.version if live else 0).versions
        if not line or better not in {0, *(record.version for record in line[1:])}:
            raise RollbackRefused(f'version {better} is not before the live one')
        # What would be served: of a profile that had no version, the robot's.
        older = (journal.live('') if profile and not better
                 else rollback_target(journal, profile, better))
        return JobInputs(live, (), (), *(
            self._store.load(r.path, r.sha256) if r else None for r in (live, older)))

    def unseen(self, suspicion: SuspectedRegression) -> list[CorrectionRecord]:
        """Return the corrections that nothing was scored of when they came."""
        return [r for r in suspicion.corrections if r.id not in self._first_scores]

    def blames(self, suspicion: SuspectedRegression, better: Sequence[SampleScore],
               unseen: Sequence[tuple[CorrectionRecord, SampleScore]]) -> bool:
        """
        Return whether the version before would have done better.

        By the scores of all corrections under that one, and of the unseen under the live one.
        """
        live = self._first_scores | {r.id: s.log_probability for r, s in unseen}
        return older_is_better([s.log_probability - live[r.id]
                         for r, s in zip(suspicion.corrections, better, strict=True)])
