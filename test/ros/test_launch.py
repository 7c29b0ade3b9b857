# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The launch file starts the node with its arguments, restarts it, and ends it.

These tests need launch_ros, which only a ROS 2 distribution provides.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from lifecycle_msgs.srv import GetState
import pytest
from rcl_interfaces.srv import GetParameters
import rclpy
from rclpy.node import Node
from support.graph import ENVIRONMENT, observer, wait_until
from support.installed import PREFIX

pytest.importorskip(
    'launch_ros', reason='launch_ros is not installed (only a ROS 2 distribution provides it)')

START_S = 60.0

# The equivalent of `ros2 launch mace_ros mace.launch.py ARGUMENT:=VALUE ...` for each argument.
LAUNCH = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import GroupAction, IncludeLaunchDescription
from launch_ros.substitutions import FindPackageShare

service = LaunchService(argv=sys.argv[1:])
service.include_launch_description(LaunchDescription([GroupAction([IncludeLaunchDescription(
    [FindPackageShare('mace_ros'), '/launch/mace.launch.py'],
    launch_arguments=[argument.split(':=', 1) for argument in line.split()])])
    for line in sys.argv[1:]]))
sys.exit(service.run())
"""


@contextmanager
def launched(folder: Path, *lines: str) -> Iterator[Callable[[], str]]:
    """Launch, and yield a function that returns the output so far; end with SIGINT."""
    log = folder / 'launch.log'
    with log.open('w') as output:
        launch = subprocess.Popen(
            [sys.executable, '-c', LAUNCH, *lines],
            cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield log.read_text
            launch.send_signal(signal.SIGINT)
            assert launch.wait(30.0) == 0, log.read_text()
        finally:
            launch.kill()


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
            **ENVIRONMENT, 'ROS_LOG_DIR': str(tmp_path / 'log'), 'ROS_HOME': str(tmp_path / 'home'),
            'PATH': f'{tmp_path}{os.pathsep}{os.environ["PATH"]}',
            'AMENT_PREFIX_PATH':
                f'{PREFIX}{os.pathsep}{os.environ.get("AMENT_PREFIX_PATH", "")}'}.items():
        monkeypatch.setenv(name, value)


def call(node: Node, kind: type, name: str, **fields: Any) -> Any:
    """Call a service; return its response."""
    client = node.create_client(kind, name)
    assert client.wait_for_service(START_S)
    future = client.call_async(kind.Request(**fields))
    executor = rclpy.executors.SingleThreadedExecutor(context=node.context)
    executor.add_node(node)
    executor.spin_until_future_complete(future, START_S)
    executor.shutdown()
    node.destroy_client(client)
    return future.result()


def parameter(node: Node, server: str, name: str) -> Any:
    response = call(node, GetParameters, f'{server}/get_parameters', names=[name])
    return response.values[0]


def test_the_node_ends_with_the_launch(tmp_path):
    with observer() as node, launched(tmp_path, 'namespace:=robot1 log_level:=warn') as printed:
        assert wait_until(
            lambda: ('mace', '/robot1') in node.get_node_names_and_namespaces(), START_S
        ), printed()

    assert 'process has finished cleanly' in printed()


def test_arguments_of_two_launches_apply_to_their_nodes(tmp_path):
    own = tmp_path / 'own.yaml'
    own.write_text('/**:\n  ros__parameters:\n    slo.ttft_ms: 321.0\n'
                   '    scheduler.policy: continuous\n    lifecycle.autostart: false\n')
    with observer() as node, launched(
            tmp_path, 'namespace:=robot1 autostart:=false policy:=periodic model:=/models/qwen3',
            f'namespace:=/fleet/robot2 name:=brain use_sim_time:=true params_file:={own}'
            ) as printed:
        first, second = '/robot1/mace', '/fleet/robot2/brain'
        for server in (first, second):
            state = call(node, GetState, f'{server}/get_state').current_state
            assert state.label == 'unconfigured', printed()
        assert parameter(node, first, 'scheduler.policy').string_value == 'periodic'
        assert parameter(node, first, 'model.source').string_value == '/models/qwen3'
        assert parameter(node, second, 'scheduler.policy').string_value == 'continuous'
        assert parameter(node, second, 'model.source').string_value == ''
        assert parameter(node, second, 'slo.ttft_ms').double_value == 321.0
        assert parameter(node, second, 'use_sim_time').bool_value
        assert not parameter(node, first, 'use_sim_time').bool_value


def test_remappings_apply_to_node_and_monitor(tmp_path):
    with observer() as node, launched(
            tmp_path, 'autostart:=false monitor:=terminal remappings:=/mace/scheduler:=/busy'
            ) as printed:
        assert wait_until(lambda: node.get_publishers_info_by_topic('/busy'), START_S), printed()
        assert wait_until(lambda: node.get_subscriptions_info_by_topic('/busy'), START_S), printed()
        assert not node.get_publishers_info_by_topic('/mace/scheduler')


def test_a_killed_node_is_restarted(tmp_path):
    with observer() as node, launched(
            tmp_path, 'autostart:=false monitor:=terminal') as printed:
        call(node, GetState, '/mace/get_state')
        pid = re.search(r'mace_node-\d+\]: process started with pid \[(\d+)', printed())
        assert pid, printed()
        os.kill(int(pid[1]), signal.SIGKILL)
        assert wait_until(
            lambda: len(re.findall(r'mace_node-\d+\]: process started', printed())) == 2, START_S
        ), printed()
        assert re.search(r'monitor-\d+\]: process started', printed())


def test_openais_api_is_served_for_the_node_of_the_namespace(tmp_path):
    (tmp_path / 'key').write_text('a key\n')
    with launched(tmp_path, 'namespace:=robot1 autostart:=false openai:=true openai_port:=0 '
                            f'openai_host:=127.0.0.2 openai_key_file:={tmp_path}/key') as printed:
        def served() -> re.Match[str] | None:
            return re.search(
                r'/robot1/mace is served on (http://127\.0\.0\.2:\d+/v1)', printed())

        assert wait_until(served, START_S), printed()
        models = f'{served()[1]}/models'
        with pytest.raises(HTTPError, match='401'):
            urlopen(models, timeout=20.0)
        assert urlopen(Request(models, headers={'Authorization': 'Bearer a key'}), timeout=20.0)


def test_rqt_shows_the_topics_of_the_namespace_once_the_node_has_them(tmp_path):
    # Replacements of rqt, which needs a screen, and of `ros2 node list`, which first lists nothing.
    for name, lines in {
            'rqt': '[ "$1" = --perspective-file ] && [ -e "$ROS_HOME.asked" ] '
                   '&& cp "$2" "$ROS_HOME.shown"',
            'ros2': '[ -e "$ROS_HOME.asked" ] && echo /robot1/mace\n: > "$ROS_HOME.asked"'}.items():
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\n{lines}\n')
        program.chmod(0o755)
    shown = tmp_path / 'home.shown'
    with launched(tmp_path, 'namespace:=robot1 autostart:=false monitor:=rqt') as printed:
        assert wait_until(shown.exists, START_S), printed()

    topics = set(re.findall(r'/[/\w]*mace/\w+', shown.read_text()))
    assert '/robot1/mace/scheduler' in topics
    assert all(topic.startswith('/robot1/mace/') for topic in topics)
