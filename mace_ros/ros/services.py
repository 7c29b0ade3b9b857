# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The node's own services: ``~/embed``, ``~/freeze_learning``, ``~/list_versions`` and others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, TimeoutError as FutureTimeout
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

from builtin_interfaces.msg import Time
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.node import Node
from std_srvs.srv import SetBool

from mace_ros.api.wording import counted
from mace_ros.ros.conversion import message_from
from mace_ros.ros.engine_thread import EngineThread
from mace_ros.ros.executor_thread import ExecutorThread
from mace_ros.ros.helper_node import helper_node, move_service
from mace_ros.ros.request_gate import NOT_ACTIVE, RequestGate
from mace_ros.srv import Embed, ListVersions, Rollback, Trace
from mace_ros.telemetry.trace import (
    check_extent,
    InvalidTrace,
    Record,
    trace_path,
    write_in_background,
)

# The journal answers in milliseconds, unless its disk is broken.
JOURNAL_TIMEOUT_S = 5.0
# A rollback takes one or two iterations, unless a version is being saved.
ROLLBACK_TIMEOUT_S = 60.0
# Texts are computed beside queries, which may come first.
EMBED_TIMEOUT_S = 60.0
# A trace that ends with the node is written within a second.
WRITE_TIMEOUT_S = 2.0
STOP_TIMEOUT_S = 0.1

# Defaults for a trace request without limits.
TRACE_ITERATIONS, TRACE_SECONDS = 200, 10.0


class Services:
    """
    Serves the node's own services.

    Calls that wait for the disk or the device are served in threads of their own, so that they
    do not block other callbacks.
    """

    def __init__(self, node: Node, gate: RequestGate, engine_thread: EngineThread, *,
                 storage: Path, freeze_learning: Callable[[bool], None]) -> None:
        """
        Create the services.

        Traces are written below ``storage``; ``freeze_learning`` stops learning, or resumes it.
        """
        self._node, self._gate, self._engine_thread = node, gate, engine_thread
        self._storage, self._freeze_learning = storage, freeze_learning
        self._trace_file = ''       # of the trace being recorded
        self._trace_writer: Thread | None = None
        node.create_service(SetBool, '~/freeze_learning', self._on_freeze)
        node.create_service(Trace, '~/trace', self._on_trace)
        self._helpers: list[tuple[Node, ExecutorThread]] = []
        for kind, name, callback in ((Embed, 'embed', self._on_embed),
                                     (ListVersions, 'list_versions', self._on_list),
                                     (Rollback, 'rollback', self._on_rollback)):
            # A group of its own: a waiting call must not block the callbacks of the node's group.
            service = node.create_service(
                kind, f'~/{name}', callback, callback_group=MutuallyExclusiveCallbackGroup())
            helper = helper_node(node, name)
            move_service(service, node, helper)
            executor = ExecutorThread(helper, name=name, context=node.context)
            executor.start()
            self._helpers.append((helper, executor))

    def stop(self, timeout_s: float) -> None:
        """
        Finish writing a trace within ``timeout_s``, and end the threads.

        A thread that a call keeps for longer is left alone.
        """
        if self._trace_writer is not None:
            self._trace_writer.join(min(timeout_s, WRITE_TIMEOUT_S))
        for helper, executor in self._helpers:
            if executor.stop(STOP_TIMEOUT_S):
                helper.destroy_node()

    def _on_freeze(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self._freeze_learning(request.data)
        response.success = True
        response.message = ('learning is frozen; corrections are kept and learned later'
                            if request.data else 'learning is resumed')
        self._node.get_logger().info(response.message)
        return response

    def _on_list(self, request: ListVersions.Request,
                 response: ListVersions.Response) -> ListVersions.Response:
        engine = self._engine_thread.engine
        if engine is None:
            response.message = 'the node is not configured'
            return response
        with _reason_of_failure(
                response, f'the journal did not answer within {JOURNAL_TIMEOUT_S:g} s'):
            versions = engine.versions(request.profile).result(JOURNAL_TIMEOUT_S)
            response.versions = [message_from(version, Time()) for version in versions]
            response.live_version = engine.live_version(request.profile)
            response.success = True
        return response

    def _on_embed(self, request: Embed.Request, response: Embed.Response) -> Embed.Response:
        engine = self._gate.engine
        if engine is None:
            response.message = NOT_ACTIVE
            return response
        with _reason_of_failure(
                response, f'not computed within {EMBED_TIMEOUT_S:g} s: queries come first'):
            embeddings = engine.embed(request.texts).result(EMBED_TIMEOUT_S)
            response.dimensions = len(embeddings[0][0])
            response.values = [number for numbers, _ in embeddings for number in numbers]
            response.tokens = [tokens for _, tokens in embeddings]
            response.success = True
        return response

    def _on_trace(self, request: Trace.Request, response: Trace.Response) -> Trace.Response:
        engine = self._gate.engine
        try:
            if engine is None:
                raise InvalidTrace(NOT_ACTIVE)
            if self._trace_file:
                raise InvalidTrace(
                    f'{self._trace_file} is still being recorded; one trace at a time')
            iterations = request.iterations or TRACE_ITERATIONS
            seconds = request.seconds or TRACE_SECONDS
            check_extent(iterations, seconds)
            path = trace_path(self._storage, request.name)
        except (InvalidTrace, OSError) as error:
            response.message = str(error)
            return response
        self._trace_file = str(path)

        def write(done: Future[list[Record]]) -> None:
            self._trace_writer = write_in_background(done.result(), path, written)

        def written(problem: str) -> None:
            self._trace_file = ''
            if problem:
                self._node.get_logger().error(f'a trace could not be written: {problem}')
            else:
                self._node.get_logger().info(f'a trace is complete: {path}')

        engine.trace(iterations, seconds).add_done_callback(write)
        response.success, response.path = True, str(path)
        response.message = (
            f'{path} will be complete after {counted(iterations, "iteration")}, or {seconds:g} s')
        return response

    def _on_rollback(self, request: Rollback.Request,
                     response: Rollback.Response) -> Rollback.Response:
        engine = self._gate.engine
        if engine is None:
            response.message = NOT_ACTIVE
            return response
        with _reason_of_failure(
                response, f'the version is not live after {ROLLBACK_TIMEOUT_S:g} s; the disk may '
                'be slow. ~/adapter_version will announce it'):
            engine.rollback(
                request.profile, request.version, 'requested through ~/rollback'
            ).result(ROLLBACK_TIMEOUT_S)
            response.success = True
        return response


@contextmanager
def _reason_of_failure(response: Any, late: str) -> Iterator[None]:
    """Write the error of the block into the response's message; ``late`` for a timeout."""
    try:
        yield
    except FutureTimeout:
        response.message = late
    except Exception as error:      # its message is the reason
        response.message = str(error)
