# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Monitor a node: serving, learning and health."""

from __future__ import annotations

from functools import partial
from queue import Empty, Queue
import sys
import time
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray

from mace_ros.cli.common import parse, parser, run
from mace_ros.cli.dashboard import Dashboard, heading, line
from mace_ros.msg import Latency, Scheduler
from mace_ros.ros.client import MaceClient

HEADING_EVERY = 20      # lines


class Messages:
    """The monitoring messages of one node, in their order of arrival."""

    def __init__(self, client: MaceClient) -> None:
        """Subscribe to the topics of the client's node."""
        self._queue: Queue[Any] = Queue()
        for kind, topic in ((Scheduler, f'{client.name}/scheduler'),
                            (Latency, f'{client.name}/latency'),
                            (DiagnosticArray, '/diagnostics')):
            client.node.create_subscription(kind, topic, self._queue.put, 100)

    def next(self, timeout_s: float) -> Any | None:
        """Return the next message, None if there is none within ``timeout_s``."""
        try:
            return self._queue.get(timeout=timeout_s)
        except Empty:
            return None


def print_lines(messages: Messages, count: int, period_s: float, timeout_s: float) -> int:
    """Print ``count`` lines of numbers, 0 without end, at most one per period."""
    printed, due, received_at = 0, 0.0, time.monotonic()
    while not count or printed < count:
        message, now = messages.next(0.5), time.monotonic()
        if isinstance(message, Scheduler):
            received_at = now
            if now >= due:
                if printed % HEADING_EVERY == 0:
                    print(heading())
                print(line(message), flush=True)
                printed, due = printed + 1, now + period_s
        elif now - received_at > timeout_s:
            raise TimeoutError(f'no ~/scheduler message for {timeout_s:g} s')
    return 0


def show_dashboard(messages: Messages, node: str) -> int:
    """Show the page until Ctrl-C, waiting for the node if necessary."""
    from rich.live import Live
    dashboard = Dashboard(node)
    with Live(get_renderable=dashboard.page, screen=True, refresh_per_second=4):
        while True:
            message = messages.next(0.5)
            if message is not None:
                dashboard.on_message(message)


def monitor(plain: bool, count: int, period_s: float, timeout_s: float,
            client: MaceClient) -> int:
    """Show lines or the page; Ctrl-C ends the program with exit code 0."""
    messages = Messages(client)
    try:
        return (print_lines(messages, count, period_s, timeout_s) if plain
                else show_dashboard(messages, client.name))
    except KeyboardInterrupt:
        return 0


def main() -> int:
    """Run the program; return the exit code."""
    arguments = parser('mace_monitor', __doc__)
    arguments.description = (
        f'{__doc__} Shows a live page, or prints a line of numbers per message with --lines, '
        '--count, --period or without a terminal. TTFT and TPOT are 95th percentiles in ms, SLO '
        'is the share of answers in time, all over monitor.window_s; ms is the latest iteration; '
        'wait and age are number and age of waiting corrections; * after the version means that '
        'learning is frozen.')
    arguments.add_argument('--lines', action='store_true', help='print lines of numbers, for logs')
    arguments.add_argument('--count', type=int, default=0, metavar='N',
                           help='number of lines to print (default: unlimited)')
    arguments.add_argument('--period', type=float, default=0.0, metavar='SECONDS',
                           help='time between lines (default: that of monitor.rate_hz)')
    given = parse(arguments)
    plain = bool(given.lines or given.count or given.period or not sys.stdout.isatty())
    return run(partial(monitor, plain, given.count, given.period, given.timeout), given.node)


if __name__ == '__main__':
    sys.exit(main())
