# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""An executor in a thread of its own, which neither exceptions nor signals end."""

from __future__ import annotations

import threading
import traceback

from rclpy.context import Context
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node


class ExecutorThread:
    """
    Runs a node's callbacks in a thread until :meth:`stop`.

    An exception in a callback is logged and the thread continues; rclpy's ``spin()`` would end.
    """

    def __init__(self, node: Node, *, name: str, context: Context | None = None) -> None:
        """Prepare a thread called ``name``; :meth:`start` starts it."""
        self._node = node
        self._executor = SingleThreadedExecutor(context=context)
        self._executor.add_node(node)
        self._running = True
        # A daemon: a callback that hangs in a driver must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> bool:
        """Finish the running callback and end the thread; return whether it ended in time."""
        if not self._thread.is_alive():
            return True
        # A task, since nothing else makes a waiting executor return without side effects.
        self._executor.create_task(self._end)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        self._executor.shutdown()
        return True

    def _end(self) -> None:
        self._running = False

    def _run(self) -> None:
        while self._running:
            try:
                self._executor.spin_once()
            except ExternalShutdownException:
                return
            except Exception:
                self._node.get_logger().error(
                    f'a callback failed: {traceback.format_exc()}', throttle_duration_sec=1.0)
