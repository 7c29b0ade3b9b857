# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Nodes in other processes, for tests."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
import os
import time

from rclpy.context import Context
from rclpy.node import Node

DOMAINS = 100       # 1 to 100: their ports are free on Linux

ENVIRONMENT = {'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST', 'ROS_DOMAIN_ID': ''}
_files = count()


def use_another_domain() -> None:
    """Change to a domain that no robot, test run, or other process of this run is likely to use."""
    processes = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
    process = int(os.environ.get('PYTEST_XDIST_WORKER', 'gw0').removeprefix('gw'))
    run = os.getpid() if processes == 1 else os.getppid()
    each = DOMAINS // processes
    ENVIRONMENT['ROS_DOMAIN_ID'] = str(
        1 + (run + process * each + next(_files) % each) % DOMAINS)


def domain_id() -> int:
    """Return the domain of processes started with ENVIRONMENT."""
    return int(ENVIRONMENT['ROS_DOMAIN_ID'])


@contextmanager
def observer() -> Iterator[Node]:
    """Yield a node that sees those of processes started with ENVIRONMENT."""
    context = Context()
    context.init(domain_id=domain_id())
    node = Node('observer', context=context, enable_rosout=False)
    try:
        yield node
    finally:
        node.destroy_node()
        context.try_shutdown()


def wait_until(happened: Callable[[], bool], timeout_s: float) -> bool:
    """Return whether it happened within the given time."""
    end = time.monotonic() + timeout_s
    while not happened():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
