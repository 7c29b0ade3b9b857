# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The bond with Nav2's lifecycle manager, which notices by it that the node has died.

Like the bonds of Nav2's own nodes, it uses the topic ``bond`` in the node's namespace and the
node's name as its id, and exists while the node is active. ``bondpy`` is a package of ROS that no
Python registry has, so it is imported only where a bond is asked for.
"""

from __future__ import annotations

from typing import Any

from rclpy.node import Node

HEARTBEAT_PERIOD_S = 0.25       # as Nav2's nodes
HEARTBEAT_TIMEOUT_S = 4.0
TOPIC = 'bond'


class BondUnavailable(RuntimeError):
    """A bond is asked for, and its package is missing; the message says what to do."""


class LifecycleBond:
    """Keeps a bond from :meth:`start` to :meth:`stop`."""

    def __init__(self, node: Node) -> None:
        """``node`` is the node to vouch for; its executor must run for the bond to form."""
        self._node = node
        self._bond: Any = None

    def start(self) -> None:
        """Begin to send heartbeats; raises :class:`BondUnavailable`."""
        try:
            from bondpy.bondpy import Bond
        except ImportError as error:
            raise BondUnavailable(
                f'lifecycle.bond: {error}; install bondpy (ros-$ROS_DISTRO-bondpy), or set '
                'lifecycle.bond to false and bond_timeout of the lifecycle manager to 0.0'
            ) from error
        log = self._node.get_logger()
        self._bond = Bond(
            self._node, TOPIC, self._node.get_name(), on_broken=self._on_broken,
            on_formed=lambda: log.info('the bond with the lifecycle manager is formed'))
        self._bond.heartbeat_period = HEARTBEAT_PERIOD_S
        self._bond.heartbeat_timeout = HEARTBEAT_TIMEOUT_S
        self._bond.start()

    def stop(self) -> None:
        """Tell the manager that the node ends the bond on purpose."""
        bond, self._bond = self._bond, None
        if bond is None:
            return
        bond.break_bond()
        bond.shutdown()
        # bondpy destroys these, but leaves them in the node's lists.
        self._node.destroy_subscription(bond.sub)
        self._node.destroy_publisher(bond.pub)

    def _on_broken(self) -> None:
        if self._bond is not None:     # else it was ended on purpose
            self._node.get_logger().warning('the bond with the lifecycle manager is broken')
