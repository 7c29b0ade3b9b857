# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Start the language model node.

    ros2 launch mace_ros mace.launch.py namespace:=robot1 model:=/models/qwen3
"""

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

ARGUMENTS = [
    DeclareLaunchArgument(
        'namespace', default_value='',
        description='Namespace of the node; its topics are NAMESPACE/mace/...'),
    DeclareLaunchArgument(
        'params_file',
        default_value=PathJoinSubstitution([FindPackageShare('mace_ros'), 'config', 'mace.yaml']),
        description='Parameters of the node'),
    DeclareLaunchArgument(
        'model', default_value='',
        description="Base model: a hub id, a local folder or a GGUF file; empty for params_file's"),
    DeclareLaunchArgument(
        'policy', default_value='',
        choices=['', 'mace', 'inference_only', 'continuous', 'periodic', 'static_split'],
        description="Who shares out the device (scheduler.policy); empty for params_file's"),
    DeclareLaunchArgument(
        'autostart', default_value='true', choices=['true', 'false'],
        description='Whether the node configures and activates itself; if not, it waits for a '
                    'lifecycle manager, or for `ros2 lifecycle set`'),
    DeclareLaunchArgument(
        'log_level', default_value='info', choices=['debug', 'info', 'warn', 'error', 'fatal'],
        description='Least severe messages that are logged'),
    DeclareLaunchArgument(
        'respawn', default_value='true', choices=['true', 'false'],
        description='Whether a node that died is started again, with what it had learned'),
]

# Arguments that stand for a parameter of another name.
OVERRIDES = {'model': 'model.source', 'policy': 'scheduler.policy'}


def start_node(context: LaunchContext) -> list[Node]:
    """Return the node; a function, since an empty argument must not override params_file."""
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


def generate_launch_description() -> LaunchDescription:
    """Return the launch arguments and the node."""
    return LaunchDescription([*ARGUMENTS, OpaqueFunction(function=start_node)])
