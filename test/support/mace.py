# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A node in a process of its own, and a client of it."""

from __future__ import annotations

from mace_ros.msg import Response
import pytest
from support.graph import wait_until
from support.ros_graph import ANSWER_S, Inputs, NodeProcess, PATIENT, set_parameters

from mace_ros.ros.client import AnswerHandle, MaceClient

START_S = 250.0         # with a model to be converted, on a busy machine

# The packaged model usually repeats the emoji until max_tokens.
ENDLESS = 'Repeat this: こんにちは 🤖'
OTHERS = ('What is the capital of France?', 'What is the capital of Japan?')


class Mace:
    """A node and a client of it."""

    def __init__(self, node: NodeProcess) -> None:
        self.node = node
        self._others: list[AnswerHandle] = []

    def start(self) -> None:
        self.ask_early()
        try:
            self.client.wait_until_ready(START_S)
        except TimeoutError:
            pytest.fail(self.node.log)
        self.inputs = Inputs(self.client, self.node.name)

    def ask_early(self) -> None:
        """Start the node, and ask while it loads the model."""
        self.node.start()
        self.client = MaceClient(self.node.name)
        assert wait_until(self.client.is_connected, START_S), self.node.log
        assert self.client.version() is None
        self.early = self.client.ask(OTHERS[0], max_tokens=1, no_learn=True)

    def refuses_another(self) -> bool:
        """Ask, and return whether this query or an earlier one was refused."""
        self._others.append(self.client.ask(OTHERS[1], max_tokens=1, no_learn=True))
        return wait_until(lambda: any(
            o.is_complete() and o.result().error_code == Response.OVERLOADED
            for o in self._others), 1.0)

    def kill(self) -> None:
        self.node.kill()
        self.client.close()

    def ask(self, text: str, **fields: object) -> Response:
        return self.client.ask(text, **fields).result(ANSWER_S)

    def serves(self) -> bool:
        response = self.ask(OTHERS[0], max_tokens=1, no_learn=True)
        return response.finish_reason == Response.LENGTH

    def begin_endless(self) -> AnswerHandle:
        """Ask for an answer that does not end, and return when it has begun."""
        answer = self.client.ask(ENDLESS, max_tokens=6000, no_learn=True, **PATIENT)
        next(answer.stream(ANSWER_S))
        return answer

    def set(self, name: str, value: object) -> None:
        [(successful, reason)] = set_parameters(self.client, {name: value}, node=self.node.name)
        assert successful, reason
