# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The checks of bench.operation, from samples made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from bench.operation.http_checks import checks, reported


def slow_readers(ms: float, unread_kb: float) -> dict[str, Any]:
    """Return two pairs of blocks: beside slow readers, others need ``ms`` instead of 20."""
    return {'slow_readers': [
        {'pair': pair, 'slow': slow, 'piece_ms': ms if slow else 20.0,
         'ttft_ms': [ms, ms, 900.0] if slow else [20.0, 20.0, 900.0],
         'unread_kb': [unread_kb if slow else 1.0, 999.0]}
        for pair in range(2) for slow in (False, True)]}


@pytest.mark.parametrize(('ms', 'unread_kb', 'holds'), [
    (20.0, 400.0, [True, True, True]), (21.5, 400.0, [False, True, True]),
    (40.0, 400.0, [False, False, True]), (20.0, 90.0, [True, True, False])])
def test_slow_readers_must_be_stuck_and_must_not_slow_others(
        ms: float, unread_kb: float, holds: list[bool]) -> None:
    assert [each.holds for each in checks(slow_readers(ms, unread_kb))] == holds


def test_barge_in_is_judged_by_way_and_compared_with_an_iteration() -> None:
    """What counts is the last chunk over the topic, and the response after a disconnect."""
    samples = {'barge_in': [
        {'way': way, 'silent_ms': 30.0, 'released_ms': 200.0, 'tpot_ms': tpot_ms, 'learned': True}
        for way in ('topic', 'http') for tpot_ms in (40.0, 60.0, None)]}
    topic, topic_iterations, http, http_iterations = checks(samples)
    assert (topic.value, topic.holds) == (30.0, True)
    assert (http.value, http.holds) == (200.0, False)
    assert topic_iterations.value == pytest.approx((30.0 / 40.0 + 30.0 / 60.0) / 2)
    assert not http_iterations.holds
    assert 'an iteration takes 50 ms' in reported(samples)[0].note


def test_the_difference_of_two_ways_comes_with_its_uncertainty() -> None:
    rows = [{'others': 2, 'http_ms': 100.0 + 10.0 * (i % 7), 'topic_ms': 98.0 + 10.0 * (i % 5)}
            for i in range(70)]
    [check] = checks({'first_tokens': rows})
    assert check.value == pytest.approx(12.0)
    low, high = check.note.rpartition('difference ')[2].removesuffix(' ms').split(' to ')
    assert float(low) <= check.value <= float(high)
