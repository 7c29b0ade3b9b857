# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Detection of adapter versions whose answers are corrected more often than before.

An answer that was corrected or got a thumbs-down counts as bad, any other answer as good. Fisher's
exact test compares the answers of a version and its descendants with those of the versions before
it. A higher rate of corrections is only a suspicion, since people may have begun to teach
something new: the regression check then asks whether the older version finds the corrected texts
more likely (:func:`older_is_better`). Everything is read from the journal, so a restart loses
nothing. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from mace_ros.store.journal import Journal
from mace_ros.store.records import AnswerOutcome, CorrectionRecord

# Probability that a version which is as good as those before it is ever suspected.
FALSE_ALARM_PROBABILITY = 0.01
# Fewer answers, of the version or of those before it, prove nothing.
MIN_ANSWERS = 5
# Only a version's first answers count: a later rise of corrections has other causes.
MAX_ANSWERS = 100
# Newest versions of a lineage that are examined: a fast learner publishes many in a minute.
MAX_SUSPECTS = 8
# The older version is better on a corrected text if it leads by this (mean log p per token).
MIN_LEAD = 0.1
# The probability that it is better on as many texts by chance must be at most this.
SIGNIFICANCE = 0.05
MAX_COMPARED = 32       # corrections


@dataclass(frozen=True)
class Outcomes:
    """Number of different questions answered, and how many of them were corrected."""

    answers: int
    corrected: int

    def __str__(self) -> str:
        return f'{self.corrected} of {self.answers}'


@dataclass(frozen=True)
class SuspectedRegression:
    """
    A live version whose answers are corrected more often than those before it.

    It contains ``suspect``, which is to be taken back with all that continue it. ``continues`` is
    the earlier version whose training went on, 0 for none. ``corrections`` are the evidence, oldest
    first.
    """

    profile: str
    version: int
    suspect: int
    continues: int
    since: Outcomes
    before: Outcomes
    corrections: tuple[CorrectionRecord, ...]

    @property
    def reason(self) -> str:
        """The reason of a rollback for this regression."""
        return f'answers got worse: {self.since} corrected, {self.before} before'


def p_value(since: Outcomes, before: Outcomes) -> float:
    """Return the probability of at least ``since.corrected`` if nothing has changed."""
    n, m = since.answers, before.answers
    bad = since.corrected + before.corrected
    ways = sum(comb(bad, k) * comb(n + m - bad, n - k)
               for k in range(since.corrected, min(n, bad) + 1))
    return ways / comb(n + m, n)


def got_worse(since: Outcomes, before: Outcomes) -> bool:
    """
    Return whether answers are corrected significantly more often; call it after each answer.

    Repeated testing would find something sooner or later. So each test has a share of
    :data:`FALSE_ALARM_PROBABILITY`, and the shares, ``MIN_ANSWERS / (n * (n + 1))`` for
    ``n = MIN_ANSWERS ...``, add up to 1.
    """
    n = since.answers
    if min(n, before.answers) < MIN_ANSWERS:
        return False
    return p_value(since, before) <= FALSE_ALARM_PROBABILITY * MIN_ANSWERS / (n * (n + 1))


def older_is_better(leads: Sequence[float]) -> bool:
    """
    Return whether the older version is better by a sign test.

    ``leads`` has one number per corrected text: by how much its mean log p per token under the
    older version exceeds that under the newer one. Of texts that are new to both versions, each
    version is ahead on half.
    """
    count, ahead = len(leads), sum(lead > MIN_LEAD for lead in leads)
    if count < MIN_ANSWERS:
        return False
    return sum(comb(count, k) for k in range(ahead, count + 1)) / 2**count <= SIGNIFICANCE


def suspected_regression(journal: Journal, profile: str) -> SuspectedRegression | None:
    """Return the most significant regression in the lineage of the profile's live version."""
    outcomes = journal.answer_outcomes(profile, 3 * MAX_ANSWERS)
    if sum(outcome.corrected for outcome in outcomes) < MIN_ANSWERS:
        return None
    lineage = journal.live_lineage(profile)
    successors, known = lineage.successors, {0, *lineage.numbers}
    found: list[tuple[float, SuspectedRegression]] = []
    for suspect in lineage.versions[:MAX_SUSPECTS]:
        if suspect.parent not in known or not _has_files(journal, profile, suspect.continues):
            continue
        newer = lineage.continuing(suspect.version)
        own = [o for o in outcomes if o.lineage == profile and o.version in newer]
        older = [o for o in outcomes if o.lineage != profile or (
            o.version not in newer and (o.version == 0 or lineage.holds(o.version)))]
        # Answers after the last corrected one may still be corrected: they count neither way.
        while own and not own[-1].corrected:
            own.pop()
        if len(own) > MAX_ANSWERS:
            continue
        since, before = _count_questions(own), _count_questions(older[-MAX_ANSWERS:])
        evidence = _newest_corrections(journal, own)
        if evidence and got_worse(since, before):
            found.append((p_value(since, before), SuspectedRegression(
                profile, successors[suspect.version], suspect.version, suspect.continues,
                since, before, evidence)))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _count_questions(outcomes: Sequence[AnswerOutcome]) -> Outcomes:
    """Count each question once, however often it was asked and corrected."""
    corrected: dict[str, bool] = {}
    for outcome in outcomes:
        corrected[outcome.question] = (
            corrected.get(outcome.question, False) or outcome.corrected)
    return Outcomes(len(corrected), sum(corrected.values()))


def _newest_corrections(
        journal: Journal, outcomes: Sequence[AnswerOutcome]) -> tuple[CorrectionRecord, ...]:
    """
    Return the newest correction of each corrected question that has a corrected text.

    A thumbs-down is no evidence for an older version: the newer one finds its own answer likelier
    than any other version does.
    """
    questions = {o.query_id: o.question for o in outcomes if o.corrected}
    newest = {questions[record.query_id]: record
              for record in journal.corrections_of(questions) if record.corrected}
    return tuple(newest.values())[-MAX_COMPARED:]


def _has_files(journal: Journal, profile: str, version: int) -> bool:
    record = journal.version(profile, version)
    return version == 0 or (record is not None and bool(record.sha256))
