# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The node in a process of its own, and helpers to talk to it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
from typing import Any

from mace_ros.action import Generate
from mace_ros.msg import AdapterVersion, Cancel, Correction, Query, Response, ResponseChunk
from rcl_interfaces.srv import SetParameters
from rclpy.action import ActionClient
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from support.graph import ENVIRONMENT, wait_until
from support.precision import WEIGHT_DTYPE

from mace_ros.ros.client import LATCHED, MaceClient

ROOT = Path(__file__).resolve().parents[2]
ANSWER_S = 100.0
PATIENT = {'ttft_slo_ms': 6e5, 'tpot_slo_ms': 6e5}      # of answers that take any time
DISCOVERY_S = 30.0
SECONDS_PER_TICK = 1 / os.sysconf('SC_CLK_TCK')


class NodeProcess:
    """
    A node in a process that can be restarted on the same storage folder.

    By default it starts and learns sooner than the node as shipped, ``mace_ros.ros.node``.
    """

    def __init__(self, folder: Path, *, namespace: str = '', log_level: str = 'info',
                 module: str = 'support.hasty_node', **parameters: object) -> None:
        self.folder, self._module = folder, module
        self.name = f'{namespace}/mace'
        logger = f'{namespace}/mace'.strip('/').replace('/', '.')
        self._arguments = ['--log-level', f'{logger}:={log_level}']
        if namespace:
            self._arguments += ['-r', f'__ns:={namespace}']
        for name, value in {
                'storage.folder': folder / 'storage', 'model.weight_dtype': WEIGHT_DTYPE,
                **parameters}.items():
            self._arguments += ['-p', f'{name}:={value}']
        self._log = folder / 'node.log'
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        environment = {
            **os.environ, **ENVIRONMENT, 'HF_HUB_OFFLINE': '1',
            'ROS_LOG_DIR': str(self.folder / 'log'),
            'PYTHONPATH': os.pathsep.join(
                [str(ROOT / 'test'), *filter(None, [os.environ.get('PYTHONPATH')])])}
        with self._log.open('a') as log:
            self.process = subprocess.Popen(
                [sys.executable, '-m', self._module, '--ros-args', *self._arguments],
                cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)

    @property
    def log(self) -> str:
        """Everything the process has printed."""
        return self._log.read_text()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float) -> int:
        """Return the exit code."""
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def memory(self) -> int:
        """Return its resident memory in bytes."""
        pages = Path(f'/proc/{self.process.pid}/statm').read_text().split()[1]
        return int(pages) * os.sysconf('SC_PAGE_SIZE')

    def cpu_seconds(self) -> float:
        """CPU time of all its threads."""
        fields = Path(f'/proc/{self.process.pid}/stat').read_text().rpartition(')')[2].split()
        return (int(fields[11]) + int(fields[12])) * SECONDS_PER_TICK


def wait_until_known(client: MaceClient) -> None:
    """
    Return once the active node knows all subscriptions of the client's node.

    A subscription misses messages published before it is matched, and can't tell whether it is.
    But the middleware announces subscriptions in order: once a last one has received the
    latched version, the node knows the earlier ones as well.
    """
    received: list[AdapterVersion] = []
    last = client.node.create_subscription(
        AdapterVersion, '/mace/adapter_version', received.append, LATCHED)
    try:
        assert wait_until(lambda: received, DISCOVERY_S)
    finally:
        client.node.destroy_subscription(last)


class Recorder:
    """Records all messages of some topics, in the order in which they arrive."""

    def __init__(self, client: MaceClient, **topics: type) -> None:
        self.messages: list[Any] = []
        self._node = client.node
        self._subscriptions = [
            self._node.create_subscription(kind, f'/mace/{name}', self.messages.append, 1000)
            for name, kind in topics.items()]
        wait_until_known(client)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)

    def of(self, kind: type, **fields: object) -> list[Any]:
        """Return the messages of a type with these field values."""
        return [m for m in list(self.messages) if isinstance(m, kind)
                and all(getattr(m, name) == value for name, value in fields.items())]


def call(client: MaceClient, kind: type, name: str, /, *, timeout_s: float = DISCOVERY_S,
         **fields: object) -> Any:
    """Call a service with a request of these fields; return its response."""
    service = client.node.create_client(kind, name)
    try:
        assert service.wait_for_service(timeout_s), name
        return resolved(service.call_async(kind.Request(**fields)), timeout_s)
    finally:
        client.node.destroy_client(service)


def wait_until_it_replies(client: MaceClient, kind: type, name: str, timeout_s: float) -> None:
    """
    Return once a service that changes nothing replies to an empty request.

    A node that has just started may not know the client yet when it replies, so that the reply is
    lost: the request is sent again.
    """
    service = client.node.create_client(kind, name)
    try:
        assert service.wait_for_service(timeout_s), name
        replies: list[Any] = []

        def ask() -> bool:
            service.call_async(kind.Request()).add_done_callback(replies.append)
            return wait_until(lambda: replies, 5.0)

        assert wait_until(ask, timeout_s), name
    finally:
        client.node.destroy_client(service)


def set_parameters(client: MaceClient, values: dict[str, object], *,
                   node: str = '/mace') -> list[tuple[bool, str]]:
    """Set parameters through the node's service; return (successful, reason) of each."""
    response = call(client, SetParameters, f'{node}/set_parameters', parameters=[
        Parameter(name, value=value).to_parameter_msg() for name, value in values.items()])
    return [(r.successful, r.reason) for r in response.results]


def resolved(future: Any, timeout_s: float) -> Any:
    """Wait for a future of rclpy."""
    done: Future[Any] = Future()
    future.add_done_callback(lambda f: done.set_result(f.result()))
    return done.result(timeout_s)


class Inputs:
    """Publishers of the node's inputs, for messages that MaceClient would not send."""

    def __init__(self, client: MaceClient, node: str = '/mace') -> None:
        self._publishers = {
            kind: client.node.create_publisher(kind, f'{node}/{name}', 1000)
            for kind, name in ((Query, 'query'), (Correction, 'correction'), (Cancel, 'cancel'))}
        assert wait_until(lambda: all(
            p.get_subscription_count() for p in self._publishers.values()), DISCOVERY_S)

    def send(self, message: Query | Correction | Cancel) -> None:
        self._publishers[type(message)].publish(message)


class Generator:
    """A client of the action ``~/generate``."""

    def __init__(self, client: MaceClient) -> None:
        self._client = ActionClient(
            client.node, Generate, '/mace/generate',
            feedback_sub_qos_profile=QoSProfile(depth=1000))
        assert self._client.wait_for_server(DISCOVERY_S)
        wait_until_known(client)
        self.chunks: list[ResponseChunk] = []

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.destroy()

    def send(self, text: str, **fields: object) -> Any:
        """Return the goal's handle."""
        return resolved(self._client.send_goal_async(
            Generate.Goal(query=Query(text=text, **fields)),
            feedback_callback=lambda m: self.chunks.append(m.feedback.chunk)), ANSWER_S)

    def result(self, goal: Any) -> tuple[int, Response]:
        """
        Return the goal's status and the response.

        rclpy delivers no feedback afterwards: wait for the last chunk first.
        """
        reply = resolved(goal.get_result_async(), ANSWER_S)
        return reply.status, reply.result.response


def eventually(condition: Callable[[], Any], timeout_s: float) -> Any:
    """Wait until the condition returns something true; return that."""
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, f'condition not met within {timeout_s} s'
        time.sleep(0.01)
    return found
