# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The size of incoming queries and corrections is bounded."""

from __future__ import annotations

import pytest

from mace_ros.api.chat_validation import MAX_TEXT
from mace_ros.api.events import (
    Correction,
    ErrorCode,
    InvalidCorrection,
    InvalidQuery,
    Query,
)
from mace_ros.api.settings import Settings
from mace_ros.api.validation import (
    checked_correction,
    checked_query,
    MAX_ID,
    MAX_STOP,
    MAX_STOPS,
)

ID, TEXT = 'i' * MAX_ID, 'ä' * MAX_TEXT


def test_the_largest_query_and_correction_are_accepted() -> None:
    checked_query(Query(TEXT, id=ID, conversation_id=ID, profile=ID, system=TEXT,
                        stop=('s' * MAX_STOP,) * MAX_STOPS), Settings())
    checked_correction(Correction(TEXT, id=ID, query_id=ID, conversation_id=ID, prompt=TEXT,
                                  rejected=TEXT, profile=ID, source=TEXT))


@pytest.mark.parametrize(('field', 'value', 'code'), [
    ('text', f'{TEXT}x', ErrorCode.INVALID_PARAMETER),
    ('system', f'{TEXT}x', ErrorCode.INVALID_PARAMETER),
    ('id', f'{ID}x', ErrorCode.INVALID_ID),
    ('conversation_id', f'{ID}x', ErrorCode.INVALID_ID),
    ('profile', f'{ID}x', ErrorCode.INVALID_ID),
    ('stop', ('s' * MAX_STOP + 'x',), ErrorCode.INVALID_PARAMETER),
    ('stop', ('s',) * (MAX_STOPS + 1), ErrorCode.INVALID_PARAMETER)])
def test_a_larger_query_is_refused_naming_the_field(
    field: str, value: object, code: ErrorCode,
) -> None:
    with pytest.raises(InvalidQuery, match=f'^{field}: ') as refused:
        checked_query(Query(**{'text': 'Hi', field: value}), Settings())
    assert refused.value.code is code


@pytest.mark.parametrize('field', [
    'corrected', 'hint', 'prompt', 'rejected', 'source', 'id', 'query_id', 'conversation_id',
    'profile'])
def test_a_larger_correction_is_refused_naming_the_field(field: str) -> None:
    given = {'corrected': 'Ho.', 'prompt': 'Hi?', field: f'{TEXT}x'}
    with pytest.raises(InvalidCorrection, match=f'^{field}: '):
        checked_correction(Correction(**given))


@pytest.mark.parametrize('empty', ['', ' \n'])
def test_a_correction_without_a_text_is_a_thumbs_down(empty: str) -> None:
    checked = checked_correction(Correction(empty, query_id='q', hint=empty))
    assert (checked.corrected, checked.hint) == ('', '')


def test_a_correction_names_an_answer_or_one_that_is_on_record() -> None:
    with pytest.raises(InvalidCorrection, match=r'^query_id, conversation_id or prompt'):
        checked_correction(Correction('Ho.'))
    assert checked_correction(Correction('Ho.', id='of a hint')).id == 'of a hint'
