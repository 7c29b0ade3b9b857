# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Helper nodes, which serve some interfaces of a node in another thread.

An executor takes whole nodes, and a thread whose callbacks may block needs an executor of its
own.
"""

from __future__ import annotations

from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.service import Service


def helper_node(owner: Node, purpose: str) -> Node:
    """Return a node beside ``owner`` that is hidden in the graph and ignores remapping."""
    return Node(
        f'_{owner.get_name()}_{purpose}', namespace=owner.get_namespace(), context=owner.context,
        use_global_arguments=False, enable_rosout=False, start_parameter_services=False,
        parameter_overrides=[Parameter('start_type_description_service', value=False)])


def move_service(service: Service, owner: Node, helper: Node) -> None:
    """
    Let the executor of the helper node serve a service of its owner.

    The service needs a callback group of its own: two executors that share a group do not wake
    each other.
    """
    owner._services.remove(service)
    helper._services.append(service)
