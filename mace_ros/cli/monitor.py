# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Watch a node: how it answers, what it learns, and whether it is well."""

from __future__ import annotations

from functools import partial
from queue import Empty, Queue
import sys
import time
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray

from mace_ros.cli.common import parser, run
from mace_ros.cli.dashboard import Dashboard, heading, line
from mace_ros.msg import Latency, Scheduler
from mace_ros.ros.client import MaceClient

HEADING_EVERY = 20      # lines


class Watch:
    """The messages of one node, in the order in which they come."""

    def __init__(self, client: MaceClient, node: str) -> None:
        """``node`` is its full name."""
        self._messages: Queue[Any] = Queue()
        for kind, topic in ((Scheduler, f'{node}/scheduler'), (Latency, f'{node}/latency'),
                            (DiagnosticArray, '/diagnostics')):
            client.node.create_subscription(kind, topic, self._messages.put, 100)

    def next(self, timeout_s: float) -> Any | None:
        """Return the next message, or None after so long without one."""
        try:
            return self._messages.get(timeout=timeout_s)
        except Empty:
            return None


def print_lines(watch: Watch, count: int, period_s: float, timeout_s: float) -> int:
    """Print so many lines of numbers, one in each period; 0 for no end."""
    printed, due, heard = 0, 0.0, time.monotonic()
    while not count or printed < count:
        message, now = watch.next(0.5), time.monotonic()
        if isinstance(message, Scheduler):
            heard = now
            if now >= due:
                if printed % HEADING_EVERY == 0:
                    print(heading())
                print(line(message), flush=True)
                printed, due = printed + 1, now + period_s
        elif now - heard > timeout_s:
            raise TimeoutError(f'no ~/scheduler message for {timeout_s:g} s')
    return 0


def show_dashboard(watch: Watch, node: str) -> int:
    """Keep one page up to date, until Ctrl-C; a node that is not there is waited for."""
    from rich.live import Live
    dashboard = Dashboard(node)
    with Live(get_renderable=dashboard.page, screen=True, refresh_per_second=4):
        while True:
            message = watch.next(0.5)
            if message is not None:
                dashboard.hear(message)


def monitor(plain: bool, count: int, period_s: float, timeout_s: float, node: str,
            client: MaceClient) -> int:
    """Watch the node in the one form or the other; Ctrl-C is how that ends well."""
    node = '/' + node.strip('/')
    watch = Watch(client, node)
    try:
        return (print_lines(watch, count, period_s, timeout_s) if plain
                else show_dashboard(watch, node))
    except KeyboardInterrupt:
        return 0


def main() -> int:
    """Run the program; return the exit code."""
    arguments = parser('mace_monitor', __doc__)
    arguments.description = (
        f'{__doc__} A page that is kept up to date, or a line of numbers for each message with '
        '--lines, --count, --period or where there is no terminal. TTFT and TPOT are 95th '
        'percentiles in ms, SLO the share of answers in time, all over monitor.window_s; ms is '
        'the latest iteration; wait and age are of corrections; a version with * says that '
        'learning is frozen.')
    arguments.add_argument('--lines', action='store_true', help='lines of numbers, for logs')
    arguments.add_argument('--count', type=int, default=0, metavar='N',
                           help='lines to print (default: no end)')
    arguments.add_argument('--period', type=float, default=0.0, metavar='SECONDS',
                           help='time between lines (default: monitor.rate_hz says)')
    given = arguments.parse_args()
    plain = bool(given.lines or given.count or given.period or not sys.stdout.isatty())
    return run(partial(monitor, plain, given.count, given.period, given.timeout, given.node),
               given.node)


if __name__ == '__main__':
    sys.exit(main())
