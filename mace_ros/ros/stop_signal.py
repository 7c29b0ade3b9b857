# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM as something to wait for."""

from __future__ import annotations

import signal
import socket

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """
    Holds the main thread until a signal comes, or :meth:`send` is called.

    rclpy's own handlers would shut the context down before CANCELLED can be published, and
    Python's would raise KeyboardInterrupt anywhere. From now on these signals do neither.
    To be made in the main thread.
    """

    def __init__(self) -> None:
        """Take over the signals."""
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        for number in SIGNALS:
            # Python writes the number of a signal with a handler into the wakeup socket.
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)

    def send(self) -> None:
        """End the wait; from any thread."""
        self._sender.send(b'\0')

    def wait(self) -> None:
        """Wait, and from then on ignore the signals: a second Ctrl-C must not cut the end short."""
        self._receiver.recv(1)
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
