# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A trace of iterations, as Perfetto reads it."""

from __future__ import annotations

from collections.abc import Iterator
import json
import math
from pathlib import Path
import time
from typing import Any

import pytest
from support.robot import RANDOM_MODEL

from mace_ros.api.events import (
    Correction,
    CorrectionState,
    CorrectionStatus,
    FinishReason,
    Query,
    Response,
)
from mace_ros.api.settings import Settings
from mace_ros.engine.builder import build_engine
from mace_ros.engine.engine import Engine
from mace_ros.telemetry import trace as trace_room
from mace_ros.telemetry.trace import check_extent, InvalidTrace, Record, trace_path, write_trace


@pytest.fixture(scope='module')
def engine(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    made = build_engine(Settings().updated({
        'model.source': str(model_folder), 'model.device': 'cpu', 'model.threads': 1,
        'memory.kv_cache_tokens': 8192, **RANDOM_MODEL,
    }), storage=tmp_path_factory.mktemp('traced'))
    yield made
    made.close()


def run(engine: Engine, until: Any, seconds: float = 200.0) -> list[Any]:
    """Step until something is true of the events so far; return them."""
    events: list[Any] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        iteration = engine.step()
        events += iteration.events
        if until(events):
            return events
        if iteration.wake_at is None:    # the journal is at work
            time.sleep(0.001)
    raise AssertionError('it did not happen')


@pytest.fixture(scope='module')
def records(engine: Engine) -> list[Record]:
    """Return a trace of two answers, one broken off, and of a correction that is learned."""
    trace = engine.trace(trace_room.MAX_ITERATIONS, 600.0)
    engine.submit(Query('One?', id='one', max_tokens=4, priority=1))
    engine.submit(Query('Two?', id='two', max_tokens=4000))
    run(engine, lambda events: any(isinstance(e, Response) for e in events))
    engine.cancel('two')
    engine.correct(Correction('Ho.', id='c', prompt='Hi?', profile='somebody'))
    run(engine, lambda events: any(
        isinstance(e, CorrectionStatus) and e.state is CorrectionState.LEARNED for e in events))
    engine.submit(Query('Three?', id='three', max_tokens=4000))
    for _ in range(3):
        engine.step()
    assert not trace.done()
    engine.pause()       # the node is deactivated: the records so far are written
    assert trace.result(0.0)
    return trace.result()


def test_the_format_is_that_of_the_trace_viewers(records: list[Record]) -> None:
    assert json.loads(json.dumps(records, allow_nan=False)) == records
    assert {r['ph'] for r in records} == {'M', 'X', 'C', 'b', 'e', 'i'}
    timed = [r for r in records if r['ph'] != 'M']
    assert [r['ts'] for r in timed] == sorted(r['ts'] for r in timed)
    for record in timed:
        assert record['name']
        assert math.isfinite(record['ts'])
        assert record.get('dur', 0.0) >= 0.0
    counters = [r['args'] for r in records if r['ph'] == 'C']
    assert all(type(v) is int for c in counters for v in c.values())


def test_slices_of_the_device_are_nested(records: list[Record]) -> None:
    open_until: list[float] = []
    slices = [r for r in records if r['ph'] == 'X']
    for piece in sorted(slices, key=lambda r: (r['ts'], -r['dur'])):
        while open_until and piece['ts'] >= open_until[-1]:
            open_until.pop()
        end = piece['ts'] + piece['dur']
        assert not open_until or end <= open_until[-1] + 0.001
        open_until.append(end)
    # On a device that is busy elsewhere a step is too long for one piece, and recomputed.
    names = {r['name'].removesuffix('_recomputed') for r in slices}
    assert {'iteration', 'receive', 'plan', 'pass', 'sample', 'commit', 'fine-tune optimizer',
            'fine-tune head', 'fine-tune backward'} <= names


def test_a_pass_is_recorded_with_its_token_counts(records: list[Record]) -> None:
    passes = [r['args'] for r in records if r['name'] == 'pass']
    assert any(p['prefill_tokens'] > 1 for p in passes)
    assert any(p['decode_rows'] == 2 for p in passes)
    assert all(p['predicted_ms'] > 0 for p in passes)
    assert all(r['args']['tokens'] > 0 for r in records
               if r['name'].startswith('fine-tune backward'))


def test_each_query_has_its_stages(records: list[Record]) -> None:
    stacks: dict[int, list[str]] = {}
    stages: dict[int, list[str]] = {}
    for record in records:
        if record.get('cat') != 'query':
            continue
        stack = stacks.setdefault(record['id'], [])
        if record['ph'] == 'b':
            stack.append(record['name'])
            stages.setdefault(record['id'], []).append(record['name'])
        else:
            assert stack.pop() == record['name']
    assert not any(stacks.values())
    lives = {each[0]: each[1:] for each in stages.values()}
    for query in ('query one', 'query two', 'query three'):
        assert lives[query] == ['waits', 'prefill', 'decode']
    begins = {r['name']: r['args'] for r in records if r['ph'] == 'b' and 'args' in r}
    assert begins['query one']['end'] in (FinishReason.STOP.name, FinishReason.LENGTH.name)
    assert begins['query two']['end'] == FinishReason.CANCELLED.name
    assert begins['query three']['end'] == FinishReason.CANCELLED.name


def test_corrections_and_versions_are_marked(records: list[Record]) -> None:
    marks = [r['name'] for r in records if r['ph'] == 'i']
    assert marks.index('correction c: ACCEPTED') < marks.index('correction c: TRAINING')
    assert 'correction c: LEARNED' in marks
    assert any(m.startswith('version 1: PUBLISHED') for m in marks)


def test_a_trace_ends_after_its_iterations(engine: Engine) -> None:
    engine.submit(Query('Long?', id='long', max_tokens=4000))
    trace = engine.trace(5, 600.0)
    run(engine, lambda _: trace.done())
    assert sum(r['name'] == 'pass' for r in trace.result()) == 5
    engine.step()       # ends no trace a second time, which would raise
    engine.cancel('long')
    engine.step()


def test_a_trace_of_an_idle_engine_ends_in_time(engine: Engine) -> None:
    while engine.step().wake_at is not None:
        pass
    trace = engine.trace(5, 0.05)
    wakes = [engine.step().wake_at]
    assert wakes[0] is not None      # so that an iteration checks the time
    run(engine, lambda _: trace.done())
    assert trace.result()


def test_a_trace_ends_at_its_maximum_size(
    engine: Engine, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trace_room, 'MAX_RECORDS', 50)
    engine.submit(Query('Long?', id='long', max_tokens=4000))
    trace = engine.trace(1000, 600.0)
    run(engine, lambda _: trace.done())
    assert len(trace.result()) < 80
    engine.cancel('long')
    engine.step()


# -- the file ----------------------------------------------------------------------------


def test_a_file_appears_as_a_whole(tmp_path: Path, records: list[Record]) -> None:
    path = trace_path(tmp_path, 'mine')
    assert path == tmp_path / 'traces/mine.json'
    write_trace(records, path)
    assert json.loads(path.read_text())['traceEvents'] == records
    assert [p.name for p in path.parent.iterdir()] == ['mine.json']
    with pytest.raises(InvalidTrace, match='exists'):
        trace_path(tmp_path, 'mine')


def test_a_file_that_can_not_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / 'traces').write_text('not a folder')
    with pytest.raises(OSError, match='traces'):
        write_trace([], trace_path(tmp_path, 'mine'))
    with pytest.raises(TypeError):
        write_trace([{'args': object()}], tmp_path / 'other/mine.json')
    assert list((tmp_path / 'other').iterdir()) == []


@pytest.mark.parametrize('name', ['../mine', '/tmp/mine', '..', '.hidden', 'a/b', 'a b', 'a\n',
                                  'ä', 'x' * 101])
def test_the_name_of_a_trace_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidTrace, match='name'):
        trace_path(tmp_path, name)


def test_the_number_of_trace_files_is_limited(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_room, 'MAX_FILES', 2)
    for name in ('a', 'b'):
        write_trace([], trace_path(tmp_path, name))
    with pytest.raises(InvalidTrace, match='delete some'):
        trace_path(tmp_path, 'c')


@pytest.mark.parametrize(('iterations', 'seconds'), [
    (0, 1.0), (trace_room.MAX_ITERATIONS + 1, 1.0), (1, 0.0), (1, -1.0), (1, math.nan),
    (1, math.inf)])
def test_a_trace_needs_valid_limits(iterations: int, seconds: float) -> None:
    with pytest.raises(InvalidTrace):
        check_extent(iterations, seconds)
