# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""ROS domains of tests, and the view of the graph in one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, ExitStack
from fcntl import flock, LOCK_EX, LOCK_NB
from itertools import count
import os
from pathlib import Path
from tempfile import gettempdir
import time

from rclpy.context import Context
from rclpy.node import Node

DOMAINS = 100       # domains 1 to 100, whose ports are free on Linux

ENVIRONMENT = {'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST', 'ROS_DOMAIN_ID': ''}
_files = count()
_claim = ExitStack()        # keeps the locked file of the domain in use open


def use_another_domain() -> None:
    """Change to a domain that no robot is likely to use, and no other test process here uses."""
    processes = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
    process = int(os.environ.get('PYTEST_XDIST_WORKER', 'gw0').removeprefix('gw'))
    run = os.getpid() if processes == 1 else os.getppid()
    each = DOMAINS // processes
    for _ in range(each):
        domain = 1 + (run + process * each + next(_files) % each) % DOMAINS
        if _claimed(domain):
            break
    ENVIRONMENT['ROS_DOMAIN_ID'] = str(domain)


def _claimed(domain: int) -> bool:
    """Return whether no other process has the domain; then this one has it until the next file."""
    _claim.close()
    try:
        file = (Path(gettempdir()) / f'mace_ros_tests_domain_{domain}').open('w')
        flock(_claim.enter_context(file), LOCK_EX | LOCK_NB)
    except OSError:
        return False
    return True


def domain_id() -> int:
    """Return the domain of processes started with ENVIRONMENT."""
    return int(ENVIRONMENT['ROS_DOMAIN_ID'])


@contextmanager
def observer() -> Iterator[Node]:
    """Yield a node in the domain of processes started with ENVIRONMENT."""
    context = Context()
    context.init(domain_id=domain_id())
    node = Node('observer', context=context, enable_rosout=False)
    try:
        yield node
    finally:
        node.destroy_node()
        context.try_shutdown()


def wait_until(condition: Callable[[], object], timeout_s: float) -> bool:
    """Return whether the condition came true within ``timeout_s``."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
