# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What the programs have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
import sys

from mace_ros.ros.client import MaceClient


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments that every program has."""
    made = argparse.ArgumentParser(prog=name, description=description)
    made.add_argument('--node', default='/mace', help='full name of the node (default: /mace)')
    made.add_argument('--timeout', type=float, default=60.0, metavar='SECONDS',
                      help='longest silence of the node (default: 60)')
    return made


def run(program: Callable[[MaceClient], int], node: str) -> int:
    """Run a program with a client; return its exit code, or say why there is none."""
    try:
        with MaceClient(node) as client:
            return program(client)
    except TimeoutError as error:
        print(f'{node}: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
