# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Ask the robot, and print the answer as it arrives."""

from __future__ import annotations

from functools import partial
import sys
from typing import Any

from mace_ros.api.wording import counted
from mace_ros.cli.common import length, parse, parser, print_stream, run, wait_until_ready
from mace_ros.msg import Response
from mace_ros.ros.client import MaceClient


def ask(text: str, fields: dict[str, Any], timeout_s: float, client: MaceClient) -> int:
    """Ask; print the answer to stdout, and its numbers or an error to stderr."""
    wait_until_ready(client, timeout_s)
    answer = client.ask(text, **fields)
    print_stream(answer, timeout_s)
    response = answer.result(timeout_s)
    if response.finish_reason not in (Response.STOP, Response.LENGTH):
        print(f'no answer: {response.error or "cancelled"}', file=sys.stderr)
        return 1
    learned = (f'correction {response.matched_correction_id}, '
               if response.matched_correction_id else '')
    profile = f' of {response.adapter_profile}' if response.adapter_profile else ''
    print(f'query {response.query_id}: adapter version {response.adapter_version}{profile} '
          f'({learned}similarity {response.similarity:.2f}), '
          f'first token after {response.ttft_ms:.0f} ms, '
          f'{counted(response.output_tokens, "token")} at {response.tpot_ms:.0f} ms each',
          file=sys.stderr)
    return 0


def main() -> int:
    """Run the program; return the exit code."""
    arguments = parser('mace_ask', __doc__)
    arguments.add_argument('text', help='the question')
    arguments.add_argument('--id', default='', help='id of the query, for corrections')
    arguments.add_argument('--conversation', default='', metavar='ID',
                           help='conversation whose earlier turns are the context')
    arguments.add_argument('--profile', default='', help='profile whose adapter answers')
    arguments.add_argument('--system', default='', metavar='PROMPT', help='system prompt')
    arguments.add_argument('--max-tokens', type=length, default=-1, metavar='N',
                           help='maximum length of the answer (default: the parameter '
                           'generation.max_tokens)')
    arguments.add_argument('--no-learn', action='store_true',
                           help='never train on this answer')
    given = parse(arguments)
    fields = {'query_id': given.id, 'conversation_id': given.conversation,
              'profile': given.profile, 'system': given.system, 'max_tokens': given.max_tokens,
              'no_learn': given.no_learn}
    return run(partial(ask, given.text, fields, given.timeout), given.node)


if __name__ == '__main__':
    sys.exit(main())
