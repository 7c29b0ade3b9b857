# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Hidden nodes, to serve some of a node's interfaces in another thread.

An executor takes whole nodes, and a thread that may wait needs an executor of its own.
"""

from __future__ import annotations

from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.service import Service


def hidden_node(owner: Node, purpose: str) -> Node:
    """Make a node beside ``owner`` that nobody sees, and that remapping does not reach."""
    return Node(
        f'_{owner.get_name()}_{purpose}', namespace=owner.get_namespace(), context=owner.context,
        use_global_arguments=False, enable_rosout=False, start_parameter_services=False,
        parameter_overrides=[Parameter('start_type_description_service', value=False)])


def adopt(service: Service, owner: Node, hidden: Node) -> None:
    """
    Have a service of the owner served where the hidden node spins.

    Its callback group must be its own: two threads do not wake each other in a shared one.
    """
    owner._services.remove(service)
    hidden._services.append(service)
