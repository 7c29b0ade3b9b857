# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The package builds, passes its tests and runs in a colcon workspace."""

import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys

from mace_ros.msg import Response
import pytest
from support.graph import ENVIRONMENT
from support.mace import START_S
from support.precision import WEIGHT_DTYPE
from support.ros_graph import ANSWER_S

from mace_ros.ros.client import MaceClient

ROOT = Path(__file__).resolve().parents[2]
# The search path of an activated virtual environment.
PATH = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
COLCON = shutil.which('colcon', path=PATH)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COLCON, reason='colcon is not installed'),
]


@pytest.fixture(scope='module')
def environment():
    """Return the variables of a shell with ROS 2, from a distribution or from wheels."""
    prefixes = os.environ.get('AMENT_PREFIX_PATH') or sys.prefix
    return {
        **os.environ, **ENVIRONMENT,
        'AMENT_PREFIX_PATH': prefixes,
        'CMAKE_PREFIX_PATH': os.environ.get('CMAKE_PREFIX_PATH') or prefixes,
        'PATH': PATH,
        'VIRTUAL_ENV': sys.prefix,  # lets CMake find this Python
        'ROS_PYTHON_VERSION': '3',
        'ROS_VERSION': '2',
        # Optimised message code takes longer to build.
        'CFLAGS': '-O0', 'CXXFLAGS': '-O0',
    }


def colcon(verb, *arguments, cwd, env):
    """Run a colcon verb on the package; show its output if it fails."""
    done = subprocess.run(
        [COLCON, '--log-base', 'log', verb, '--paths', ROOT, *arguments,
         '--event-handlers', 'console_direct+'],
        cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope='module')
def workspace(tmp_path_factory, environment):
    """Build the package in a workspace; return its folder."""
    folder = tmp_path_factory.mktemp('workspace')
    environment['ROS_LOG_DIR'] = str(folder / 'log')
    environment['ROS_HOME'] = str(folder / 'home')      # of the default storage folder
    # As wheels are built; one by one, the messages take twice as long.
    colcon('build', '--cmake-args', '-DUNITY_MESSAGES=ON', cwd=folder, env=environment)
    return folder


@pytest.mark.timeout(1800)
def test_colcon_test_passes(workspace, environment):
    output = colcon('test', '--return-code-on-test-failure', cwd=workspace, env=environment)

    assert '100% tests passed, 0 tests failed out of 1' in output


@pytest.mark.dtype
@pytest.mark.timeout(1800)
def test_the_built_node_answers(workspace, environment, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    installed = 'install/mace_ros'
    run = (
        f'. install/setup.bash && exec {installed}/lib/mace_ros/mace_node --ros-args '
        f'-r __node:=mace --params-file {installed}/share/mace_ros/config/mace.yaml '
        f'-p model.weight_dtype:={WEIGHT_DTYPE}')
    log = workspace / 'node.log'

    with log.open('w') as output:
        process = subprocess.Popen(
            ['bash', '-c', run], cwd=workspace, env=environment,
            stdout=output, stderr=subprocess.STDOUT)
        try:
            with MaceClient() as client:
                client.wait_until_ready(START_S)
                answer = client.ask('What is the capital of France?', max_tokens=8).result(ANSWER_S)
            # Which words the model finds depends on the CPU's rounding.
            assert answer.finish_reason in (Response.STOP, Response.LENGTH), log.read_text()
            assert answer.text, log.read_text()
            process.send_signal(signal.SIGINT)
            assert process.wait(60.0) == 0, log.read_text()
            assert (workspace / 'home/mace_ros/mace/journal.sqlite').is_file()
        finally:
            process.kill()
