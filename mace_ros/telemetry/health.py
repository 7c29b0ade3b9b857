# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Diagnoses the node from events, the engine's status and the device counters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from enum import Enum, IntEnum
import threading

from mace_ros.api.events import (
    AdapterVersion,
    CorrectionState,
    CorrectionStatus,
    Event,
    Response,
    VersionState,
)
from mace_ros.api.settings import Settings
from mace_ros.api.wording import counted
from mace_ros.telemetry.device_counters import Reading
from mace_ros.telemetry.latency import Attainment, LatencyWindow
from mace_ros.telemetry.status import Status

MIN_REQUESTS = 5          # in the window, to judge the SLO attainment
# The engine's thread is stalled once a status is this late and this many samples are missing.
STALLED_S, STALLED_SAMPLES = 10.0, 3
LOW_SPACE = 2.0           # times storage.min_free_mb, before a warning
MAX_BACKLOG = 100         # journal writes that wait for the disk, before a warning
MEMORY_WARN, MEMORY_ERROR = 0.92, 0.98


class NodeState(Enum):
    """The lifecycle state of the node; the values are the labels of ``~/get_state``."""

    UNCONFIGURED = 'unconfigured'
    INACTIVE = 'inactive'
    ACTIVE = 'active'
    FINALIZED = 'finalized'


class Level(IntEnum):
    """Severity; the values are those of ``DiagnosticStatus``."""

    OK = 0
    WARN = 1
    ERROR = 2


@dataclass
class Finding:
    """The diagnosis of one part of the node."""

    name: str
    values: dict[str, float | int | str] = field(default_factory=dict)
    problems: list[tuple[Level, str]] = field(default_factory=list)
    ok_message: str = 'OK'  # the message if there is no problem

    @property
    def level(self) -> Level:
        """The highest severity of the problems."""
        return max((level for level, _ in self.problems), default=Level.OK)

    @property
    def message(self) -> str:
        """All problems in one line, the worst first."""
        worst_first = sorted(self.problems, key=lambda problem: -problem[0])
        return '; '.join(text for _, text in worst_first) or self.ok_message

    def add(self, level: Level, text: str) -> None:
        """Add a problem."""
        self.problems.append((level, text))


class Health:
    """Collects events and derives findings from them; thread-safe."""

    def __init__(self) -> None:
        """Start with a healthy node that is not configured."""
        self.window = LatencyWindow()
        self.state = NodeState.UNCONFIGURED
        self.doing = ''                 # current step of a lifecycle transition
        self.fault = ''                 # why a transition, or the engine, failed
        self.frozen = False             # whether ~/freeze_learning stopped learning
        self._lock = threading.Lock()
        self._problems: list[tuple[float, str]] = []      # time and text
        self._unreadable: dict[str, str] = {}             # by profile

    def note(self, event: Event, now: float) -> None:
        """Take an event into account."""
        if isinstance(event, Response):
            self.window.add(event, now)
        elif isinstance(event, CorrectionStatus):
            if event.state is CorrectionState.FAILED:
                self._add_problem(f'a correction failed: {event.reason}', now)
        elif isinstance(event, AdapterVersion):
            what = f'version {event.version} of profile {event.profile!r}: {event.reason}'
            if event.state is VersionState.ROLLED_BACK:
                self._add_problem(f'rolled back: {what}', now)
            if event.state is not VersionState.REJECTED:
                if event.version:      # the base model may stand in for an unreadable version
                    with self._lock:
                        self._unreadable.pop(event.profile, None)
            elif event.path:           # a version that was published before cannot be loaded
                with self._lock:
                    self._unreadable[event.profile] = what
            else:
                self._add_problem(f'rejected by the gate: {what}', now)

    def _add_problem(self, text: str, now: float) -> None:
        with self._lock:
            self._problems.append((now, text))

    def findings(self, status: Status | None, reading: Reading, settings: Settings,
                 now: float) -> Iterator[Finding]:
        """Return the findings at ``now``; ``status`` is the latest one of the engine."""
        attainment = self.window.attainment(now, settings.monitor.window_s)
        yield self._serving(status, attainment, settings, now)
        yield self._learning(status, settings, now)
        yield self._device(reading, settings)

    def _serving(self, status: Status | None, attainment: Attainment, settings: Settings,
                 now: float) -> Finding:
        found = Finding('serving', {'state': self.state.value},
                        ok_message=self.doing or self.state.value)
        if self.fault:
            found.add(Level.ERROR, self.fault)
        if status is not None and self.state is NodeState.ACTIVE:
            found.values.update(
                queue_depth=status.queue_depth, prefilling=status.prefilling,
                decode_rows=status.decode_rows, kv_use=status.kv_use,
                busy_share=status.statistics.busy_share)
            asked_mb = settings.memory.budget_mb
            if 0.0 < asked_mb < status.budget_mb - 1.0:
                found.add(Level.WARN, f'memory.budget_mb is {asked_mb:.0f} MB, but the minimum '
                          f'of {status.budget_mb:.0f} MB is used')
            silent_s = now - status.now
            if silent_s > max(STALLED_S, STALLED_SAMPLES / settings.monitor.rate_hz):
                found.add(Level.ERROR, f'the current iteration has taken {silent_s:.0f} s')
        found.values.update(
            requests=attainment.requests, slo_attainment=attainment.slo_attainment,
            ttft_p95_ms=attainment.ttft_p95_ms, tpot_p95_ms=attainment.tpot_p95_ms)
        if self.state is not NodeState.ACTIVE:
            return found
        if attainment.errors:
            found.add(Level.ERROR, counted(
                attainment.errors, 'query', 'queries') + f' failed: {attainment.error}')
        if attainment.rejected:
            found.add(Level.WARN, counted(
                attainment.rejected, 'query was', 'queries were') + ' rejected: overload')
        if attainment.requests >= MIN_REQUESTS and (
                attainment.slo_attainment < settings.monitor.slo_target):
            found.add(Level.WARN, f'SLOs met for {attainment.slo_attainment:.0%} of '
                      f'{counted(attainment.requests, "answer")}')
        return found

    def _learning(self, status: Status | None, settings: Settings, now: float) -> Finding:
        found = Finding('learning')
        if self.frozen:     # on request: worth a mention, but no problem
            found.add(Level.OK, 'learning is frozen')
        if status is not None:
            found.values.update(
                corrections_waiting=status.corrections_waiting, freshness_s=status.freshness_s,
                live_version=status.live_version, learning_share=status.statistics.learning_share,
                journal_backlog=status.journal_backlog, storage_free_mb=status.storage_free_mb)
            least = settings.storage.min_free_mb
            if status.storage_free_mb < LOW_SPACE * least:
                low = status.storage_free_mb < least
                found.add(Level.ERROR if low else Level.WARN, (
                    f'{status.storage_free_mb:.0f} MB are free on the disk of the storage folder; '
                    f'corrections are rejected below {least:g} (storage.min_free_mb)'))
            if status.journal_error:
                found.add(Level.ERROR, status.journal_error)
            if status.learning_error:
                found.add(Level.ERROR, 'learning failed and will be retried: '
                          f'{status.learning_error}')
            if status.base_questions_left:
                found.ok_message = (
                    counted(status.base_questions_left, 'question')
                    + ' left for the base model, whose answers learning must preserve; '
                    'learning begins after them')
            if status.journal_backlog > MAX_BACKLOG:
                found.add(Level.WARN, f'the disk is slow: {status.journal_backlog} writes of '
                          'the journal wait for it')
            if status.unrecorded:
                found.add(Level.WARN, counted(
                    status.unrecorded, 'answer was', 'answers were')
                    + ' not recorded, and can only be corrected by the prompt')
            if status.freshness_s > settings.slo.freshness_s:
                found.add(Level.WARN, counted(
                    status.corrections_waiting, 'correction waits', 'corrections wait')
                    + f', the oldest for {status.freshness_s:.0f} s')
        with self._lock:
            self._problems = [
                s for s in self._problems if s[0] > now - settings.monitor.window_s]
            problems = [text for _, text in self._problems]
            unreadable = list(self._unreadable.values())
        if problems:
            found.add(Level.WARN, 'failed corrections and rejected or rolled-back versions: '
                      f'{len(problems)}, the latest: {problems[-1]}')
        for text in unreadable:
            found.add(Level.ERROR, text)
        return found

    def _device(self, reading: Reading, settings: Settings) -> Finding:
        found = Finding('device', {
            f.name: getattr(reading, f.name) for f in fields(reading)})
        # A comparison with NaN is False: an unknown value is no problem.
        if reading.memory_use > MEMORY_ERROR:
            found.add(Level.ERROR, f'{reading.memory_use:.0%} of its memory is in use')
        elif reading.memory_use > MEMORY_WARN:
            found.add(Level.WARN, f'{reading.memory_use:.0%} of its memory is in use')
        if reading.temperature_c > settings.monitor.max_temperature_c:
            found.add(Level.WARN, f'its temperature is {reading.temperature_c:.0f} °C')
        return found
