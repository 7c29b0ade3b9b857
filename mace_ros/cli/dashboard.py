# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The page of `mace_monitor`, and its lines of numbers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
import math
import time
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rich.console import Group
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mace_ros.api.wording import counted
from mace_ros.msg import Latency, Response, Scheduler

STALE_S = 3.0           # without messages, after which the page says so
ANSWERS = 8             # latest answers on the page

# Heading, width, and formatter.
COLUMNS = (
    ('queue', 5, lambda m: f'{m.queue_depth}'),
    ('rows', 4, lambda m: f'{m.decode_rows + m.prefilling}'),
    ('tok/s', 6, lambda m: number(m.decode_rate)),
    ('busy', 5, lambda m: share(m.busy_share)),
    ('learn', 5, lambda m: share(m.learning_share)),
    ('KV', 5, lambda m: share(m.kv_use)),
    ('ms', 6, lambda m: number(m.measured_ms)),
    ('TTFT', 6, lambda m: number(m.ttft_p95_ms)),
    ('TPOT', 6, lambda m: number(m.tpot_p95_ms)),
    ('SLO', 5, lambda m: share(m.slo_attainment)),
    ('wait', 4, lambda m: f'{m.corrections_waiting}'),
    ('age', 6, lambda m: number(m.freshness_s)),
    ('version', 7, lambda m: f'{m.live_version}' + ('*' if m.learning_frozen else '')),
)

LEVELS = {DiagnosticStatus.OK: ('OK', 'green'), DiagnosticStatus.WARN: ('WARN', 'yellow'),
          DiagnosticStatus.ERROR: ('ERROR', 'bold red'),
          DiagnosticStatus.STALE: ('STALE', 'magenta')}

DRIFTS = {Scheduler.DRIFT_UNKNOWN: 'drift: too few answers yet', Scheduler.DRIFT_CALM: 'calm',
          Scheduler.DRIFT_DRIFTING: 'queries drift'}

REASONS = {getattr(Response, name): name for name in (
    'STOP', 'LENGTH', 'CANCELLED', 'REJECTED', 'ERROR')}


def line(message: Scheduler) -> str:
    """Return the line of numbers of a message."""
    return ' '.join(text(message).rjust(width) for _, width, text in COLUMNS)


def heading() -> str:
    """Return the heading of the lines."""
    return ' '.join(name.rjust(width) for name, width, _ in COLUMNS)


class Dashboard:
    """The page, built from the latest messages."""

    def __init__(self, node: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """``node`` is its full name; ``clock`` returns seconds."""
        self._node, self._clock = node, clock
        self._scheduler: Scheduler | None = None
        self._received_at = -math.inf
        self._answers: deque[Latency] = deque(maxlen=ANSWERS)
        self._findings: dict[str, DiagnosticStatus] = {}

    def on_message(self, message: Any) -> None:
        """Update the page with a message."""
        if isinstance(message, Scheduler):
            self._scheduler, self._received_at = message, self._clock()
        elif isinstance(message, Latency):
            self._answers.append(message)
        elif isinstance(message, DiagnosticArray):
            for status in message.status:
                node, _, name = status.name.partition(': ')
                if '/' + node == self._node:
                    self._findings[name] = status

    def page(self) -> Panel:
        """Return the page."""
        parts: list[Any] = [self._health()]
        if self._scheduler is not None:
            parts += [self._work(self._scheduler), self._learning(self._scheduler)]
        parts.append(self._latest())
        return Panel(Group(*parts), title=self._title(), subtitle='Ctrl-C ends')

    def _title(self) -> str:
        if self._scheduler is None:
            return f'{self._node}: waiting for the node'
        stale = self._clock() - self._received_at > STALE_S
        return f'{self._node}: adapter version {self._scheduler.live_version}' + (
            '; no messages from the node' if stale else '')

    def _health(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, status in self._findings.items():
            word, colour = LEVELS[status.level]
            table.add_row(Text(word, colour), name, status.message)
        return table

    def _work(self, now: Scheduler) -> Table:
        idle = max(0.0, 1.0 - now.busy_share)
        table = Table.grid(padding=(0, 2))
        for name, part, about in (
                ('serving', now.serving_share,
                 f'{number(now.decode_rate)} tokens/s decode, {number(now.prefill_rate)} prefill'),
                ('learning', now.learning_share,
                 f'{number(now.finetune_rate)} tokens/s, {counted(now.finetune_steps, "step")}'),
                ('idle', idle, f'iteration {number(now.measured_ms)} ms, predicted '
                               f'{number(now.predicted_ms)} ms'),
                ('KV cache', now.kv_use, counted(now.queue_depth, 'query waits', 'queries wait')
                 + f', {now.prefilling} in prefill, {now.decode_rows} in decode'),
                ('in time', now.slo_attainment,
                 f'of {counted(now.requests, "answer")}; p95 TTFT {number(now.ttft_p95_ms)} ms, '
                 f'TPOT {number(now.tpot_p95_ms)} ms; {now.rejected} rejected')):
            known = 0.0 if math.isnan(part) else part
            table.add_row(name, ProgressBar(1.0, known, width=20), share(part).rjust(5), about)
        return table

    def _learning(self, now: Scheduler) -> Text:
        if now.learning_frozen:
            text = 'learning is frozen; ' + counted(
                now.corrections_waiting, 'correction is', 'corrections are') + ' kept for later'
        elif now.corrections_waiting:
            text = (counted(now.corrections_waiting, 'correction waits', 'corrections wait')
                    + f', the oldest for {number(now.freshness_s)} s')
        else:
            text = 'no corrections wait'
        profiles = counted(now.profiles, 'profile has', 'profiles have')
        return Text(f'{text}; {profiles} versions of their own\n'
                    f'{DRIFTS.get(now.drift, "?")} (mean surprise {share(now.drift_level)}); '
                    f'learning budget {share(now.finetune_budget)} of device time')

    def _latest(self) -> Table:
        table = Table('answer', 'end', 'TTFT ms', 'TPOT ms', 'tokens', 'version', 'in time',
                      expand=True)
        for answer in reversed(self._answers):
            table.add_row(
                answer.query_id[:12], REASONS.get(answer.finish_reason, '?'),
                number(answer.ttft_ms), number(answer.tpot_ms), f'{answer.output_tokens}',
                f'{answer.adapter_version}', 'yes' if answer.slo_met else 'no')
        return table


def number(value: float) -> str:
    """Return a number without decimals, `-` if unknown."""
    return '-' if math.isnan(value) else f'{value:.0f}'


def share(value: float) -> str:
    """Return a share in percent, `-` if unknown."""
    return '-' if math.isnan(value) else f'{value:.0%}'
