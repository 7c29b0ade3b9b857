# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Which of a profile's waiting corrections a job considers, in which order, and how many fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

from mace_ros.learning.correction_queue import PendingCorrection
from mace_ros.learning.priority import priority, resemble, ScoredCorrection
from mace_ros.learning.question import questions, words
from mace_ros.learning.samples import correction_sample, first_within
from mace_ros.model.chat import ChatTokenizer
from mace_ros.store.records import CorrectionRecord

JOB_CANDIDATES = 16     # waiting corrections that a job considers at most
JOB_CORRECTIONS = 4     # corrections that a job learns together at most


def candidates(waiting: Sequence[PendingCorrection], *,
               by_priority: bool) -> list[PendingCorrection]:
    """
    Return the corrections that a job considers, oldest first.

    ``by_priority`` takes the oldest one and the newest ones, else the oldest ones are taken.
    """
    if by_priority:
        return [*waiting[:1], *waiting[1:][1 - JOB_CANDIDATES:]]
    return list(waiting[:JOB_CANDIDATES])


def ordered(scored: Sequence[PendingCorrection], others: Sequence[PendingCorrection], *,
            now: float, freshness_s: float, step_s: Callable[[PendingCorrection], float],
            ) -> list[PendingCorrection]:
    """
    Return scored corrections by falling priority, an overdue oldest one first.

    ``others`` wait for the same profile; ``step_s`` is the device time of a step over one
    correction, in seconds.
    """
    asked = [(c, _question_words(c.record)) for c in (*scored, *others)]
    priorities = {c.record.id: priority(
        _candidate(c, question, asked, max(now - c.arrived, 0.0), step_s(c)), freshness_s)
        for c, question in asked[:len(scored)]}

    def overdue(waiting: PendingCorrection) -> bool:
        return waiting is oldest and now - waiting.waits_since > freshness_s

    oldest = min(scored, key=lambda c: c.waits_since, default=None)
    return sorted(scored, key=lambda c: (not overdue(c), -priorities[c.record.id]))


def fitting(waiting: Sequence[PendingCorrection], chat: ChatTokenizer,
            step_tokens: int) -> list[PendingCorrection]:
    """Return the first corrections that one step can learn together; at least one."""
    chosen = list(waiting[:JOB_CORRECTIONS])
    samples = [correction_sample(chat, c.record) for c in chosen]
    together = first_within(samples, step_tokens, at_least=1)
    return chosen[:len(together)]


def _candidate(waiting: PendingCorrection, question: Set[str],
               asked: Sequence[tuple[PendingCorrection, Set[str]]], age_s: float,
               seconds: float) -> ScoredCorrection:
    scores = waiting.log_probabilities
    return ScoredCorrection(
        loss=-scores[0], margin=scores[0] - scores[1] if len(scores) > 1 else 0.0,
        weight=waiting.record.weight, age_s=age_s,
        resembling=waiting.repeats + sum(
            1 + c.repeats for c, other in asked
            if c is not waiting and resemble(question, other)),
        seconds=seconds)


def _question_words(record: CorrectionRecord) -> set[str]:
    """Return the words of the last question alone, in any language."""
    return {word for text in questions(record.messages)[:1] for word in words(text)}
