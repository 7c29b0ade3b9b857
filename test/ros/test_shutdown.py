# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A node ends within launch's five seconds in every state, and says what it waited for."""

from __future__ import annotations

from pathlib import Path
import re
import signal
import threading
import time

from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
import pytest
from rclpy.context import Context
from support.graph import ENVIRONMENT
from support.ros_graph import call, NodeProcess, wait_until_it_replies

from mace_ros.ros.client import MaceClient
from mace_ros.ros.node import MaceNode, SHUTDOWN_TIMEOUT_S
from mace_ros.ros.shutdown import SHORTEST_S, Shutdown

LAUNCH_S = 5.0      # from Ctrl-C to launch's SIGTERM
START_S = 60.0


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**ENVIRONMENT, 'ROS_LOG_DIR': str(tmp_path / 'log')}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize('transitions', [[], ['configure'], ['configure', 'activate']],
                         ids=['unconfigured', 'inactive', 'active'])
def test_a_signal_ends_the_process_in_every_state(
        tmp_path: Path, model_folder: Path, transitions: list[str]) -> None:
    node = NodeProcess(tmp_path, **{
        'lifecycle.autostart': 'false', 'model.source': model_folder, 'model.threads': 1,
        'model.weight_dtype': 'float32', 'memory.kv_cache_tokens': 8192})
    started = time.monotonic()
    node.start()
    try:
        with MaceClient() as client:
            wait_until_it_replies(client, GetState, '/mace/get_state', START_S)
            for label in transitions:
                assert call(client, ChangeState, '/mace/change_state', timeout_s=START_S,
                            transition=Transition(label=label)).success, node.log
            # A machine that needs longer than launch's time for a start may need it for the end.
            start_s = time.monotonic() - started
            if 'activate' in transitions:
                answer = client.ask('Sing.', max_tokens=4000, ttft_slo_ms=6e5, tpot_slo_ms=6e5)
                next(answer.stream(START_S))
            node.send(signal.SIGINT)
            assert node.wait(max(LAUNCH_S, start_s)) == 0
    finally:
        node.kill()
    stopped = re.search(r'stopped after (\d+\.\d) s', node.log)
    assert stopped and float(stopped[1]) < LAUNCH_S, node.log


def test_an_iteration_that_hangs_is_named_and_abandoned(
        tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    context, end = Context(), threading.Event()
    context.init(args=['--ros-args', '-p', 'lifecycle.autostart:=false',
                       '-p', f'storage.folder:={tmp_path}'])
    node = MaceNode(context=context)
    hanging = node._engine_thread.call(lambda: end.wait(30.0))
    started = time.monotonic()
    try:
        assert not node.stop()
        assert time.monotonic() - started < SHUTDOWN_TIMEOUT_S + 5.0     # the iteration takes 30
    finally:
        end.set()
        hanging.result(30.0)
        node._engine_thread.stop(30.0)
        node.destroy_node()
        context.shutdown()
    said = capfd.readouterr().err
    assert 'the running iteration did not end in time and is abandoned' in said
    assert re.search(r'stopped after \d\.\d s: \d\.\d s for the running iteration', said)


def test_the_steps_of_a_shutdown_share_its_time() -> None:
    now = 10.0
    shutdown = Shutdown(4.0, clock=lambda: now)
    assert shutdown.left(1.0) == 1.0
    with shutdown.waiting_for('the disk'):
        now += 3.5
    assert shutdown.left(1.0) == 0.5
    with shutdown.waiting_for('nothing'):
        pass
    now += 2.0
    assert shutdown.left(1.0) == SHORTEST_S
    assert str(shutdown) == 'stopped after 5.5 s: 3.5 s for the disk'
