# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Numbers agree with what they count."""

import pytest

from mace_ros.api.wording import counted


@pytest.mark.parametrize(('number', 'text'), [(0, '0 steps'), (1, '1 step'), (2, '2 steps')])
def test_a_noun_agrees_with_its_number(number: int, text: str) -> None:
    assert counted(number, 'step') == text


@pytest.mark.parametrize(('number', 'text'), [(1, '1 query waits'), (7, '7 queries wait')])
def test_a_verb_agrees_as_well(number: int, text: str) -> None:
    assert counted(number, 'query waits', 'queries wait') == text
