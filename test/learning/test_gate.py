# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The gate finds the guarded samples that a candidate has lost."""

from __future__ import annotations

from hypothesis import given, strategies as st

from mace_ros.finetune.sample import Sample, SampleScore
from mace_ros.learning.gate import BATCH_TOKENS, batches, Gate, wrong


def sample(tokens: int, name: int = 0) -> Sample:
    return Sample((name,) * tokens, (0.0,) + (1.0,) * (tokens - 1))


def scores(*exact: bool) -> list[SampleScore]:
    return [SampleScore(-1.0, 3, right, 1.0 if right else -1.0) for right in exact]


@given(st.lists(st.integers(2, 300), max_size=20))
def test_all_samples_are_scored_once_and_in_order(lengths: list[int]) -> None:
    many = [sample(n, i) for i, n in enumerate(lengths)]
    parts = list(batches(many))
    assert [s for part in parts for s in part] == many
    assert all(len(b) == 1 or sum(len(s.tokens) for s in b) <= BATCH_TOKENS for b in parts)


def test_samples_that_are_not_given_word_for_word_are_lost() -> None:
    a, b, c = (sample(3, i) for i in range(3))
    gate = Gate({'corrections': [a, b], 'none': [], 'calls': [c]})
    assert gate.samples == [a, b, c]
    assert wrong(gate.samples, scores(True, True, True)) == []
    assert wrong(gate.samples, scores(True, False, False)) == [b, c]
    assert gate.reason([b, c]) == (
        'corrections: 1 of 2 would be lost; calls: 1 of 1 would be lost')
    assert gate.reason([c]) == 'calls: 1 of 1 would be lost'


def test_what_is_not_guarded_is_not_counted() -> None:
    a, b, c = (sample(3, i) for i in range(3))
    gate = Gate({'corrections': [a, b], 'calls': [c]}).without([a])
    assert gate.samples == [b, c]
    assert gate.reason([b]) == 'corrections: 1 of 1 would be lost'
