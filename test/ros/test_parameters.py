# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The parameter table agrees with the node, the shipped parameter file and the documentation."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from rcl_interfaces.msg import ParameterType
from rclpy.context import Context
from rclpy.node import Node
from rclpy.parameter import Parameter as NodeParameter, parameter_dict_from_yaml_file

from mace_ros.api.policies import POLICIES
from mace_ros.api.settings import InvalidSetting, Parameter, PARAMETERS, Settings
from mace_ros.ros import parameter_table
from mace_ros.ros.parameters import ParameterServer
from mace_ros.store.layout import default_folder

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / 'config' / 'mace.yaml'
PAGE = ROOT / 'docs/reference/parameters.md'

# Name, value, and a part of the reason for its refusal.
WRONG = {
    'below': ('slo.ttft_ms', 0.0, 'slo.ttft_ms'),
    'above': ('finetune.budget', 1.5, 'finetune.budget'),
    'not a number': ('slo.tpot_ms', float('nan'), 'slo.tpot_ms'),
    'no such choice': ('scheduler.policy', 'best', 'mace, inference_only'),
    'of another type': ('scheduler.max_queue', 1.0, 'type'),
}


class Served:
    """A node with the parameter table."""

    def __init__(self, context: Context, *arguments: str) -> None:
        self.node = Node('mace', context=context, cli_args=['--ros-args', *arguments])
        self.changes: list[Settings] = []
        self.server = ParameterServer(self.node, self.changes.append)
        self.initial = self.server.settings

    def set(self, **values: object) -> tuple[bool, str]:
        """Set parameters atomically; ``slo__ttft_ms`` stands for ``slo.ttft_ms``."""
        result = self.node.set_parameters_atomically(
            [NodeParameter(name.replace('__', '.'), value=v) for name, v in values.items()])
        return result.successful, result.reason


@pytest.fixture(scope='module')
def context() -> Iterator[Context]:
    """Yield a context without discovery."""
    context = Context()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('ROS_AUTOMATIC_DISCOVERY_RANGE', 'OFF')
        context.init(args=[])
    yield context
    context.shutdown()


@pytest.fixture(params=['kilted', 'humble'])
def served(context: Context, request: pytest.FixtureRequest,
           monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """Yield a node with the table; also as on Humble, which has no callback after a change."""
    if request.param == 'humble':
        monkeypatch.delattr(Node, 'add_post_set_parameters_callback', raising=False)
    elif not hasattr(Node, 'add_post_set_parameters_callback'):
        pytest.skip('this rclpy has no callback after a change')
    made = Served(context)
    yield made
    made.node.destroy_node()


@pytest.mark.parametrize('name', PARAMETERS)
def test_a_parameter_is_declared_as_in_the_table(context: Context, name: str) -> None:
    served, row = Served(context), PARAMETERS[name]
    try:
        described = served.node.describe_parameter(name)
        value = served.node.get_parameter(name).value
    finally:
        served.node.destroy_node()
    assert value == (row.default if name != 'storage.folder' else str(default_folder('/mace')))
    assert described.description.startswith(row.description)
    assert row.unit in described.description
    assert described.read_only == row.read_only
    assert not described.dynamic_typing
    assert described.type == {
        bool: ParameterType.PARAMETER_BOOL, int: ParameterType.PARAMETER_INTEGER,
        float: ParameterType.PARAMETER_DOUBLE, str: ParameterType.PARAMETER_STRING,
    }[type(row.default)]
    ranges = [*described.integer_range, *described.floating_point_range]
    assert [(r.from_value, r.to_value) for r in ranges] == (
        [] if row.minimum is None else [(row.minimum, row.slider or row.maximum)])
    assert all(choice in described.additional_constraints for choice in row.choices)


def test_a_change_reaches_the_settings(
        served: Served, capfd: pytest.CaptureFixture[str]) -> None:
    assert served.set(slo__ttft_ms=250.0, scheduler__policy='continuous') == (True, '')
    settings = served.server.settings
    assert (settings.slo.ttft_ms, settings.scheduler.policy) == (250.0, 'continuous')
    assert served.changes == [settings]
    assert served.set(slo__ttft_ms=250.0) == (True, '')
    logged = [line.split(': ', 1)[1] for line in capfd.readouterr().err.splitlines()
              if ' is ' in line]
    assert logged == ['slo.ttft_ms is 250.0, and was 500.0',
                      "scheduler.policy is 'continuous', and was 'mace'"]


@pytest.mark.parametrize('case', WRONG)
def test_an_invalid_value_is_refused_with_a_reason(served: Served, case: str) -> None:
    name, value, reason = WRONG[case]
    successful, said = served.set(**{name: value})
    assert not successful
    assert reason in said
    assert served.server.settings == served.initial
    assert served.changes == []


LIVE_NUMBERS = [p for p in PARAMETERS.values() if not p.read_only and p.minimum is not None]


@pytest.mark.parametrize('row', LIVE_NUMBERS, ids=lambda row: row.name)
def test_a_slider_can_set_the_default(row: Parameter) -> None:
    """The sliders of rqt_reconfigure have 100 positions for a parameter that is a float."""
    position = ((row.slider or row.maximum) - row.minimum) / 100
    assert not row.default or position <= row.default / 3
    assert row.slider is None or row.default <= row.slider < row.maximum


@pytest.mark.skipif(not hasattr(Node, 'add_pre_set_parameters_callback'),
                    reason='this rclpy has no callback before a change')
def test_values_beyond_the_slider_can_be_set(context: Context) -> None:
    """At the start and live; the slider then reaches the maximum."""
    served = Served(context, '-p', 'slo.tpot_ms:=7000.0')
    ends = {name: served.node.describe_parameter(name).floating_point_range[0].to_value
            for name in ('slo.ttft_ms', 'slo.tpot_ms')}
    assert ends == {'slo.ttft_ms': PARAMETERS['slo.ttft_ms'].slider,
                    'slo.tpot_ms': PARAMETERS['slo.tpot_ms'].maximum}
    assert served.set(slo__ttft_ms=60000.0) == (True, '')
    described = served.node.describe_parameter('slo.ttft_ms')
    assert described.floating_point_range[0].to_value == PARAMETERS['slo.ttft_ms'].maximum
    successful, reason = served.set(slo__ttft_ms=1e9)
    assert (successful, 'slo.ttft_ms' in reason) == (False, True)
    assert served.server.settings.slo.ttft_ms == 60000.0
    served.node.destroy_node()


@pytest.mark.parametrize('given', ['', '~/kept', '/tmp/kept', 'kept'])
def test_the_storage_folder_reads_back_as_the_path_in_use(context: Context, given: str) -> None:
    served = Served(context, '-p', f"storage.folder:='{given}'", '-r', '__ns:=/robot1')
    folder = served.node.get_parameter('storage.folder').value
    assert folder == served.server.settings.storage.folder
    assert folder == str({
        '': default_folder('/robot1/mace'), '~/kept': Path.home() / 'kept',
        '/tmp/kept': Path('/tmp/kept'), 'kept': Path.cwd() / 'kept'}[given])
    successful, reason = served.set(storage__folder='/elsewhere')
    assert (successful, 'read-only' in reason) == (False, True)
    served.node.destroy_node()


def test_changes_are_atomic(served: Served) -> None:
    successful, reason = served.set(slo__ttft_ms=250.0, scheduler__policy='best')
    assert not successful
    assert 'best' in reason
    assert served.node.get_parameter('slo.ttft_ms').value == Settings().slo.ttft_ms
    assert served.server.settings == served.initial


def test_a_read_only_parameter_can_not_be_changed(served: Served) -> None:
    successful, reason = served.set(adapter__rank=4)
    assert not successful
    assert 'read-only' in reason


def test_parameters_of_every_node_are_ignored(served: Served) -> None:
    assert served.set(use_sim_time=False) == (True, '')
    assert served.changes == []


def test_overrides_are_initial_values(context: Context) -> None:
    served = Served(context, '-p', 'adapter.rank:=4', '-p', "model.source:='/models/qwen'")
    served.node.destroy_node()
    assert served.server.settings.adapter.rank == 4
    assert served.server.settings.model.source == '/models/qwen'


@pytest.mark.parametrize(('override', 'reason'), [
    ('slo.ttft_ms:=500', 'decimal point'),
    ('adapter.rank:=0', 'adapter.rank'),
    ('model.device:=tpu', 'auto, cpu, cuda'),
])
def test_an_invalid_override_is_an_error(context: Context, override: str, reason: str) -> None:
    with pytest.raises(InvalidSetting, match=reason):
        Served(context, '-p', override)


def test_the_shipped_file_is_generated_from_the_table() -> None:
    """If it fails: ``python -m mace_ros.ros.parameter_table yaml > config/mace.yaml``."""
    assert CONFIG.read_text() == parameter_table.yaml()


@pytest.mark.parametrize('node', ['mace', 'other'])
def test_the_shipped_file_has_the_defaults(context: Context, node: str) -> None:
    served = Served(
        context, '--params-file', str(CONFIG), '-r', f'__node:={node}', '-r', '__ns:=/robot1')
    served.node.destroy_node()
    in_file = parameter_dict_from_yaml_file(str(CONFIG), use_wildcard=True)
    assert {name: p.value for name, p in
            ((n, NodeParameter.from_parameter_msg(m)) for n, m in in_file.items())} == {
        name: row.default for name, row in PARAMETERS.items()}
    assert served.server.settings == Settings().updated(
        {'storage.folder': str(default_folder(f'/robot1/{node}'))})


def test_the_documentation_has_the_table() -> None:
    """If it fails, store what ``python -m mace_ros.ros.parameter_table markdown`` prints."""
    assert PAGE.read_text() == parameter_table.markdown()


def test_the_launch_file_offers_exactly_the_policies() -> None:
    tree = ast.parse((ROOT / 'launch/mace.launch.py').read_text())
    [choices] = [
        ast.literal_eval(keyword.value) for call in ast.walk(tree) if isinstance(call, ast.Call)
        and call.args and ast.unparse(call.args[0]) == "'policy'"
        for keyword in call.keywords if keyword.arg == 'choices']
    assert choices == ['', *POLICIES]
