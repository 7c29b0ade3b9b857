# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Nodes in other processes, for tests."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import os
import time

from rclpy.context import Context
from rclpy.node import Node

# Unlike that of a robot, or of another test run, on this machine.
DOMAIN_ID = 1 + os.getpid() % 100

ENVIRONMENT = {'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST', 'ROS_DOMAIN_ID': str(DOMAIN_ID)}


@contextmanager
def observer() -> Iterator[Node]:
    """Yield a node that sees those of processes started with ENVIRONMENT."""
    context = Context()
    context.init(domain_id=DOMAIN_ID)
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
