# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Arguments, exit codes and output shared by the programs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
import sys
import threading

from rclpy.exceptions import NameValidationException
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.utilities import remove_ros_args

from mace_ros.msg import CorrectionStatus
from mace_ros.ros.client import AnswerHandle, MaceClient

EPILOG = (
    'ROS arguments, as --ros-args -r __ns:=/robot1, apply to the ROS node of the program. '
    'exit codes: 0 done, 1 refused or no answer, 2 bad arguments or no security, '
    '130 after Ctrl-C')

NOTICE_S = 2.0      # a program that waits for longer says for what

STATES = {getattr(CorrectionStatus, name): name for name in (
    'ACCEPTED', 'TRAINING', 'LEARNED', 'SUPERSEDED', 'REJECTED', 'FAILED', 'PROPOSED',
    'RECORDED')}


def parser(name: str, description: str, *, timeout_s: float = 60.0,
           timeout_help: str = 'how long to wait for a message') -> argparse.ArgumentParser:
    """Return a parser with the arguments of every program; ``timeout_s`` is a default."""
    made = argparse.ArgumentParser(prog=name, description=description, epilog=EPILOG)
    made.add_argument('--node', default='mace', metavar='NAME',
                      help='name of the node: full, such as /robot1/mace, or relative to the '
                           'namespace that --ros-args -r __ns:=... sets (default: mace)')
    made.add_argument('--timeout', type=seconds, default=timeout_s, metavar='SECONDS',
                      help=f'{timeout_help} (default: {timeout_s:g})')
    return made


def seconds(text: str) -> float:
    """Return a waiting time; ``inf`` becomes the longest time that Python supports."""
    value = float(text)
    if not value >= 0.0:
        raise ValueError(text)
    return min(value, threading.TIMEOUT_MAX)


def length(text: str) -> int:
    """Return the length of an answer in tokens."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def parse(arguments: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the arguments of the command line that are not ROS's; :func:`run` uses those."""
    try:
        own = remove_ros_args(sys.argv)[1:]
    except RuntimeError as error:
        arguments.error(str(error))
    return arguments.parse_args(own)


def run(program: Callable[[MaceClient], int], node: str) -> int:
    """Run a program with a client; return its exit code, after printing an error if any."""
    try:
        with MaceClient(node, ros_args=sys.argv) as client:
            node = client.name
            return program(client)
    except NameValidationException as error:
        print(f'--node {node}: {error}', file=sys.stderr)
        return 2
    except (rclpy_implementation.RCLError, rclpy_implementation.UnknownROSArgsError) as error:
        # Security that is unavailable, or ROS arguments that are wrong.
        print(f'{type(error).__name__}: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:    # as with `| head`
        sys.stderr.close()
        return 0
    except (TimeoutError, ConnectionError) as error:
        print(f'{node}: {error}', file=sys.stderr)
        return 1


def wait_until_ready(client: MaceClient, timeout_s: float) -> None:
    """Wait until the node serves, and say so if that takes a while; raises TimeoutError."""
    notice = threading.Timer(NOTICE_S, print, [f'waiting until {client.name} is ready'],
                             {'file': sys.stderr, 'flush': True})
    notice.daemon = True
    notice.start()
    try:
        client.wait_until_ready(timeout_s)
    finally:
        notice.cancel()


@contextmanager
def cancelled_on_leaving(answer: AnswerHandle, timeout_s: float) -> Iterator[None]:
    """Cancel an answer that is abandoned, and wait until the node has ended it."""
    try:
        yield
    except (KeyboardInterrupt, TimeoutError, BrokenPipeError):
        answer.cancel()
        with suppress(ConnectionError):    # the node has ended
            answer.result(timeout_s)
        raise


def print_stream(answer: AnswerHandle, timeout_s: float) -> None:
    """Print an answer to stdout as it arrives."""
    with cancelled_on_leaving(answer, timeout_s):
        for text in answer.stream(timeout_s):
            print(text, end='', flush=True)
        print(flush=True)
