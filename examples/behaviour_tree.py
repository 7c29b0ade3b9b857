# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Ask the robot's model in a leaf of a behaviour tree, through the action ~/generate.

The leaf is RUNNING while the answer is written, and cancels it when the tree moves on. Needs
`pip install py-trees`.
"""

import time

from mace_ros.action import Generate
from mace_ros.msg import Query, Response
import py_trees
from py_trees.common import Status
import rclpy
from rclpy.action import ActionClient
from rclpy.node import Node


class Ask(py_trees.behaviour.Behaviour):
    """Asks a question; ``answer`` is the text when it has succeeded."""

    def __init__(self, node: Node, question: str, *, timeout_s: float = 30.0) -> None:
        super().__init__(question)
        self._client = ActionClient(node, Generate, '/mace/generate')
        self._timeout_s = timeout_s
        self.answer = ''

    def initialise(self) -> None:
        """Wait for the server in :meth:`update`: a tick must not block."""
        self._end = time.monotonic() + self._timeout_s
        self._sent = self._result = None

    def update(self) -> Status:
        """Return RUNNING until there is an answer."""
        if time.monotonic() > self._end:
            self.feedback_message = f'no answer within {self._timeout_s:g} s'
            return Status.FAILURE
        if self._sent is None:
            if self._client.server_is_ready():
                self._sent = self._client.send_goal_async(
                    Generate.Goal(query=Query(text=self.name)))
        elif self._result is None:
            if self._sent.done():
                self._result = self._sent.result().get_result_async()
        elif self._result.done():
            response = self._result.result().result.response
            self.answer, self.feedback_message = response.text, response.error
            return (Status.SUCCESS if response.finish_reason in (Response.STOP, Response.LENGTH)
                    else Status.FAILURE)
        return Status.RUNNING

    def terminate(self, new_status: Status) -> None:
        """Cancel the answer if something else has become more important."""
        if self.status is Status.RUNNING and self._sent is not None and self._sent.done():
            self._sent.result().cancel_goal_async()


def main() -> None:
    """Tick a tree of two questions, ten times a second."""
    rclpy.init()
    try:
        node = Node('behaviour_tree_example')
        asks = [Ask(node, 'What is your name?'), Ask(node, 'What can you do?')]
        tree = py_trees.composites.Sequence('introduction', memory=True, children=asks)
        while tree.status not in (Status.SUCCESS, Status.FAILURE):
            tree.tick_once()
            rclpy.spin_once(node, timeout_sec=0.1)
        for ask in asks:
            print(f'{ask.name} {ask.answer or ask.feedback_message}')
    finally:
        rclpy.try_shutdown()


if __name__ == '__main__':
    main()
