# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Say what the robot should have answered, and wait until it has learned it."""

from __future__ import annotations

from functools import partial
import sys
from typing import Any

from mace_ros.api.validation import MAX_WEIGHT
from mace_ros.cli.common import parser, run, STATES
from mace_ros.msg import CorrectionStatus
from mace_ros.ros.client import MaceClient


def correct(corrected: str, fields: dict[str, Any], timeout_s: float, wait: bool,
            client: MaceClient) -> int:
    """Correct, and print each state that the correction comes to."""
    client.wait_until_ready(timeout_s)
    learning = client.correct(corrected, **fields)
    try:
        for status in learning.follow(timeout_s):
            print(f'{STATES[status.state]} {status.reason}'.rstrip(), flush=True)
            if status.state == CorrectionStatus.LEARNED:
                print(f'adapter version {status.adapter_version}')
            if status.state in (CorrectionStatus.REJECTED, CorrectionStatus.FAILED):
                return 1
            if status.state == CorrectionStatus.ACCEPTED and not wait:
                break
    except (KeyboardInterrupt, TimeoutError):
        if learning.status is not None:
            print('what was ACCEPTED is kept, and learned without waiting', file=sys.stderr)
        raise
    return 0


def weight(text: str) -> float:
    """Return how important a correction is."""
    value = float(text)
    if not 0.0 < value <= MAX_WEIGHT:
        raise ValueError(text)
    return value


def main() -> int:
    """Run the program; return the exit code."""
    arguments = parser('mace_correct', __doc__, timeout_s=600.0)
    arguments.add_argument('corrected', help='the right answer')
    which = arguments.add_mutually_exclusive_group(required=True)
    which.add_argument('--id', default='', help='of the query whose answer was wrong')
    which.add_argument('--conversation', default='', metavar='ID',
                       help='whose last answer was wrong')
    which.add_argument('--prompt', default='', metavar='TEXT', help='the question itself')
    arguments.add_argument('--profile', default='', help='whose adapter learns')
    arguments.add_argument('--rejected', default='', metavar='TEXT',
                           help='the wrong answer (default: the recorded one)')
    arguments.add_argument('--weight', type=weight, default=1.0,
                           help=f'importance, above 0 and up to {MAX_WEIGHT:g} (default: 1)')
    arguments.add_argument('--source', default='mace_correct', help='who corrects')
    arguments.add_argument('--no-wait', action='store_true', help='return once it is on disk')
    given = arguments.parse_args()
    fields = {'query_id': given.id, 'conversation_id': given.conversation,
              'prompt': given.prompt, 'profile': given.profile, 'rejected': given.rejected,
              'weight': given.weight, 'source': given.source}
    return run(partial(correct, given.corrected, fields, given.timeout, not given.no_wait),
               given.node)


if __name__ == '__main__':
    sys.exit(main())
