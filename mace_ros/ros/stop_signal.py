# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM as an event that the main thread waits for."""

from __future__ import annotations

import signal
import socket

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """
    Blocks the main thread until a signal arrives or :meth:`send` is called.

    It replaces the handlers of rclpy, which would shut the context down before CANCELLED can be
    published, and those of Python, which would raise KeyboardInterrupt anywhere. Create it in
    the main thread.
    """

    def __init__(self) -> None:
        """Take over the signals."""
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        for number in SIGNALS:
            # Python writes the number of a handled signal to the wakeup socket.
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)

    def send(self) -> None:
        """End the wait; from any thread."""
        self._sender.send(b'\0')

    def wait(self) -> None:
        """Wait, then ignore the signals: a second Ctrl-C must not interrupt the shutdown."""
        self._receiver.recv(1)
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
