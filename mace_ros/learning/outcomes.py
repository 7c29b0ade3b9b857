# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Whether answers got worse with a version, by who was corrected.

An answer that somebody corrected is bad, one that nobody objected to is good. What a version
and those that grew from it have answered is compared with what those before it have (Fisher's
exact test). More corrections alone prove nothing, for people may have begun to teach: the
corrected texts have to be likelier under the older version, too. All of it is read from the
journal, so that it survives a restart. No torch here.
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

# A version that is as good as those before it is suspected once in so many, ever.
FALSE_ALARMS = 0.01
# Fewer answers say nothing, neither of it nor of those before it.
ENOUGH = 5
# A bad version shows in its first answers; what comes much later is another world.
WATCHED = 100
# Versions of a line that may be to blame: a robot that learns fast has many in a minute.
SUSPECTS = 8
# The older version must be better by this much (mean log p per token) on a corrected text, ...
LEAD = 0.1
# ... on so many of them that chance would do it once in so many.
DOUBT = 0.05
COMPARED = 32


@dataclass(frozen=True)
class Outcomes:
    """How many answers there were, to different questions, and how many of them corrected."""

    answers: int
    corrected: int

    def __str__(self) -> str:
        return f'{self.corrected} of {self.answers}'


@dataclass(frozen=True)
class SuspectedRegression:
    """
    That a profile's live version is worse than an earlier one, ``better``; 0 as for a rollback.

    ``corrections`` are some of those that say so, oldest first.
    """

    profile: str
    version: int
    better: int
    since: Outcomes
    before: Outcomes
    corrections: tuple[CorrectionRecord, ...]

    @property
    def reason(self) -> str:
        """What is told of a version that is taken back for this."""
        return f'answers got worse: {self.since} corrected, {self.before} before'


def chance(since: Outcomes, before: Outcomes) -> float:
    """Return how probably so many or more are corrected of ``since`` if nothing has changed."""
    n, m = since.answers, before.answers
    bad = since.corrected + before.corrected
    ways = sum(comb(bad, k) * comb(n + m - bad, n - k)
               for k in range(since.corrected, min(n, bad) + 1))
    return ways / comb(n + m, n)


def got_worse(since: Outcomes, before: Outcomes) -> bool:
    """
    Return whether answers got worse; to be asked after each answer.

    To ask so often would sooner or later find something. So each time has a share of
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

    ``leads`` say of each corrected text by how much its mean log p is higher under the older
    version than it was under the newer one. Of new things neither knows anything: as often as
    not one of them is ahead.
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
