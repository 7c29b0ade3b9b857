# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The action ``~/generate``: queries as goals, chunks as feedback, the response as result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
import uuid

from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.action.server import ServerGoalHandle
from rclpy.node import Node
from rclpy.qos import QoSProfile

from mace_ros.action import Generate
from mace_ros.api.events import Event, Query, Response, ResponseChunk
import mace_ros.msg as msg
from mace_ros.ros.conversion import query_from

RESULT_S = 60           # a result is kept so long for those who ask late
# Chunks come faster than most nodes spin; the default keeps ten.
FEEDBACK = QoSProfile(depth=1000)


class GenerateActionServer:
    """
    Hands goals to the intake, and tells them what is heard of their queries.

    A goal's callback would have to wait for the answer, and rclpy's executors wake a
    waiting coroutine late or never. So a goal is executed only when its response is there.
    """

    def __init__(self, node: Node, put: Callable[[Query | str], None]) -> None:
        """``put`` takes a query, or the id of one to cancel, and returns at once."""
        self._node, self._put = node, put
        self._goals: dict[str, ServerGoalHandle] = {}      # by origin
        self._server = ActionServer(
            node, Generate, '~/generate', lambda handle: None,
            goal_callback=self._may_start, handle_accepted_callback=self._start,
            cancel_callback=self._cancel, feedback_pub_qos_profile=FEEDBACK,
            result_timeout=RESULT_S)

    def hear(self, event: Event, message: Any) -> None:
        """Take an event and its message; from any thread."""
        if isinstance(event, ResponseChunk):
            handle = self._goals.get(event.origin)
            if handle is not None:
                handle.publish_feedback(Generate.Feedback(chunk=message))
        elif isinstance(event, Response):
            handle = self._goals.pop(event.origin, None)
            # Where a cancellation comes in as well: they must not meet half-way.
            executor = self._node.executor
            if handle is not None and executor is not None:     # none: the node has ended
                executor.create_task(self._finish, handle, message)

    # -- in the thread that serves ROS -----------------------------------------------

    def _may_start(self, goal: Generate.Goal) -> GoalResponse:
        asked = {_query_id(handle) for handle in list(self._goals.values())}
        if goal.query.id not in asked:
            return GoalResponse.ACCEPT
        # The action protocol has no field for a reason.
        self._node.get_logger().warning(
            'a goal is rejected: another one of the same query id is being answered',
            throttle_duration_sec=1.0)
        return GoalResponse.REJECT

    def _start(self, handle: ServerGoalHandle) -> None:
        origin = str(uuid.UUID(bytes=bytes(handle.goal_id.uuid)))
        self._goals[origin] = handle
        self._put(replace(
            query_from(handle.request.query), id=_query_id(handle), origin=origin))

    def _cancel(self, handle: ServerGoalHandle) -> CancelResponse:
        self._put(_query_id(handle))
        return CancelResponse.ACCEPT

    def _finish(self, handle: ServerGoalHandle, response: msg.Response) -> None:
        handle.execute(partial(_end, response))


def _query_id(handle: ServerGoalHandle) -> str:
    return handle.request.query.id or str(uuid.UUID(bytes=bytes(handle.goal_id.uuid)))


def _end(response: msg.Response, handle: ServerGoalHandle) -> Generate.Result:
    if response.finish_reason in (msg.Response.STOP, msg.Response.LENGTH):
        handle.succeed()
    elif handle.is_cancel_requested:
        handle.canceled()
    else:
        handle.abort()
    return Generate.Result(response=response)
