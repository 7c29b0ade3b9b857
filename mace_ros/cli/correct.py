# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Send the right answer, and wait until the robot has learned it."""

from __future__ import annotations

from functools import partial
import sys
from typing import Any

from mace_ros.api.settings import SCOPES
from mace_ros.api.validation import MAX_WEIGHT
from mace_ros.cli.common import parse, parser, run, STATES
from mace_ros.msg import CorrectionStatus
from mace_ros.ros.client import MaceClient


def correct(corrected: str, fields: dict[str, Any], timeout_s: float, wait: bool,
            client: MaceClient) -> int:
    """Send a correction, and print each of its states."""
    client.wait_until_ready(timeout_s)
    handle = client.correct(corrected, **fields)
    try:
        for status in handle.follow(timeout_s):
            print(f'{STATES[status.state]} {status.reason}'.rstrip(), flush=True)
            if status.state == CorrectionStatus.LEARNED:
                print(f'adapter version {status.adapter_version}')
            if status.state in (CorrectionStatus.REJECTED, CorrectionStatus.FAILED):
                return 1
            if status.state == CorrectionStatus.ACCEPTED and not wait:
                break
    except (KeyboardInterrupt, TimeoutError):
        if handle.status is not None:
            print('an ACCEPTED correction is kept, and learned without waiting', file=sys.stderr)
        raise
    return 0


def weight(text: str) -> float:
    """Return the weight of a correction."""
    value = float(text)
    if not 0.0 < value <= MAX_WEIGHT:
        raise ValueError(text)
    return value


def main() -> int:
    """Run the program; return the exit code."""
    arguments = parser('mace_correct', __doc__, timeout_s=600.0)
    arguments.add_argument('corrected', help='the right answer')
    which = arguments.add_mutually_exclusive_group(required=True)
    which.add_argument('--id', default='', help='id of the query whose answer was wrong')
    which.add_argument('--conversation', default='', metavar='ID',
                       help='conversation whose last answer was wrong')
    which.add_argument('--prompt', default='', metavar='TEXT', help='the prompt itself')
    arguments.add_argument('--profile', default='', help='profile whose adapter learns')
    arguments.add_argument('--rejected', default='', metavar='TEXT',
                           help='the wrong answer (default: the recorded one)')
    arguments.add_argument('--weight', type=weight, default=1.0,
                           help=f'importance, above 0 and up to {MAX_WEIGHT:g} (default: 1)')
    arguments.add_argument('--scope', choices=SCOPES, default='',
                           help='questions that it is for: similar ones, or every one (default: '
                           'the parameter adapter.scope)')
    arguments.add_argument('--source', default='mace_correct', help='origin of the correction')
    arguments.add_argument('--no-wait', action='store_true',
                           help='return once the correction is on disk')
    given = parse(arguments)
    fields = {'query_id': given.id, 'conversation_id': given.conversation,
              'prompt': given.prompt, 'profile': given.profile, 'rejected': given.rejected,
              'weight': given.weight, 'source': given.source, 'scope': given.scope}
    return run(partial(correct, given.corrected, fields, given.timeout, not given.no_wait),
               given.node)


if __name__ == '__main__':
    sys.exit(main())
