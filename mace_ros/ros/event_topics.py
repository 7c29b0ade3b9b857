# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The topics on which the node publishes the engine's events."""

from __future__ import annotations

import time
from typing import Any

from builtin_interfaces.msg import Time
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from mace_ros.api.events import (
    AdapterVersion,
    CorrectionStatus,
    Event,
    Response,
    ResponseChunk,
)
import mace_ros.msg as msg
from mace_ros.ros.conversion import message_from
from mace_ros.ros.latched_versions import LatchedVersions

DEPTH = 1000            # messages of a burst
VERSION_DEPTH = 100     # live versions that a late subscriber receives
RELIABLE = QoSProfile(depth=DEPTH, reliability=ReliabilityPolicy.RELIABLE)


class EventTopics:
    """Publishes events as messages; from any thread."""

    def __init__(self, node: Node) -> None:
        """Create the publishers."""
        self._node = node
        self._latched_versions = LatchedVersions(VERSION_DEPTH)
        self._publishers = {
            ResponseChunk: node.create_publisher(msg.ResponseChunk, '~/response_chunk', RELIABLE),
            Response: node.create_publisher(msg.Response, '~/response', RELIABLE),
            CorrectionStatus: node.create_publisher(
                msg.CorrectionStatus, '~/correction_status', RELIABLE),
            AdapterVersion: node.create_publisher(
                msg.AdapterVersion, '~/adapter_version', QoSProfile(
                    depth=VERSION_DEPTH, reliability=ReliabilityPolicy.RELIABLE,
                    durability=DurabilityPolicy.TRANSIENT_LOCAL)),
        }

    def publish(self, event: Event, stamp: Time) -> Any:
        """Publish an event; return its message."""
        message = message_from(event, stamp)
        self._publishers[type(event)].publish(message)
        if isinstance(event, AdapterVersion):
            _, *again = self._latched_versions.to_publish(event)
            for live in again:
                self._publishers[AdapterVersion].publish(message_from(live, stamp))
        return message

    def wait_until_acknowledged(self, *others: Publisher, timeout_s: float) -> None:
        """Wait until subscribers have everything published here and by ``others``."""
        end = time.monotonic() + timeout_s
        for publisher in (*self._publishers.values(), *others):
            left = max(0.0, end - time.monotonic())
            try:
                publisher.wait_for_all_acked(Duration(seconds=left))
            except RuntimeError as error:    # a middleware without acknowledgements
                self._node.get_logger().debug(str(error))
