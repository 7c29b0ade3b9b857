# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Watch a node: a line of numbers for each ~/scheduler message."""

from __future__ import annotations

from functools import partial
import math
from queue import Empty, Queue
import sys

from mace_ros.msg import Scheduler
from mace_ros.programs.common import parser, run
from mace_ros.ros.client import MaceClient

# Heading, width, and how the number is shown.
COLUMNS = (
    ('queue', 5, lambda m: f'{m.queue_depth}'),
    ('rows', 4, lambda m: f'{m.decode_rows + m.prefilling}'),
    ('tok/s', 6, lambda m: _number(m.decode_rate)),
    ('busy', 5, lambda m: _share(m.busy_share)),
    ('learn', 5, lambda m: _share(m.learning_share)),
    ('KV', 5, lambda m: _share(m.kv_use)),
    ('ms', 6, lambda m: _number(m.measured_ms)),
    ('TTFT', 6, lambda m: _number(m.ttft_p95_ms)),
    ('TPOT', 6, lambda m: _number(m.tpot_p95_ms)),
    ('SLO', 5, lambda m: _share(m.slo_attainment)),
    ('wait', 4, lambda m: f'{m.corrections_waiting}'),
    ('age', 6, lambda m: _number(m.freshness_s)),
    ('version', 7, lambda m: f'{m.live_version}' + ('*' if m.learning_frozen else '')),
)
HEADING_EVERY = 20


def line(message: Scheduler) -> str:
    """Return a line of the table."""
    return ' '.join(show(message).rjust(width) for _, width, show in COLUMNS)


def heading() -> str:
    """Return the line above."""
    return ' '.join(name.rjust(width) for name, width, _ in COLUMNS)


def monitor(count: int, timeout_s: float, node: str, client: MaceClient) -> int:
    """Print so many lines; 0 for no end."""
    messages: Queue[Scheduler] = Queue()
    client.node.create_subscription(Scheduler, f'{node}/scheduler', messages.put, 10)
    printed = 0
    while not count or printed < count:
        try:
            message = messages.get(timeout=timeout_s)
        except Empty:
            raise TimeoutError(f'no ~/scheduler message for {timeout_s:g} s') from None
        if printed % HEADING_EVERY == 0:
            print(heading())
        print(line(message), flush=True)
        printed += 1
    return 0


def _number(value: float) -> str:
    return '-' if math.isnan(value) else f'{value:.0f}'


def _share(value: float) -> str:
    return '-' if math.isnan(value) else f'{value:.0%}'


def main() -> int:
    """Run the program; return the exit code."""
    arguments = parser('mace_monitor', __doc__)
    arguments.description = (
        f'{__doc__} TTFT, TPOT (95th percentiles, ms) and SLO attainment are those of '
        'monitor.window_s; ms is the latest iteration; wait and age are of corrections; a '
        'version with * says that learning is frozen.')
    arguments.add_argument('--count', type=int, default=0, help='lines to print (default: no end)')
    given = arguments.parse_args()
    return run(partial(monitor, given.count, given.timeout, given.node), given.node)


if __name__ == '__main__':
    sys.exit(main())
