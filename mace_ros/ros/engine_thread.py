# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The thread that owns the engine and the device.

Its executor has a guard condition whose callback runs one iteration of the engine. The callback
triggers the condition again while there is work, and an idle engine costs nothing. ROS is served
by another executor, since rclpy takes one message of a subscription each time it spins: behind
iterations of 80 ms, two thirds of 200 messages in one second were lost.
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
from mace_ros.ros.helper_node import helper_node, move_service

if TYPE_CHECKING:
    from mace_ros.engine.engine import Engine

T = TypeVar('T')

MAX_FAILED_ITERATIONS = 3        # in a row
RETRY_S = 0.1


class EngineThread:
    """
    Holds the engine, runs its iterations, and runs other functions between them.

    :meth:`load`, :meth:`run`, :meth:`idle` and :meth:`unload` are for functions in this thread
    (see :meth:`call`); everything else is safe from any thread.
    """

    def __init__(self, node: Node, *, publish: Callable[[list[Event]], None],
                 on_failure: Callable[[str], None]) -> None:
        """
        Start the thread.

        ``publish`` gets the events of each iteration, and ``on_failure`` a reason if the engine
        fails repeatedly; both are called in this thread.
        """
        self._owner, self._publish, self._on_failure = node, publish, on_failure
        self._node = helper_node(node, 'device')
        self._guard = self._node.create_guard_condition(self._on_guard)
        # A steady clock: simulated time must not affect iterations.
        self._timer = self._node.create_timer(
            1.0, self._on_timer, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self._timer.cancel()
        self._calls: deque[Callable[[], None]] = deque()
        self._engine: Engine | None = None
        self._running = False
        self._failures = 0
        self._executor = ExecutorThread(self._node, name='device', context=node.context)
        self._executor.start()

    @property
    def engine(self) -> Engine | None:
        """The loaded engine, running or idle; None while the node is unconfigured."""
        return self._engine

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function in this thread, between two iterations."""
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

    def serve(self, service: Service) -> None:
        """Serve a service of the node in this thread, between two iterations."""
        move_service(service, self._owner, self._node)
        self.wake()    # the executor collects its services before it waits again

    def wake(self) -> None:
        """Schedule an iteration."""
        self._guard.trigger()

    def load(self, engine: Engine) -> None:
        """Hold an engine, idle until :meth:`run`."""
        self._engine = engine

    def run(self) -> None:
        """Run iterations of the loaded engine from now on."""
        self._running, self._failures = True, 0
        self.wake()

    def idle(self) -> None:
        """Run no more iterations; the engine stays loaded."""
        self._running = False
        self._timer.cancel()

    def unload(self) -> Engine | None:
        """Run no more iterations; return the engine and drop the reference to it."""
        self.idle()
        engine, self._engine = self._engine, None
        return engine

    def stop(self, timeout_s: float) -> bool:
        """End the thread; return False if it hangs in a call or an iteration."""
        # The guard condition is destroyed with the context: until then timers may call wake().
        return self._executor.stop(timeout_s)

    def _on_timer(self) -> None:
        self._timer.cancel()    # one shot
        self._on_guard()

    def _on_guard(self) -> None:
        while self._calls:
            self._calls.popleft()()
        if self._running and self._engine is not None:
            try:
                self._iterate(self._engine)
            except Exception as error:
                self._iteration_failed(error)

    def _iterate(self, engine: Engine) -> None:
        iteration = engine.step()
        self._failures = 0
        self._publish(iteration.events)
        if iteration.wake_at is None:
            self._timer.cancel()
        else:
            self._wake_in(iteration.wake_at - time.monotonic())

    def _wake_in(self, seconds: float) -> None:
        if seconds <= 0:
            self._guard.trigger()
        else:
            self._timer.timer_period_ns = int(seconds * 1e9) + 1
            self._timer.reset()

    def _iteration_failed(self, error: Exception) -> None:
        """Retry a few times, since the failure may concern only a part of the work."""
        self._failures += 1
        self._owner.get_logger().error(f'iteration failed: {traceback.format_exc()}')
        if self._failures < MAX_FAILED_ITERATIONS:
            self._wake_in(RETRY_S)
        else:
            self.idle()
            self._on_failure(f'{MAX_FAILED_ITERATIONS} iterations in a row failed, the last one '
                             f'with {type(error).__name__}: {error}')
