# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Input is bounded in size, in rate, and in the backlog of a slow disk."""

from __future__ import annotations

from pathlib import Path
import threading

import pytest

from mace_ros.api.events import (
    Correction,
    CorrectionState,
    CorrectionStatus,
    ErrorCode,
    InvalidCorrection,
    InvalidQuery,
    Query,
)
from mace_ros.api.settings import Settings
from mace_ros.api.validation import (
    checked_correction,
    checked_query,
    CorrectionLimiter,
    MAX_ID,
    MAX_STOP,
    MAX_STOPS,
    MAX_TEXT,
    MAX_UNWRITTEN,
)
from mace_ros.engine.engine import Engine

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
    'corrected', 'prompt', 'rejected', 'source', 'id', 'query_id', 'conversation_id', 'profile'])
def test_a_larger_correction_is_refused_naming_the_field(field: str) -> None:
    given = {'corrected': 'Ho.', 'prompt': 'Hi?', field: f'{TEXT}x'}
    with pytest.raises(InvalidCorrection, match=f'^{field}: '):
        checked_correction(Correction(**given))


def taken(door: CorrectionLimiter, start: float, count: int, every_s: float,
          per_minute: int) -> int:
    """Return how many of evenly spaced corrections are let in."""
    let_in = 0
    for n in range(count):
        try:
            door.let_in(start + n * every_s, per_minute, 0)
        except InvalidCorrection as refused:
            assert 'correction.max_per_minute' in str(refused)
        else:
            let_in += 1
    return let_in


def test_corrections_come_at_a_bounded_rate() -> None:
    door = CorrectionLimiter()
    assert taken(door, 1000.0, 100, 0.0, 30) == 30          # a minute's worth at once
    assert taken(door, 1000.0, 600, 0.1, 30) in (29, 30)    # and then as many a minute
    assert taken(door, 5000.0, 100, 0.0, 30) == 30          # never more, however long it rests
    assert taken(door, 5000.0, 60, 2.0, 30) in (59, 60)     # just as fast as is allowed
    assert taken(door, 9000.0, 10, 0.0, 5) == 5             # another limit is in force at once


def test_a_slow_disk_bounds_the_backlog(model_folder: Path, tmp_path: Path) -> None:
    """Surplus corrections are refused; all others are on disk once the disk is fast again."""
    engine = Engine(Settings().updated({
        'model.source': str(model_folder), 'model.device': 'cpu', 'model.threads': 1,
        'finetune.budget': 0.0, 'correction.max_per_minute': 1000000}), storage=tmp_path)
    fast = threading.Event()
    engine._journal.submit(lambda _: fast.wait(60.0))
    sent = MAX_UNWRITTEN + 500
    for n in range(sent):
        engine.correct(Correction(f'Ho {n}.', id=str(n), prompt=f'Hi {n}?'))
    events = [e for _ in range(3) for e in engine.step().events]
    refused = [e for e in events if isinstance(e, CorrectionStatus)]
    assert {e.state for e in refused} == {CorrectionState.REJECTED}
    assert all('the disk is slow' in e.reason for e in refused)
    assert engine.status().journal_backlog == MAX_UNWRITTEN
    assert 500 < len(refused) < 510     # the engine's own writes count, too

    fast.set()
    accepted = {e.id for e in engine.close() if isinstance(e, CorrectionStatus)
                and e.state is CorrectionState.ACCEPTED}
    assert len(accepted) == sent - len(refused)
    assert not accepted & {e.id for e in refused}
