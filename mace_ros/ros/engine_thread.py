# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The thread that owns the device.

Its executor has a guard condition whose callback is one iteration of the engine; it
re-arms itself while there is work, and costs nothing when there is none. The executor
that serves ROS is another one, since rclpy takes one message per subscription and pass:
behind an iteration of 80 ms, two thirds of 200 messages in a second were lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
import time
import traceback
from typing import TYPE_CHECKING, TypeVar

from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.service import Service

from mace_ros.api.events import Event
from mace_ros.ros.executor_thread import ExecutorThread
from mace_ros.ros.helper_node import adopt, hidden_node

if TYPE_CHECKING:
    from mace_ros.engine.engine import Engine

T = TypeVar('T')

MAX_FAILURES = 3        # iterations in a row
RETRY_S = 0.1


class EngineThread:
    """Runs the engine, and any other function that must be run where the engine is."""

    def __init__(self, node: Node, *, publish: Callable[[list[Event]], None],
                 fatal_error: Callable[[str], None]) -> None:
        """
        Start the thread.

        ``publish`` gets the events of each iteration, in this thread. ``fatal_error`` is
        told why, when the engine fails again and again.
        """
        self._owner, self._publish, self._hopeless = node, publish, fatal_error
        # The timer has no part in simulated time.
        self._node = hidden_node(node, 'device')
        self._guard = self._node.create_guard_condition(self._on_guard)
        self._timer = self._node.create_timer(
            1.0, self._on_timer, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self._timer.cancel()
        self._calls: deque[Callable[[], None]] = deque()
        self._engine: Engine | None = None
        self._failures = 0
        self._spinner = ExecutorThread(self._node, name='device', context=node.context)
        self._spinner.start()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function in the device's thread, between two iterations."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._calls.append(run)
        self.wake()
        return future

    def adopt(self, service: Service) -> None:
        """Serve a service of the owner in the device's thread, between two iterations."""
        adopt(service, self._owner, self._node)
        self.wake()    # the executor looks at its services when it next waits

    def wake(self) -> None:
        """Have another iteration run soon; from any thread."""
        self._guard.trigger()

    def drive(self, engine: Engine | None) -> None:
        """Run iterations of this engine from now on, or of none; in the device's thread."""
        self._engine, self._failures = engine, 0
        self._timer.cancel()
        self.wake()

    def stop(self, timeout_s: float) -> bool:
        """End the thread; return False if it hangs in a call or an iteration."""
        # What wake() uses goes with the context: until then a timer may call it.
        return self._spinner.stop(timeout_s)

    def _on_timer(self) -> None:
        self._timer.cancel()    # it is to ring once
        self._on_guard()

    def _on_guard(self) -> None:
        while self._calls:
            self._calls.popleft()()
        if self._engine is not None:
            try:
                self._iterate(self._engine)
            except Exception as error:
                self._failed(error)

    def _iterate(self, engine: Engine) -> None:
        iteration = engine.step()
        self._failures = 0
        self._publish(iteration.events)
        if iteration.wake_at is None:
            self._timer.cancel()
        else:
            self._ring_in(iteration.wake_at - time.monotonic())

    def _ring_in(self, seconds: float) -> None:
        if seconds <= 0:
            self._guard.trigger()
        else:
            self._timer.timer_period_ns = int(seconds * 1e9) + 1
            self._timer.reset()

    def _failed(self, error: Exception) -> None:
        """Try again, in case only a part of the work is broken, but not for ever."""
        self._failures += 1
        self._owner.get_logger().error(f'iteration failed: {traceback.format_exc()}')
        if self._failures < MAX_FAILURES:
            self._ring_in(RETRY_S)
        else:
            self._engine = None
            self._hopeless(f'{MAX_FAILURES} iterations in a row failed, the last one with '
                           f'{type(error).__name__}: {error}')
