# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Start the language model node, and optionally a monitor.

    ros2 launch mace_ros mace.launch.py namespace:=robot1 model:=/models/qwen3
"""

from pathlib import Path

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, ExecuteProcess, OpaqueFunction
from launch.logging import launch_config
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import ExecutableInPackage, FindPackageShare

ARGUMENTS = [
    DeclareLaunchArgument(
        'namespace', default_value='',
        description='Namespace of the node, whose topics are then NAMESPACE/mace/...'),
    DeclareLaunchArgument(
        'params_file',
        default_value=PathJoinSubstitution([FindPackageShare('mace_ros'), 'config', 'mace.yaml']),
        description='Parameter file of the node'),
    DeclareLaunchArgument(
        'model', default_value='',
        description='Base model: a hub id, a local folder or a GGUF file; empty for that of '
                    'params_file'),
    DeclareLaunchArgument(
        'policy', default_value='',
        choices=['', 'mace', 'inference_only', 'continuous', 'periodic', 'static_split'],
        description='Scheduling policy (scheduler.policy); empty for that of params_file'),
    DeclareLaunchArgument(
        'autostart', default_value='true', choices=['true', 'false'],
        description='Configure and activate the node at the start; otherwise it waits for a '
                    'lifecycle manager or for `ros2 lifecycle set`'),
    DeclareLaunchArgument(
        'log_level', default_value='info', choices=['debug', 'info', 'warn', 'error', 'fatal'],
        description='Minimum severity of logged messages'),
    DeclareLaunchArgument(
        'respawn', default_value='true', choices=['true', 'false'],
        description='Restart the node when it ends; what it has learned is kept'),
    DeclareLaunchArgument(
        'openai', default_value='false', choices=['true', 'false'],
        description="Serve OpenAI's API over HTTP on this machine"),
    DeclareLaunchArgument(
        'openai_port', default_value='8000', description="Port of OpenAI's API"),
    DeclareLaunchArgument(
        'monitor', default_value='none', choices=['none', 'terminal', 'rqt'],
        description='Monitor of the node: terminal prints a line of numbers every ten seconds, '
                    'rqt plots curves and shows the diagnostics'),
]

# Arguments that set a parameter of another name.
OVERRIDES = {'model': 'model.source', 'policy': 'scheduler.policy'}


def start_node(context: LaunchContext) -> list[Node]:
    """Return the node; evaluated late, since an empty argument must not override params_file."""
    overrides = {'lifecycle.autostart': ParameterValue(
        LaunchConfiguration('autostart'), value_type=bool)}
    for argument, parameter in OVERRIDES.items():
        value = LaunchConfiguration(argument).perform(context)
        if value:
            overrides[parameter] = ParameterValue(value, value_type=str)
    return [Node(
        package='mace_ros',
        executable='mace_node',
        name='mace',
        namespace=LaunchConfiguration('namespace'),
        parameters=[LaunchConfiguration('params_file'), overrides],
        ros_arguments=['--log-level', LaunchConfiguration('log_level')],
        output='both',
        respawn=LaunchConfiguration('respawn'),
        respawn_delay=2.0,
    )]


def node_name(context: LaunchContext) -> str:
    """Return the full name of the node."""
    namespace = LaunchConfiguration('namespace').perform(context).strip('/')
    return f'/{namespace}/mace' if namespace else '/mace'


def start_openai(context: LaunchContext) -> list[ExecuteProcess]:
    """Return the process of the argument ``openai``."""
    if LaunchConfiguration('openai').perform(context) != 'true':
        return []
    return [ExecuteProcess(
        cmd=[ExecutableInPackage('openai', 'mace_ros'), '--node', node_name(context),
             '--port', LaunchConfiguration('openai_port')],
        output='both', respawn=LaunchConfiguration('respawn'), respawn_delay=2.0)]


def start_monitor(context: LaunchContext) -> list[ExecuteProcess]:
    """Return the process of the argument ``monitor``."""
    monitor, node = LaunchConfiguration('monitor').perform(context), node_name(context)
    if monitor == 'terminal':
        return [ExecuteProcess(
            cmd=[ExecutableInPackage('monitor', 'mace_ros'),
                 '--node', node, '--period', '10', '--timeout', 'inf'],
            output='screen')]
    if monitor == 'rqt':
        return [ExecuteProcess(
            cmd=['rqt', '--perspective-file', str(perspective(context, node))], output='log')]
    return []


def perspective(context: LaunchContext, node: str) -> Path:
    """Return the rqt perspective of this node, whose topics are absolute names."""
    shipped = Path(FindPackageShare('mace_ros').perform(context), 'config', 'mace.perspective')
    if node == '/mace':
        return shipped
    made = Path(launch_config.log_dir, node.strip('/').replace('/', '_') + '.perspective')
    made.write_text(shipped.read_text().replace('/mace/', f'{node}/'))
    return made


def generate_launch_description() -> LaunchDescription:
    """Return the launch arguments and the processes."""
    return LaunchDescription([
        *ARGUMENTS, *(OpaqueFunction(function=start)
                      for start in (start_node, start_openai, start_monitor))])
