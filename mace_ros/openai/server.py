# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Serve OpenAI's API over HTTP, for programs without ROS."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
import signal
import socket
import sys

from mace_ros.cli.common import parse, parser, run
from mace_ros.ros.client import MaceClient

# The extra mace-ros[openai], as a shell takes it.
LIBRARIES = '"starlette>=0.37" "uvicorn>=0.30" "pydantic>=2.7" "prometheus-client>=0.14"'
MAX_TIMEOUT_S = 1e6     # of a socket
SEND_BUFFER = 2**18     # bytes of a reply in the kernel that the client has not read
SHUTDOWN_S = 2      # for running answers, after which they are cancelled
# Thread switch interval between ROS and HTTP, in seconds. Python's default of 5 ms is as long as
# everything HTTP adds to TTFT.
SWITCH_INTERVAL_S = 0.0005


def serve(given: argparse.Namespace, client: MaceClient) -> int:
    """Serve until a signal; return the exit code."""
    try:
        import uvicorn

        from mace_ros.openai.app import build_app
        from mace_ros.openai.limits import Limits
    except ImportError as error:
        print(f'{error.name} is missing or too old: pip install {LIBRARIES}', file=sys.stderr)
        return 2
    try:
        listener = listen(given.host, given.port, given.timeout)
    except OSError as error:
        print(f'--host {given.host} --port {given.port}: {error}', file=sys.stderr)
        return 2
    app = build_app(
        client, model_name=given.model_name or client.name.strip('/'), timeout_s=given.timeout,
        limits=Limits(given.key or '', given.max_body_bytes, given.max_concurrent,
                      min(Limits.body_timeout_s, given.timeout)))
    # The stack that is tested and measured, whichever others are installed.
    server = uvicorn.Server(uvicorn.Config(
        app, http='h11', loop='asyncio', ws='none', log_level='warning', access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_S))
    host = f'[{given.host}]' if ':' in given.host else given.host
    print(f'{client.name} is served on http://{host}:{listener.getsockname()[1]}/v1',
          file=sys.stderr, flush=True)
    # After its clean-up, uvicorn raises the signal again: end as a program that has done its work.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    return 0


def listen(host: str, port: int, unread_s: float) -> socket.socket:
    """
    Return a listening socket; raises ``OSError``.

    Its connections end once a client has read nothing of what waits for it for ``unread_s``.
    """
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=512)
    # Connections inherit these options. asyncio sets TCP_NODELAY only on sockets that name their
    # protocol; without it the second part of a reply waits 40 ms for the client's delayed
    # acknowledgement. The kernel ends a connection whose client does not read, whatever waits for
    # it in asyncio; uvicorn then reports a client that has disconnected.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT,
                        int(min(max(unread_s, 1.0), MAX_TIMEOUT_S) * 1e3))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    return listener


def number(low: int, high: int = 2**62) -> Callable[[str], int]:
    """Return the type of an argument between ``low`` and ``high``."""
    def parsed(text: str) -> int:
        value = int(text) if text.isdecimal() else -1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f'{text!r} is not a number from {low}'
                + (f' to {high}' if high < 2**62 else ''))
        return value

    return parsed


def key_in(file: str) -> str:
    """Return the key in a file; raises ``argparse.ArgumentTypeError``."""
    try:
        key = Path(file).read_text('utf-8').partition('\n')[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f'{file}: {error}') from error
    if not key:
        raise argparse.ArgumentTypeError(f'{file}: the first line is empty')
    return key


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    made = parser('mace_openai', __doc__, timeout_help=(
        "seconds to wait for the node's next message, and for a client that does not read its "
        'reply'))
    made.add_argument('--host', default='127.0.0.1', metavar='ADDRESS',
                      help='address to listen on (default: 127.0.0.1, this machine only)')
    made.add_argument('--port', type=number(0, 65535), default=8000, metavar='N',
                      help='port to listen on; 0 chooses a free one (default: 8000)')
    made.add_argument('--api-key-file', type=key_in, metavar='FILE', dest='key',
                      help='file whose first line is the key that requests must have')
    made.add_argument('--model-name', default='', metavar='NAME',
                      help='name of the model (default: that of the node, such as mace)')
    made.add_argument('--max-concurrent', type=number(1), default=64, metavar='N',
                      help='completions that run at once, beside as many other requests; those '
                           'beyond get 429 (default: 64)')
    made.add_argument('--max-body-bytes', type=number(1), default=2**20, metavar='N',
                      help='maximum size of a request (default: 1048576)')
    return made


def main() -> int:
    """Run the program; return the exit code."""
    given = parse(arguments())
    return run(lambda client: serve(given, client), given.node)


if __name__ == '__main__':
    sys.exit(main())
