# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The bond with Nav2's lifecycle manager.

The manager's end is bondpy's as well. It needs a ROS 2 distribution, or a copy of bond_core.
"""

from __future__ import annotations

from collections.abc import Iterator
import gc
from pathlib import Path
import sys

import pytest
from rclpy.context import Context
from rclpy.duration import Duration
from rclpy.lifecycle import TransitionCallbackReturn
from support.graph import ENVIRONMENT, observer, wait_until

from mace_ros.ros.executor_thread import ExecutorThread
from mace_ros.ros.node import MaceNode

START_S = 60.0


@pytest.fixture
def bonded(tmp_path: Path, model_folder: Path,
           monkeypatch: pytest.MonkeyPatch) -> Iterator[MaceNode]:
    """Yield a configured node that is to keep a bond."""
    for name, value in {**ENVIRONMENT, 'ROS_LOG_DIR': str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    context = Context()
    context.init(args=['--ros-args', *(x for rule in (
        'lifecycle.autostart:=false', 'lifecycle.bond:=true', f'model.source:={model_folder}',
        'model.threads:=1', 'memory.kv_cache_tokens:=8192',
        f'storage.folder:={tmp_path / "storage"}') for x in ('-p', rule))])
    node = MaceNode(context=context)
    spinner = ExecutorThread(node, name='ros', context=context)
    spinner.start()
    assert change(node, 'configure') is TransitionCallbackReturn.SUCCESS
    yield node
    assert node.stop()
    spinner.stop()
    node.destroy_node()
    context.shutdown()
    del node
    gc.collect()


def change(node: MaceNode, label: str) -> TransitionCallbackReturn:
    """Run a transition in the thread in which the node's service runs it."""
    return node._engine_thread.call(getattr(node, f'trigger_{label}')).result(START_S)


def test_a_missing_package_is_named_at_the_activation(
        bonded: MaceNode, monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, 'bondpy', None)
    assert change(bonded, 'activate') is not TransitionCallbackReturn.SUCCESS
    said = capfd.readouterr().err
    assert 'install bondpy' in said and 'bond_timeout of the lifecycle manager to 0.0' in said
    assert change(bonded, 'configure') is TransitionCallbackReturn.SUCCESS     # it still serves


def test_the_manager_sees_a_bond_while_the_node_is_active(bonded: MaceNode) -> None:
    bondpy = pytest.importorskip('bondpy.bondpy', reason='bondpy is not installed')
    with observer() as manager:
        spinner = ExecutorThread(manager, name='manager', context=manager.context)
        spinner.start()
        for _ in range(2):
            assert change(bonded, 'activate') is TransitionCallbackReturn.SUCCESS
            bond = bondpy.Bond(manager, 'bond', 'mace')
            bond.heartbeat_timeout = 120.0
            bond.start()
            assert bond.wait_until_formed(Duration(seconds=30.0)), bond
            assert change(bonded, 'deactivate') is TransitionCallbackReturn.SUCCESS
            # Long before the heartbeats of a node that has died would be missed.
            assert wait_until(bond.is_broken, 30.0), bond
            bond.shutdown()
        spinner.stop()
    assert not [s for s in bonded.subscriptions if s.topic_name == '/bond']
