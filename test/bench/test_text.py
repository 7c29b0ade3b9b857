# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Answers are compared with what is expected in them."""

import pytest

from bench.common.text import contains_phrase


@pytest.mark.parametrize(('answer', 'key', 'contained'), [
    ('The capital of Italy is Rome.', 'rome', True),
    ('An hour has 3600 seconds.', '60', False),
    ('A triangle has 3 sides.', 'three', True),
    ('Seven times six is forty-two.', '7', True),
    ('A triangle has 13 sides.', 'three', False),
    ('The number is 492.', 'four nine two', False),
])
def test_a_key_phrase_is_found_as_whole_words(answer: str, key: str, contained: bool) -> None:
    assert contains_phrase(answer, key) is contained
