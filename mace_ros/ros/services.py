# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The services ``~/freeze_learning`` and ``~/list_versions``."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING

from builtin_interfaces.msg import Time
from rclpy.node import Node
from std_srvs.srv import SetBool

from mace_ros.ros.conversion import message_from
from mace_ros.srv import ListVersions

if TYPE_CHECKING:
    from mace_ros.engine import Engine

# The journal answers in milliseconds, or its disk is broken; other callbacks wait meanwhile.
JOURNAL_TIMEOUT_S = 0.5


class Services:
    """Answers service calls, in the thread that serves ROS."""

    def __init__(self, node: Node, *, engine: Callable[[], Engine | None],
                 freeze: Callable[[bool], None]) -> None:
        """``freeze`` stops learning, or lets it go on."""
        self._node, self._engine, self._freeze = node, engine, freeze
        node.create_service(SetBool, '~/freeze_learning', self._on_freeze)
        node.create_service(ListVersions, '~/list_versions', self._on_list)

    def _on_freeze(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self._freeze(request.data)
        response.success = True
        response.message = ('learning is frozen; corrections are kept and learned later'
                            if request.data else 'learning goes on')
        self._node.get_logger().info(response.message)
        return response

    def _on_list(self, request: ListVersions.Request,
                 response: ListVersions.Response) -> ListVersions.Response:
        engine = self._engine()
        if engine is None:
            response.message = 'the node is not configured'
            return response
        try:
            versions = engine.versions(request.profile).result(JOURNAL_TIMEOUT_S)
        except FutureTimeout:
            response.message = f'the journal did not answer within {JOURNAL_TIMEOUT_S:g} s'
        except Exception as error:    # of the journal, in words
            response.message = str(error)
        else:
            response.versions = [message_from(version, Time()) for version in versions]
            response.live_version = engine.live_version(request.profile)
            response.success = True
        return response
