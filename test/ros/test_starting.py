# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A node that can't start, or is to end before it has started, says so."""

from __future__ import annotations

from pathlib import Path
import signal
import time

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from mace_ros.msg import Response
import pytest
from support.graph import ENVIRONMENT, wait_until
from support.mace import Mace, START_S
from support.ros_graph import NodeProcess

from mace_ros.ros.client import MaceClient


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let clients see the nodes."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def fatal_line(node: NodeProcess) -> str:
    """Wait for the end of a node that can't start; return the only FATAL line of its log."""
    try:
        assert node.wait(120.0) == 1
    finally:
        node.kill()
    assert 'Traceback' not in node.log
    [line] = [line for line in node.log.splitlines() if 'FATAL' in line]
    return line


def test_an_invalid_parameter_ends_the_start_with_a_clear_line(tmp_path: Path) -> None:
    node = NodeProcess(tmp_path, **{'model.device': 'tpu'})
    node.start()
    assert 'is not one of auto, cpu, cuda' in fatal_line(node)


def test_a_failed_start_is_in_the_log_and_in_the_diagnostics(tmp_path: Path) -> None:
    """Diagnostics come before the end, since launch starts the node again and again."""
    node = NodeProcess(tmp_path, namespace='/broken', **{'model.source': '/no/such/folder'})
    with MaceClient('/broken/mace') as client:
        arrays: list[DiagnosticArray] = []
        client.node.create_subscription(DiagnosticArray, '/diagnostics', arrays.append, 100)
        node.start()
        assert "model.source: '/no/such/folder' is neither a folder" in fatal_line(node)

        def errors() -> list[str]:
            return [s.message for array in list(arrays) for s in array.status
                    if s.level == DiagnosticStatus.ERROR and s.name.startswith('broken/mace')]

        assert wait_until(
            lambda: any('/no/such/folder' in message for message in errors()), 30.0), arrays


def test_a_signal_ends_the_load(tmp_path: Path) -> None:
    # The node as shipped, whose calibration leaves time for the signal on any machine.
    loading = Mace(NodeProcess(tmp_path, namespace='/loading', module='mace_ros.ros.node',
                               **{'scheduler.max_queue': 1}))
    started = time.monotonic()
    loading.ask_early()
    start_s = time.monotonic() - started
    try:
        # One query may wait: the refusal of a second one shows that responses arrive.
        assert wait_until(lambda: loading.refuses_another(), START_S), loading.node.log
        assert loading.client.version() is None
        loading.node.send(signal.SIGINT)
        # Launch would send a SIGTERM after five seconds. A machine that needs longer for the first
        # part of a start may need it for the end.
        assert loading.node.wait(max(5.0, start_s)) == 0
        response = loading.early.result(30.0)
        assert response.finish_reason == Response.REJECTED
        assert response.error_code == Response.NOT_SERVING
    finally:
        loading.kill()
