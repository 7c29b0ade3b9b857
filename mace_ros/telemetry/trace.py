# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
A trace of iterations as a file for Perfetto or Chrome's tracing viewer.

The file is a JSON object in Chrome's Trace Event Format. The phases of an iteration are nested
slices on the track ``device``, the contents of a pass are counters, and each query has a track
of its own. A trace holds the ids of queries and corrections, never their texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import json
import os
from pathlib import Path
import re
import threading
import time
from typing import Any, TypeAlias

from mace_ros.api.events import AdapterVersion, CorrectionStatus, Event, Response
from mace_ros.scheduling.plan import Plan
from mace_ros.scheduling.request import Request
from mace_ros.telemetry.observer import IterationObserver

MAX_ITERATIONS = 10000
MAX_SECONDS = 600.0
MAX_RECORDS = 100_000    # about 15 MB; a longer trace is cut off
MAX_FILES = 100          # in the folder

_NAME = re.compile(r'[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}')
_PIECE = 200             # records encoded at once, while other threads wait for the GIL

# An event of the format: https://perfetto.dev/docs/getting-started/other-formats
Record: TypeAlias = dict[str, Any]


class InvalidTrace(ValueError):
    """A trace request can't be served; the message says why."""


class Trace(IterationObserver):
    """
    Records iterations until it is complete.

    Times are seconds on the engine's clock.
    """

    def __init__(self, iterations: int, ends_at: float,
                 clock: Callable[[], float] = time.monotonic) -> None:
        """Record ``iterations`` iterations in which the device works, or until ``ends_at``."""
        self.ends_at = ends_at
        self._left, self._clock = iterations, clock
        self._records: list[Record] = []
        self._requests: dict[str, Request] = {}
        self._ends: dict[str, Response] = {}
        self._worked = False

    @property
    def complete(self) -> bool:
        """Whether the trace has reached its number of iterations or records, or its end."""
        return (self._left <= 0 or len(self._records) >= MAX_RECORDS
                or self._clock() >= self.ends_at)

    def phase(self, name: str, began: float, ended: float, values: Mapping[str, float]) -> None:
        """Record a phase as a slice."""
        self._records.append(_record(
            'X', name, _microseconds(began), cat='iteration', args=dict(values),
            dur=_microseconds(ended) - _microseconds(began)))

    def planned(self, plan: Plan, in_flight: int) -> None:
        """Record the plan as counters."""
        if plan.is_empty:
            return
        self._worked = True
        now = _microseconds(self._clock())
        for request in (*plan.decode, *(chunk.request for chunk in plan.prefill)):
            self._requests.setdefault(request.id, request)
        self._records += [
            _record('C', 'tokens in the pass', now, args={
                'decode': len(plan.decode), 'prefill': sum(c.tokens for c in plan.prefill),
                'fine-tune': plan.finetune_tokens}),
            _record('C', 'fine-tune segments', now, args={'planned': plan.segments})]

    def finished(self, events: Sequence[Event]) -> None:
        """Record the end of an iteration, and marks for corrections and versions."""
        now = _microseconds(self._clock())
        self._left -= self._worked
        self._worked = False
        for event in events:
            if isinstance(event, Response):
                self._ends[event.query_id] = event
            elif isinstance(event, CorrectionStatus):
                self._records.append(_record(
                    'i', f'correction {event.id}: {event.state.name}', now, s='p'))
            elif isinstance(event, AdapterVersion):
                self._records.append(_record(
                    'i', f'version {event.version}: {event.state.name}', now, s='p',
                    args={'profile': event.profile, 'train_tokens': event.train_tokens}))

    def finish(self, waiting: Iterable[Request]) -> list[Record]:
        """Return the records by time; ``waiting`` are the requests that have not started."""
        for request in waiting:
            self._requests.setdefault(request.id, request)
        lives = [r for number, request in enumerate(self._requests.values())
                 for r in self._life(number, request)]
        names = [_record('M', kind, 0.0, args={'name': name})
                 for kind, name in (('process_name', 'mace'), ('thread_name', 'device'))]
        # The sort is stable: a slice that begins when another one ends stays behind it.
        return [*names, *sorted([*self._records, *lives], key=lambda record: record['ts'])]

    def _life(self, number: int, request: Request) -> Iterator[Record]:
        """Yield a query and its stages as nested slices on a track of its own."""
        end = self._ends.get(request.id)
        ended = self._clock() if end is None else request.arrival + end.e2e_ms / 1e3
        stages = [(name, time) for name, time in (
            ('waits', request.arrival), ('prefill', request.started_at),
            ('decode', request.first_token_at)) if time is not None]

        def edge(kind: str, name: str, at: float, **more: Any) -> Record:
            return _record(kind, name, _microseconds(at), cat='query', id=number, **more)

        yield edge('b', f'query {request.id}', request.arrival, args={
            'prompt_tokens': request.prompt_tokens, 'output_tokens': request.output_tokens,
            'end': 'still running' if end is None else end.finish_reason.name})
        for (name, at), (_, until) in zip(stages, [*stages[1:], ('', ended)], strict=True):
            yield edge('b', name, at)
            yield edge('e', name, until)
        yield edge('e', f'query {request.id}', ended)


def trace_path(folder: Path, name: str) -> Path:
    """
    Return the path of a new trace below the storage folder.

    Raises :class:`InvalidTrace` if the name is not a plain file name, if the file exists, or
    if the folder holds :data:`MAX_FILES` traces.
    """
    traces = folder / 'traces'
    name = name or time.strftime('%Y%m%d-%H%M%S')
    if not _NAME.fullmatch(name):
        raise InvalidTrace(
            'name: 1 to 100 letters, digits, dots, dashes and underlines, and no dot at the '
            'beginning')
    path = traces / f'{name}.json'
    if path.exists():
        raise InvalidTrace(f'name: {path} exists')
    if len(list(traces.glob('*.json'))) >= MAX_FILES:
        raise InvalidTrace(f'{traces} holds {MAX_FILES} traces already: delete some')
    return path


def check_extent(iterations: int, seconds: float) -> None:
    """Raise :class:`InvalidTrace` if a trace would be empty or too long."""
    if not 1 <= iterations <= MAX_ITERATIONS:
        raise InvalidTrace(f'iterations: {iterations} is not between 1 and {MAX_ITERATIONS}')
    if not 0.0 < seconds <= MAX_SECONDS:    # also refuses NaN
        raise InvalidTrace(f'seconds: {seconds} is not above 0 and at most {MAX_SECONDS:g}')


def write_trace(records: Sequence[Record], path: Path) -> None:
    """Write a trace atomically. Raises ``OSError``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix('.part')
    try:
        with temporary.open('w') as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [')
            for start in range(0, len(records), _PIECE):
                lines = ',\n'.join(
                    json.dumps(record) for record in records[start:start + _PIECE])
                file.write(',\n' * (start > 0) + lines)
                time.sleep(0.0)    # lets the device's thread have the GIL
            file.write(']}\n')
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_in_background(records: Sequence[Record], path: Path,
                        done: Callable[[str], None]) -> threading.Thread:
    """Write a trace in a thread of its own; ``done`` receives the error, empty if none."""
    def write() -> None:
        try:
            write_trace(records, path)
        except OSError as error:
            done(f'{path}: {error.strerror or error}')
        else:
            done('')

    thread = threading.Thread(target=write, name='trace', daemon=True)
    thread.start()
    return thread


def _record(kind: str, name: str, time_us: float, **more: Any) -> Record:
    return {'ph': kind, 'name': name, 'ts': time_us, 'pid': 1, 'tid': 1, **more}


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)
