# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The gate tells what a candidate would lose."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, strategies as st

from mace_ros.execution.finetune import Sample, SampleScore
from mace_ros.learning.gate import BATCH_TOKENS, Gate


def sample(tokens: int, name: int = 0) -> Sample:
    return Sample((name,) * tokens, (0.0,) + (1.0,) * (tokens - 1))


def scores(exact: Sequence[bool]) -> list[SampleScore]:
    return [SampleScore(-1.0, 3, right, 1.0 if right else -1.0) for right in exact]


@given(st.lists(st.integers(2, 300), max_size=20), st.lists(st.integers(2, 300), max_size=20))
def test_all_samples_are_scored_once_and_in_order(first: list[int], second: list[int]) -> None:
    groups = {'a': [sample(n, i) for i, n in enumerate(first)],
              'b': [sample(n, 100 + i) for i, n in enumerate(second)]}
    batches = list(Gate(groups).batches())
    assert [s for batch in batches for s in batch] == groups['a'] + groups['b']
    assert all(len(b) == 1 or sum(len(s.tokens) for s in b) <= BATCH_TOKENS for b in batches)


def test_what_was_wrong_before_can_not_be_lost() -> None:
    gate = Gate({'a': [sample(3, i) for i in range(3)]})
    assert not gate.judge(scores([False] * 3), scores([False] * 3), 0.0).reason
    assert not gate.judge(scores([False] * 3), scores([True] * 3), 0.0).reason


def test_each_group_may_lose_its_share() -> None:
    few, many = [sample(3, i) for i in range(2)], [sample(3, 10 + i) for i in range(10)]
    gate = Gate({'few': few, 'none': [], 'many': many})
    before = scores([True] * 12)
    one_of_many = scores([True] * 2 + [False] + [True] * 9)
    assert not gate.judge(before, one_of_many, 0.1).reason
    verdict = gate.judge(before, one_of_many, 0.05)
    assert verdict.reason == '1 of 10 many would change (gate.tolerance 0.05)'
    assert verdict.lost == (many[0],)
    one_of_few = scores([True, False] + [True] * 10)
    verdict = gate.judge(before, one_of_few, 0.1)
    assert '1 of 2 few' in verdict.reason and 'many' not in verdict.reason
    assert verdict.lost == (few[1],)
