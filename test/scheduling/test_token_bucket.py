# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The token bucket behind learning's budget and the limit of corrections."""

import math

import pytest

from mace_ros.scheduling.token_bucket import TokenBucket


def test_tokens_accrue_at_the_rate_up_to_the_capacity():
    bucket = TokenBucket(rate=2.0, capacity=5.0)
    bucket.advance(100.0)
    assert bucket.tokens == 0.0     # the clock starts here
    bucket.advance(101.0)
    assert bucket.tokens == 2.0
    bucket.advance(100.0)           # a time in the past changes nothing
    bucket.advance(101.0)
    assert bucket.tokens == 2.0
    bucket.advance(200.0)
    assert bucket.tokens == 5.0


def test_an_overdrawn_bucket_says_when_it_is_available_again():
    bucket = TokenBucket(rate=0.5, capacity=1.0)
    assert bucket.available_at() == math.inf    # no clock yet
    bucket.advance(10.0)
    assert bucket.available_at() == 10.0
    bucket.spend(3.0)
    assert bucket.available_at() == pytest.approx(16.0)
    bucket.spend(3.0, lowest=-4.0)
    assert bucket.tokens == -4.0
    bucket.resize(rate=0.0, capacity=1.0)
    assert bucket.available_at() == math.inf


def test_a_smaller_capacity_discards_the_excess():
    bucket = TokenBucket(rate=1.0, capacity=math.inf, tokens=math.inf)
    bucket.resize(rate=1.0, capacity=3.0)
    assert bucket.tokens == 3.0
