# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The gate rejects candidates that lose guarded samples."""

from __future__ import annotations

from collections.abc import Sequence
import math

from hypothesis import given, strategies as st

from mace_ros.finetune.sample import Sample, SampleScore
from mace_ros.learning.gate import BATCH_TOKENS, batches, Gate, Group, Measure


def sample(tokens: int, name: int = 0) -> Sample:
    return Sample((name,) * tokens, (0.0,) + (1.0,) * (tokens - 1))


def samples(count: int, first: int = 0) -> tuple[Sample, ...]:
    return tuple(sample(3, first + i) for i in range(count))


def scores(exact: Sequence[bool], probability: float = 0.5) -> list[SampleScore]:
    return [SampleScore(math.log(probability), 3, right, 1.0 if right else -1.0)
            for right in exact]


@given(st.lists(st.integers(2, 300), max_size=20))
def test_all_samples_are_scored_once_and_in_order(lengths: list[int]) -> None:
    many = [sample(n, i) for i, n in enumerate(lengths)]
    parts = list(batches(many))
    assert [s for part in parts for s in part] == many
    assert all(len(b) == 1 or sum(len(s.tokens) for s in b) <= BATCH_TOKENS for b in parts)


def test_samples_that_were_wrong_before_cannot_be_lost() -> None:
    gate = Gate([Group('a', samples(3), Measure.EXACT)])
    assert not gate.judge(scores([False] * 3), scores([False] * 3), 0.0).reason
    assert not gate.judge(scores([False] * 3), scores([True] * 3), 0.0).reason


def test_the_tolerance_applies_to_each_group() -> None:
    few, many = samples(2), samples(10, 10)
    gate = Gate([Group('few', few, Measure.EXACT), Group('none', (), Measure.EXACT),
                 Group('many', many, Measure.EXACT)])
    assert gate.samples == [*few, *many]
    before = scores([True] * 12)
    one_of_many = scores([True] * 2 + [False] + [True] * 9)
    assert not gate.judge(before, one_of_many, 0.1).reason
    verdict = gate.judge(before, one_of_many, 0.05)
    assert verdict.reason == 'many: 1.00 would become 0.90 (gate.tolerance 0.05)'
    assert verdict.lost == (many[0],)
    verdict = gate.judge(before, scores([True, False] + [True] * 10), 0.1)
    assert 'few' in verdict.reason and 'many' not in verdict.reason
    assert verdict.lost == (few[1],)


def test_answers_may_change_their_words_but_not_become_unlikely() -> None:
    gate = Gate([Group('probes', samples(4), Measure.PROBABILITY)])
    assert not gate.judge(scores([True] * 4, 0.6), scores([False] * 4, 0.55), 0.1).reason
    verdict = gate.judge(scores([True] * 4, 0.6), scores([True] * 4, 0.45), 0.1)
    assert 'probes: 0.60 would become 0.45' in verdict.reason and not verdict.lost


def test_a_group_may_be_allowed_no_fall_at_all() -> None:
    gate = Gate([Group('paraphrases', samples(2), Measure.PROBABILITY, may_not_fall=True)])
    wrong = [False, False]
    assert not gate.judge(scores(wrong, 0.2), scores(wrong, 0.2), 0.1).reason
    assert 'paraphrases' in gate.judge(scores(wrong, 0.2), scores(wrong, 0.19), 0.1).reason
