# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Start the language model node, and optionally a monitor.

    ros2 launch mace_ros mace.launch.py namespace:=robot1 model:=/models/qwen3
"""

from pathlib import Path
from shlex import quote

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, ExecuteProcess, OpaqueFunction
from launch.logging import launch_config
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare
from launch_ros.utilities import make_namespace_absolute, prefix_namespace

ARGUMENTS = [
    DeclareLaunchArgument(
        'namespace', default_value='',
        description='Namespace of the node, whose topics are then NAMESPACE/mace/...'),
    DeclareLaunchArgument(
        'name', default_value='mace',
        description='Name of the node, whose topics are then NAME/...'),
    DeclareLaunchArgument(
        'remappings', default_value='',
        description='Remapping rules of the node, the monitor and the server of openai, as '
                    '/mace/query:=/ask; separated by spaces'),
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
        'autostart', default_value='', choices=['', 'true', 'false'],
        description='Configure and activate the node at the start; otherwise it waits for a '
                    'lifecycle manager or for `ros2 lifecycle set`; empty for '
                    'lifecycle.autostart of params_file'),
    DeclareLaunchArgument(
        'use_sim_time', default_value='', choices=['', 'true', 'false'],
        description='Stamp messages with the time of /clock; empty for that of params_file'),
    DeclareLaunchArgument(
        'log_level', default_value='info', choices=['debug', 'info', 'warn', 'error', 'fatal'],
        description='Minimum severity of logged messages'),
    DeclareLaunchArgument(
        'respawn', default_value='true', choices=['true', 'false'],
        description='Restart the node when it ends; what it has learned is kept'),
    DeclareLaunchArgument(
        'openai', default_value='false', choices=['true', 'false'],
        description="Serve OpenAI's API over HTTP"),
    DeclareLaunchArgument(
        'openai_host', default_value='127.0.0.1',
        description="Address that OpenAI's API listens on; the default is this machine only"),
    DeclareLaunchArgument(
        'openai_port', default_value='8000', description="Port of OpenAI's API"),
    DeclareLaunchArgument(
        'openai_key_file', default_value='',
        description="File whose first line is the key that requests of OpenAI's API must have; "
                    'empty for no key'),
    DeclareLaunchArgument(
        'monitor', default_value='none', choices=['none', 'terminal', 'rqt'],
        description='Monitor of the node: terminal prints a line of numbers every ten seconds, '
                    'rqt plots curves and shows the diagnostics'),
]

# Arguments that set a parameter unless they are empty, and its type.
OVERRIDES = {
    'model': ('model.source', str), 'policy': ('scheduler.policy', str),
    'autostart': ('lifecycle.autostart', bool), 'use_sim_time': ('use_sim_time', bool)}


def start_node(context: LaunchContext) -> list[Node]:
    """Return the node; evaluated late, since an empty argument must not override params_file."""
    overrides = {}
    for argument, (parameter, kind) in OVERRIDES.items():
        value = LaunchConfiguration(argument)
        if value.perform(context):
            overrides[parameter] = ParameterValue(value, value_type=kind)
    return [Node(
        package='mace_ros',
        executable='mace_node',
        name=LaunchConfiguration('name'),
        namespace=LaunchConfiguration('namespace'),
        remappings=remappings(context),
        parameters=[LaunchConfiguration('params_file'), overrides],
        ros_arguments=['--log-level', LaunchConfiguration('log_level')],
        output='both',
        respawn=LaunchConfiguration('respawn'),
        respawn_delay=2.0,
    )]


def remappings(context: LaunchContext) -> list[tuple[str, str]]:
    """Return the rules of the argument ``remappings``."""
    rules = [rule.partition(':=') for rule in
             LaunchConfiguration('remappings').perform(context).split()]
    for before, arrow, after in rules:
        if not (before and arrow and after):
            raise ValueError(f'remappings: {before + arrow + after!r} is not FROM:=TO')
    return [(before, after) for before, _, after in rules]


def start_openai(context: LaunchContext) -> list[Node]:
    """Return the process of the argument ``openai``."""
    if LaunchConfiguration('openai').perform(context) != 'true':
        return []
    key_file = LaunchConfiguration('openai_key_file')
    return [Node(
        package='mace_ros',
        executable='openai',
        namespace=LaunchConfiguration('namespace'),
        remappings=remappings(context),
        arguments=['--node', LaunchConfiguration('name'),
                   '--host', LaunchConfiguration('openai_host'),
                   '--port', LaunchConfiguration('openai_port'),
                   *(['--api-key-file', key_file] if key_file.perform(context) else [])],
        output='both', respawn=LaunchConfiguration('respawn'), respawn_delay=2.0)]


def start_monitor(context: LaunchContext) -> list[ExecuteProcess]:
    """Return the process of the argument ``monitor``."""
    monitor = LaunchConfiguration('monitor').perform(context)
    name = LaunchConfiguration('name').perform(context)
    if monitor == 'terminal':
        return [Node(
            package='mace_ros',
            executable='monitor',
            namespace=LaunchConfiguration('namespace'),
            remappings=remappings(context),
            arguments=['--node', name, '--period', '10', '--timeout', 'inf'],
            output='screen')]
    if monitor == 'rqt':
        namespace = make_namespace_absolute(prefix_namespace(
            context.launch_configurations.get('ros_namespace', ''),
            LaunchConfiguration('namespace').perform(context)))
        node = f'{namespace.rstrip("/")}/{name}'
        # rqt_plot draws only topics that exist when it starts.
        return [ExecuteProcess(
            cmd=[f'until ros2 node list | grep -qx {quote(node)}; do sleep 1; done; '
                 f'exec rqt --perspective-file {quote(str(perspective(context, node)))}'],
            name='rqt', shell=True, output='log')]
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
