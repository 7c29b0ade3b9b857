# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""An object that lives in another process, and whose methods can be called from here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
import multiprocessing
from multiprocessing.connection import Connection
import os
import traceback
from typing import Any

# A fresh interpreter: a fork would share thread pools that are already running.
CONTEXT = multiprocessing.get_context('spawn')


class PeerFailed(RuntimeError):
    """The other process raised an exception or died; the message says which one."""


class Worker:
    """
    Makes an object in a new process and calls its methods there, one at a time.

    The clock of both processes is the same (``time.monotonic``).
    """

    def __init__(self, make: Callable[..., Any], **arguments: Any) -> None:
        """Begin to make it; :meth:`ready` waits for that."""
        self._connection, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(
            target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def ready(self) -> Worker:
        """Wait until the object is made; raises :class:`PeerFailed`."""
        self.result()
        return self

    def start(self, method: str, *arguments: Any) -> None:
        """Begin a call; :meth:`result` waits for it."""
        self._connection.send((method, arguments))

    def result(self) -> Any:
        """Return what the call that was begun returned; raises :class:`PeerFailed`."""
        try:
            failed, result = self._connection.recv()
        except EOFError as error:
            raise PeerFailed('the process died') from error
        if failed:
            raise PeerFailed(result)
        return result

    def call(self, method: str, *arguments: Any) -> Any:
        """Return what the method returns."""
        self.start(method, *arguments)
        return self.result()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def _serve(connection: Connection, make: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Be the other process."""
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'
    made: list[Any] = []
    if not _answer(connection, lambda: made.append(make(**arguments))):
        return
    while True:
        try:
            method, values = connection.recv()
        except EOFError:
            return
        _answer(connection, partial(getattr(made[0], method), *values))


def _answer(connection: Connection, call: Callable[[], Any]) -> bool:
    """Send what ``call`` returns, or how it failed; return whether it did not."""
    try:
        connection.send((False, call()))
        return True
    except Exception as error:
        connection.send((True, f'{type(error).__name__}: {error}\n{traceback.format_exc()}'))
        return False
