# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Which of the corrections that wait for one profile are looked at, and which come first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mace_ros.learning.job import PendingCorrection
from mace_ros.learning.priority import Candidate, priority, resemble
from mace_ros.store.journal import CorrectionRecord

JOB_CANDIDATES = 16     # of those that wait, looked at for one job


def candidates(waiting: Sequence[PendingCorrection], *,
               by_priority: bool) -> list[PendingCorrection]:
    """Return some of what waits, oldest first: the newest and the oldest, or the oldest ones."""
    if by_priority:
        return [*waiting[:1], *waiting[1:][1 - JOB_CANDIDATES:]]
    return list(waiting[:JOB_CANDIDATES])


def ordered(scored: Sequence[PendingCorrection], others: Sequence[PendingCorrection], *,
            now: float, freshness_s: float, step_s: Callable[[PendingCorrection], float],
            ) -> list[PendingCorrection]:
    """
    Return what gains most first, after the oldest one if that has waited too long.

    ``others`` wait for the same profile, too; ``step_s`` is the device time of a step.
    """
    every = [*scored, *others]
    priorities = {w.record.id: priority(
        _candidate(w, every, max(now - w.arrived, 0.0), step_s(w)), freshness_s) for w in scored}

    def overdue(waiting: PendingCorrection) -> bool:
        return waiting is oldest and now - waiting.waits_since > freshness_s

    oldest = min(scored, key=lambda w: w.waits_since, default=None)
    return sorted(scored, key=lambda w: (not overdue(w), -priorities[w.record.id]))


def _candidate(waiting: PendingCorrection, every: Sequence[PendingCorrection], age_s: float,
               seconds: float) -> Candidate:
    leads, question = waiting.leads, _question(waiting.record)
    return Candidate(
        loss=-leads[0], margin=leads[0] - leads[1] if len(leads) > 1 else 0.0,
        weight=waiting.record.weight, age_s=age_s,
        resembling=waiting.repeats + sum(
            1 + w.repeats for w in every
            if w is not waiting and resemble(question, _question(w.record))),
        seconds=seconds)


def _question(record: CorrectionRecord) -> str:
    asked = [m['content'] for m in record.messages if m['role'] == 'user']
    return asked[-1] if asked else ''
