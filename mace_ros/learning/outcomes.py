# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Whether answers got worse with a version, judged by which of them were corrected.

An answer that was corrected is bad, any other is good. The answers of a version and its
descendants are compared with those of its ancestors (Fisher's exact test). More corrections alone
prove nothing, because people may have begun to teach: the corrected texts must also be likelier
under the older version. All data are read from the journal, so a restart loses nothing. No torch
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from mace_ros.store.journal import (
    as_json,
    correction_from,
    CorrectionRecord,
    Journal,
    VersionRecord,
)
from mace_ros.store.lineage import Lineage

# Probability that a version as good as its ancestors is ever suspected.
FALSE_ALARMS = 0.01
# Answers that a version, and its ancestors, must have given.
ENOUGH = 5
# Answers that are compared: a bad version shows in its first ones.
WATCHED = 100
# Newest versions of a line that may be to blame: a robot that learns fast makes many a minute.
SUSPECTS = 8
# The older version is better on a corrected text if it leads by this much, in mean log p per token.
LEAD = 0.1
# It is better if chance would give as many leads with at most this probability.
DOUBT = 0.05
COMPARED = 32       # corrected texts that are scored under both versions at most


@dataclass(frozen=True)
class Outcomes:
    """The number of answers to different questions, and how many of them were corrected."""

    answers: int
    corrected: int

    def __str__(self) -> str:
        return f'{self.corrected} of {self.answers}'


@dataclass(frozen=True)
class SuspectedRegression:
    """
    The suspicion that a profile's live version is worse than the earlier one ``better``.

    Version 0 means the same as in a rollback. ``corrections`` are evidence, oldest first.
    """

    profile: str
    version: int
    better: int
    since: Outcomes
    before: Outcomes
    corrections: tuple[CorrectionRecord, ...]

    @property
    def reason(self) -> str:
        """The reason of the rollback, for the user."""
        return f'answers got worse: {self.since} corrected, {self.before} before'


def chance(since: Outcomes, before: Outcomes) -> float:
    """Return the probability of this many corrections or more if nothing has changed."""
    n, m = since.answers, before.answers
    bad = since.corrected + before.corrected
    ways = sum(comb(bad, k) * comb(n + m - bad, n - k)
               for k in range(since.corrected, min(n, bad) + 1))
    return ways / comb(n + m, n)


def got_worse(since: Outcomes, before: Outcomes) -> bool:
    """
    Return whether answers got worse; tested after each answer.

    Repeated tests would raise a false alarm sooner or later. So each one has a share of
    :data:`FALSE_ALARMS`, and all shares, ``ENOUGH / (n * (n + 1))`` for ``n = ENOUGH ...``,
    add up to 1.
    """
    n = since.answers
    if min(n, before.answers) < ENOUGH:
        return False
    return chance(since, before) <= FALSE_ALARMS * ENOUGH / (n * (n + 1))


def to_blame(leads: Sequence[float]) -> bool:
    """
    Return whether the older version would have done better.

    ``leads`` are, for each corrected text, its mean log p under the older version minus that
    under the newer one. For facts that both do not know, either is ahead half of the time.
    """
    count, ahead = len(leads), sum(lead > LEAD for lead in leads)
    if count < ENOUGH:
        return False
    return sum(comb(count, k) for k in range(ahead, count + 1)) / 2**count <= DOUBT


def suspected(journal: Journal, profile: str) -> SuspectedRegression | None:
    """Return the strongest suspicion against a version in the line of the profile's live one."""
    rows = _answers(journal, profile)
    if sum(row.corrected for row in rows) < ENOUGH:
        return None
    live = journal.live(profile)
    if live is None:
        return None
    records = journal.versions(profile)
    line = Lineage(records, live.version)
    found: list[tuple[float, SuspectedRegression]] = []
    for i, suspect in enumerate(line.versions[:SUSPECTS]):
        if not _can_serve(records, suspect.parent):
            continue
        newer = {record.version for record in line.versions[:i + 1]}
        own = [row for row in rows if row.lineage == profile and row.version in newer]
        older = [row for row in rows if row.lineage != profile or (
            row.version not in newer and (row.version == 0 or line.holds(row.version)))]
        # Of what came after the last correction nobody knows yet.
        while own and not own[-1].corrected:
            own.pop()
        if len(own) > WATCHED:
            continue
        since, before = _outcomes(own), _outcomes(older[-WATCHED:])
        if got_worse(since, before):
            found.append((chance(since, before), SuspectedRegression(
                profile, live.version, suspect.parent, since, before, _corrections(journal, own))))
    return min(found, key=lambda pair: pair[0])[1] if found else None


@dataclass(frozen=True)
class _Row:
    query_id: str
    question: str
    lineage: str
    version: int
    corrected: bool


def _answers(journal: Journal, profile: str) -> list[_Row]:
    """Return the newest answers in a profile's line, and what the robot's gave it, oldest first."""
    return [_Row(row['query_id'], row['question'], row['lineage'], row['adapter_version'],
                 bool(row['corrected'])) for row in reversed(journal.rows(
                     'SELECT query_id, question, lineage, adapter_version, EXISTS ('
                     'SELECT 1 FROM corrections AS c WHERE c.query_id = a.query_id) AS corrected '
                     "FROM answers AS a WHERE no_learn = 0 AND (lineage = ?1 OR (lineage = '' "
                     'AND profile = ?1)) ORDER BY number DESC LIMIT ?2', profile, 3 * WATCHED))]


def _outcomes(rows: Sequence[_Row]) -> Outcomes:
    """Count questions: one that is asked and corrected again and again is one thing wrong."""
    bad: dict[str, bool] = {}
    for row in rows:
        bad[row.question] = bad.get(row.question, False) or row.corrected
    return Outcomes(len(bad), sum(bad.values()))


def _corrections(journal: Journal, rows: Sequence[_Row]) -> tuple[CorrectionRecord, ...]:
    """Return the newest correction of each question that has one."""
    names = {row.query_id: row.question for row in rows if row.corrected}
    newest = {names[record.query_id]: record for record in map(correction_from, journal.rows(
        'SELECT * FROM corrections WHERE query_id IN (SELECT value FROM json_each(?)) '
        'ORDER BY number', as_json(list(names))))}
    return tuple(newest.values())[-COMPARED:]


def _can_serve(records: Sequence[VersionRecord], version: int) -> bool:
    return version == 0 or any(r.version == version and r.sha256 for r in records)
