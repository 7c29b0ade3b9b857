# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The lifecycle state of the node, read from its service."""

from __future__ import annotations

from typing import Any

from lifecycle_msgs.srv import GetState

from mace_ros.openai.arrivals import Arrivals
from mace_ros.ros.client import MaceClient

REPLY_S = 1.0


class LifecycleState:
    """Asks the node for its state by ``~/get_state``, which it also answers while it is busy."""

    def __init__(self, client: MaceClient) -> None:
        """Create the client of the service in the ROS client's node."""
        self._service: Any = client.node.create_client(GetState, f'{client.name}/get_state')

    async def label(self) -> str:
        """Return the name of the state, ``absent``, or ``silent`` if no reply comes."""
        if not self._service.service_is_ready():
            return 'absent'
        arrivals = Arrivals()
        reply = self._service.call_async(GetState.Request())
        reply.add_done_callback(lambda _: arrivals.announce())
        if not await arrivals.wait_for(reply.done, REPLY_S):
            self._service.remove_pending_request(reply)
            return 'silent'
        return str(reply.result().current_state.label)
