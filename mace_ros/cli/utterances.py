# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What a person says, one utterance after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
import threading


class Utterances:
    """
    Iterates over the utterances of a source.

    With ``ahead``, a thread reads them from the source as they come, and :meth:`waiting` says
    whether there is one that the iteration has not reached.
    """

    def __init__(self, source: Iterator[str], *, ahead: bool) -> None:
        """Read from ``source``; an exception that it raises is raised by the iteration."""
        self._source, self._ahead = source, ahead
        self._changed = threading.Condition()
        self._said: deque[str] = deque()
        self._error: Exception | None = None
        self._ended = False
        if ahead:
            # A daemon: a source that waits for the person must not keep the program alive.
            threading.Thread(target=self._read, name='utterances', daemon=True).start()

    def __iter__(self) -> Iterator[str]:
        """Yield each utterance."""
        if not self._ahead:
            yield from self._source
            return
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._said or self._ended)
                if not self._said:
                    break
                said = self._said.popleft()
            yield said
        if self._error is not None:
            raise self._error

    def waiting(self) -> bool:
        """Return whether the person has said something more."""
        return bool(self._said)

    def _read(self) -> None:
        try:
            for said in self._source:
                with self._changed:
                    self._said.append(said)
                    self._changed.notify_all()
        except Exception as error:
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()
