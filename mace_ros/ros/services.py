# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The services ``~/freeze_learning``, ``~/list_versions``, ``~/rollback`` and ``~/trace``."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from builtin_interfaces.msg import Time
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.node import Node
from std_srvs.srv import SetBool

from mace_ros.ros.conversion import message_from
from mace_ros.ros.executor_thread import ExecutorThread
from mace_ros.ros.helper_node import adopt, hidden_node
from mace_ros.srv import ListVersions, Rollback, Trace
from mace_ros.telemetry.trace import (
    check_extent,
    InvalidTrace,
    Record,
    trace_path,
    write_in_background,
)

if TYPE_CHECKING:
    from mace_ros.engine.engine import Engine

# The journal answers in milliseconds, or its disk is broken.
JOURNAL_TIMEOUT_S = 5.0
# An iteration or two, but while no adapter slot is free.
ROLLBACK_TIMEOUT_S = 60.0
# A trace that a stop has cut off is written within a second.
WRITE_TIMEOUT_S = 2.0

# What a trace is that says nothing else.
TRACE_ITERATIONS, TRACE_SECONDS = 200, 10.0


class Services:
    """
    Answers service calls.

    Those that wait for the disk or the device are served in threads of their own, so that
    no other callback waits with them.
    """

    def __init__(self, node: Node, *, engine: Callable[[], Engine | None],
                 active: Callable[[], bool], freeze: Callable[[bool], None],
                 storage: Callable[[], Path]) -> None:
        """
        Serve them.

        ``active`` says whether the engine runs; ``freeze`` stops learning, or lets it go on;
        traces go below ``storage``.
        """
        self._node, self._engine, self._active, self._freeze = node, engine, active, freeze
        self._storage = storage
        self._tracing = ''      # the file of the trace that is being made
        self._writer: Thread | None = None
        node.create_service(SetBool, '~/freeze_learning', self._on_freeze)
        node.create_service(Trace, '~/trace', self._on_trace)
        self._apart: list[tuple[Node, ExecutorThread]] = []
        for kind, name, callback in ((ListVersions, 'list_versions', self._on_list),
                                     (Rollback, 'rollback', self._on_rollback)):
            # Not the node's own group: while a call waits, it would keep all others out.
            service = node.create_service(
                kind, f'~/{name}', callback, callback_group=MutuallyExclusiveCallbackGroup())
            apart = hidden_node(node, name)
            adopt(service, node, apart)
            spinner = ExecutorThread(apart, name=name, context=node.context)
            spinner.start()
            self._apart.append((apart, spinner))

    def stop(self, timeout_s: float) -> None:
        """End the threads, unless a call keeps one for longer; a trace is written to its end."""
        if self._writer is not None:
            self._writer.join(WRITE_TIMEOUT_S)
        for apart, spinner in self._apart:
            if spinner.stop(timeout_s):
                apart.destroy_node()

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

    def _on_trace(self, request: Trace.Request, response: Trace.Response) -> Trace.Response:
        engine = self._engine()
        try:
            if engine is None or not self._active():
                raise InvalidTrace('the node is not active')
            if self._tracing:
                raise InvalidTrace(f'{self._tracing} is being made; one trace at a time')
            iterations = request.iterations or TRACE_ITERATIONS
            seconds = request.seconds or TRACE_SECONDS
            check_extent(iterations, seconds)
            path = trace_path(self._storage(), request.name)
        except (InvalidTrace, OSError) as error:
            response.message = str(error)
            return response
        self._tracing = str(path)

        def write(records: list[Record]) -> None:
            self._writer = write_in_background(records, path, written)

        def written(problem: str) -> None:
            self._tracing = ''
            if problem:
                self._node.get_logger().error(f'a trace could not be written: {problem}')
            else:
                self._node.get_logger().info(f'a trace is complete: {path}')

        engine.trace(iterations, seconds, write)
        response.success, response.path = True, str(path)
        response.message = f'{path} will be there after {iterations} iterations, or {seconds:g} s'
        return response

    def _on_rollback(self, request: Rollback.Request,
                     response: Rollback.Response) -> Rollback.Response:
        engine = self._engine()
        if engine is None or not self._active():
            response.reason = 'the node is not active'
            return response
        try:
            engine.rollback(
                request.profile, request.version, 'asked for by ~/rollback'
            ).result(ROLLBACK_TIMEOUT_S)
        except FutureTimeout:
            response.reason = (
                f'it does not serve yet after {ROLLBACK_TIMEOUT_S:g} s, as while requests hold '
                'every adapter slot; ~/adapter_version will tell')
        except Exception as error:    # in words
            response.reason = str(error)
        else:
            response.success = True
        return response
