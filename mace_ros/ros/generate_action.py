# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The action ``~/generate``: queries as goals, chunks as feedback, the response as result."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any
import uuid

from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.action.server import ServerGoalHandle
from rclpy.node import Node
from rclpy.qos import QoSProfile

from mace_ros.action import Generate
from mace_ros.api.events import Cancel, Event, Response, ResponseChunk
import mace_ros.msg as msg
from mace_ros.ros.conversion import query_from
from mace_ros.ros.request_gate import RequestGate

RESULT_TIMEOUT_S = 60   # how long a result is kept for clients that request it late
# Chunks come faster than most nodes spin; the default depth is ten.
FEEDBACK = QoSProfile(depth=1000)


class GenerateActionServer:
    """
    Passes goals to the request gate, and the events of their queries to the action clients.

    An execute callback would have to wait for the answer, and rclpy's executors wake a waiting
    coroutine late or never. So a goal is executed only once its response exists.
    """

    def __init__(self, node: Node, gate: RequestGate) -> None:
        """Create the action server."""
        self._node, self._gate = node, gate
        self._goals: dict[str, ServerGoalHandle] = {}      # by origin of the query
        self._server = ActionServer(
            node, Generate, '~/generate', lambda handle: None,
            goal_callback=self._on_goal, handle_accepted_callback=self._on_accepted,
            cancel_callback=self._on_cancel, feedback_pub_qos_profile=FEEDBACK,
            result_timeout=RESULT_TIMEOUT_S)

    def on_event(self, event: Event, message: Any) -> None:
        """Pass an event and its message to the goal it belongs to, if any; from any thread."""
        if isinstance(event, ResponseChunk):
            handle = self._goals.get(event.origin)
            if handle is not None:
                handle.publish_feedback(Generate.Feedback(chunk=message))
        elif isinstance(event, Response):
            handle = self._goals.pop(event.origin, None)
            # In the executor of the node, so that it can't interleave with a cancellation.
            executor = self._node.executor
            if handle is not None and executor is not None:     # None: the node has ended
                executor.create_task(self._finish, handle, message)

    # -- callbacks in the thread that serves ROS --------------------------------------

    def _on_goal(self, goal: Generate.Goal) -> GoalResponse:
        if goal.query.id not in {_query_id(handle) for handle in list(self._goals.values())}:
            return GoalResponse.ACCEPT
        # The action protocol has no field for a reason.
        self._node.get_logger().warning(
            'goal rejected: another goal with the same query id is running',
            throttle_duration_sec=1.0)
        return GoalResponse.REJECT

    def _on_accepted(self, handle: ServerGoalHandle) -> None:
        origin = str(uuid.UUID(bytes=bytes(handle.goal_id.uuid)))
        self._goals[origin] = handle
        self._gate.put(replace(
            query_from(handle.request.query), id=_query_id(handle), origin=origin))

    def _on_cancel(self, handle: ServerGoalHandle) -> CancelResponse:
        self._gate.put(Cancel(_query_id(handle)))
        return CancelResponse.ACCEPT

    def _finish(self, handle: ServerGoalHandle, response: msg.Response) -> None:
        handle.execute(partial(_result, response))


def _query_id(handle: ServerGoalHandle) -> str:
    return handle.request.query.id or str(uuid.UUID(bytes=bytes(handle.goal_id.uuid)))


def _result(response: msg.Response, handle: ServerGoalHandle) -> Generate.Result:
    if response.finish_reason in (msg.Response.STOP, msg.Response.LENGTH):
        handle.succeed()
    elif handle.is_cancel_requested:
        handle.canceled()
    else:
        handle.abort()
    return Generate.Result(response=response)
