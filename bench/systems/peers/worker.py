# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""An object in another process whose methods can be called from this one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
import multiprocessing
from multiprocessing.connection import Connection
import os
import traceback
from typing import Any

# A new interpreter: a fork would inherit thread pools that are running.
CONTEXT = multiprocessing.get_context('spawn')


class PeerFailed(RuntimeError):
    """The other process raised an exception, which is in the message, or died."""


class Worker:
    """
    Creates an object in a new process and calls its methods there, one at a time.

    Both processes share the clock ``time.monotonic``.
    """

    def __init__(self, make: Callable[..., Any], **arguments: Any) -> None:
        """Start to create the object by ``make(**arguments)``; :meth:`ready` waits for it."""
        self._connection, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(
            target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def ready(self) -> Worker:
        """Wait until the object exists; raises :class:`PeerFailed`."""
        self.result()
        return self

    def start(self, method: str, *arguments: Any) -> None:
        """Start a call; :meth:`result` waits for it."""
        self._connection.send((method, arguments))

    def result(self) -> Any:
        """Return the result of the started call; raises :class:`PeerFailed`."""
        try:
            failed, result = self._connection.recv()
        except EOFError as error:
            raise PeerFailed('the process died') from error
        if failed:
            raise PeerFailed(result)
        return result

    def call(self, method: str, *arguments: Any) -> Any:
        """Call the method; raises :class:`PeerFailed`."""
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
    """Run the other process: create the object, then serve calls until the pipe closes."""
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'
    created: list[Any] = []
    if not _reply(connection, lambda: created.append(make(**arguments))):
        return
    while True:
        try:
            method, values = connection.recv()
        except EOFError:
            return
        _reply(connection, partial(getattr(created[0], method), *values))


def _reply(connection: Connection, call: Callable[[], Any]) -> bool:
    """Send the result of ``call`` or its exception; return whether it succeeded."""
    try:
        connection.send((False, call()))
        return True
    except Exception as error:
        connection.send((True, f'{type(error).__name__}: {error}\n{traceback.format_exc()}'))
        return False
