# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Incoming corrections: their rate and the journal's backlog are bounded."""

from __future__ import annotations

from pathlib import Path
import threading

from mace_ros.api.events import Correction, CorrectionState, CorrectionStatus, InvalidCorrection
from mace_ros.api.settings import Settings
from mace_ros.api.validation import MAX_UNWRITTEN
from mace_ros.engine.builder import build_engine
from mace_ros.engine.correction_limiter import CorrectionLimiter


def admitted(limiter: CorrectionLimiter, start: float, count: int, every_s: float,
             per_minute: int) -> int:
    """Return how many of ``count`` evenly spaced corrections are admitted."""
    total = 0
    for n in range(count):
        try:
            limiter.admit(start + n * every_s, per_minute, 0)
        except InvalidCorrection as refused:
            assert 'correction.max_per_minute' in str(refused)
        else:
            total += 1
    return total


def test_the_rate_of_corrections_is_bounded() -> None:
    limiter = CorrectionLimiter()
    assert admitted(limiter, 1000.0, 100, 0.0, 30) == 30          # one minute's allowance at once
    assert admitted(limiter, 1000.0, 600, 0.1, 30) in (29, 30)    # then that many per minute
    assert admitted(limiter, 5000.0, 100, 0.0, 30) == 30          # no more after a long pause
    assert admitted(limiter, 5000.0, 60, 2.0, 30) in (59, 60)     # exactly at the limit
    assert admitted(limiter, 9000.0, 10, 0.0, 5) == 5             # a new limit applies at once


def test_the_backlog_of_a_slow_disk_is_bounded(model_folder: Path, tmp_path: Path) -> None:
    """Excess corrections are rejected; admitted ones are saved once the disk is quick again."""
    engine = build_engine(Settings().updated({
        'model.source': str(model_folder), 'model.device': 'cpu', 'model.threads': 1,
        'finetune.budget': 0.0, 'correction.max_per_minute': 1000000}), storage=tmp_path)
    quick = threading.Event()
    engine.parts.journal.submit(lambda _: quick.wait(60.0))
    sent = MAX_UNWRITTEN + 500
    for n in range(sent):
        engine.correct(Correction(f'Ho {n}.', id=str(n), prompt=f'Hi {n}?'))
    events = [e for _ in range(3) for e in engine.step().events]
    refused = [e for e in events if isinstance(e, CorrectionStatus)]
    assert {e.state for e in refused} == {CorrectionState.REJECTED}
    assert all('the disk is slow' in e.reason for e in refused)
    assert engine.status().journal_backlog == MAX_UNWRITTEN
    assert 500 < len(refused) < 510     # the engine's own writes count as well

    quick.set()
    accepted = {e.id for e in engine.close() if isinstance(e, CorrectionStatus)
                and e.state is CorrectionState.ACCEPTED}
    assert len(accepted) == sent - len(refused)
    assert not accepted & {e.id for e in refused}
