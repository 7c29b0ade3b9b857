# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The launch file starts the node and ends it."""

import os
import signal
import subprocess
import sys

from graph import ENVIRONMENT, observer, wait_until
import pytest
from test_installed import PREFIX

pytest.importorskip(
    'launch_ros', reason='launch_ros is not installed (it comes with a ROS 2 distribution alone)')

# What `ros2 launch mace_ros mace.launch.py ARGUMENT:=VALUE ...` does.
LAUNCH = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch_ros.substitutions import FindPackageShare

service = LaunchService(argv=sys.argv[1:])
service.include_launch_description(LaunchDescription([IncludeLaunchDescription(
    [FindPackageShare('mace_ros'), '/launch/mace.launch.py'],
    launch_arguments=[argument.split(':=') for argument in sys.argv[1:]])]))
sys.exit(service.run())
"""


@pytest.mark.timeout(180)
def test_node_lives_as_long_as_the_launch(tmp_path, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv('ROS_LOG_DIR', str(tmp_path))
    monkeypatch.setenv(
        'AMENT_PREFIX_PATH', f'{PREFIX}{os.pathsep}{os.environ.get("AMENT_PREFIX_PATH", "")}')
    log = tmp_path / 'launch.log'

    with observer() as node, log.open('w') as output:
        launch = subprocess.Popen(
            [sys.executable, '-c', LAUNCH, 'namespace:=robot1', 'log_level:=warn'],
            cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT)
        try:
            assert wait_until(
                lambda: ('mace', '/robot1') in node.get_node_names_and_namespaces(), 60.0
            ), log.read_text()
            launch.send_signal(signal.SIGINT)
            assert launch.wait(30.0) == 0, log.read_text()
        finally:
            launch.kill()

    assert 'process has finished cleanly' in log.read_text()
