# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Send the right answer, a hint or a thumbs-down, and wait until the robot has learned it."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
import sys
from typing import Any

from mace_ros.api.settings import SCOPES
from mace_ros.api.validation import MAX_WEIGHT
from mace_ros.cli.common import parse, parser, run, STATES, wait_until_ready
from mace_ros.msg import CorrectionStatus
from mace_ros.ros.client import CorrectionHandle, MaceClient

# Within this time after PROPOSED, a node that learns proposals by itself says ACCEPTED.
ACCEPTED_WITHIN_S = 1.0


def correct(corrected: str, fields: dict[str, Any], timeout_s: float, wait: bool,
            client: MaceClient) -> int:
    """Send a correction, and print each of its states."""
    wait_until_ready(client, timeout_s)
    handle = client.correct(corrected, **fields)
    try:
        for status in handle.follow(timeout_s):
            print(f'{STATES[status.state]} {status.reason or status.corrected}'.rstrip(),
                  flush=True)
            if status.state == CorrectionStatus.LEARNED:
                print(f'adapter version {status.adapter_version}')
            if status.state in (CorrectionStatus.REJECTED, CorrectionStatus.FAILED):
                return 1
            if status.state == CorrectionStatus.ACCEPTED and not wait:
                break
            if status.state == CorrectionStatus.PROPOSED and is_latest(handle, status):
                print(f'to confirm: mace_correct --correction-id {handle.id} ' + (
                    f'"{status.corrected}"'), file=sys.stderr)
                break
    except (KeyboardInterrupt, TimeoutError):
        if handle.status is not None:
            print('the robot keeps an ACCEPTED correction, and learns it without this program',
                  file=sys.stderr)
        raise
    return 0


def is_latest(handle: CorrectionHandle, status: CorrectionStatus) -> bool:
    """Return whether no other status follows this one soon."""
    if handle.status is status:
        with suppress(TimeoutError):
            handle.wait_for_more(len(handle.statuses), ACCEPTED_WITHIN_S)
    return handle.status is status


def weight(text: str) -> float:
    """Return the weight of a correction."""
    value = float(text)
    if not 0.0 < value <= MAX_WEIGHT:
        raise ValueError(text)
    return value


def main() -> int:
    """Run the program; return the exit code."""
    arguments = parser('mace_correct', __doc__, timeout_s=600.0)
    arguments.add_argument('corrected', nargs='?',
                           help='the right answer; none for a hint or a thumbs-down')
    arguments.add_argument('--hint', default='', metavar='TEXT',
                           help='how to answer: the robot proposes an answer that follows it')
    which = arguments.add_mutually_exclusive_group(required=True)
    which.add_argument('--id', default='', help='id of the query whose answer was wrong')
    which.add_argument('--conversation', default='', metavar='ID',
                       help='conversation whose last answer was wrong')
    which.add_argument('--prompt', default='', metavar='TEXT', help='the prompt itself')
    which.add_argument('--correction-id', default='', metavar='ID',
                       help='PROPOSED correction to confirm, with this or another text')
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
    # Such as that of an unset variable of a shell, which does not mean a thumbs-down.
    if given.corrected is not None and not given.corrected.strip():
        arguments.error('the corrected text is empty (for a hint or a thumbs-down, leave it out)')
    fields = {'query_id': given.id, 'conversation_id': given.conversation,
              'prompt': given.prompt, 'profile': given.profile, 'rejected': given.rejected,
              'weight': given.weight, 'source': given.source, 'scope': given.scope,
              'hint': given.hint, 'correction_id': given.correction_id}
    return run(partial(correct, given.corrected or '', fields, given.timeout, not given.no_wait),
               given.node)


if __name__ == '__main__':
    sys.exit(main())
