# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Handles of the queries and corrections that a client has sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
import math
import threading
import time

from mace_ros.msg import CorrectionStatus, Response, ResponseChunk

FINAL_STATES = (CorrectionStatus.LEARNED, CorrectionStatus.SUPERSEDED,
                CorrectionStatus.REJECTED, CorrectionStatus.FAILED, CorrectionStatus.RECORDED)
UNTIL_POLL_S = 0.02


class Handle:
    """What was sent under ``id``; ``lost`` says why nothing will arrive, if the node has ended."""

    def __init__(self, sent_id: str, changed: threading.Condition,
                 watch: Callable[[], None] | None) -> None:
        """``watch`` is called in the client's thread after each change."""
        self.id, self.lost = sent_id, ''
        self.sent_at = time.monotonic()
        self._changed, self._watch = changed, watch

    def notify(self) -> None:
        """Wake all that wait for a change; the condition is held."""
        self._changed.notify_all()
        if self._watch is not None:
            self._watch()


class AnswerHandle(Handle):
    """
    A query that was sent; iterate over it for the text of its answer as it arrives.

    ``chunks`` and ``response`` are the messages received so far. ``first_text_at`` is
    in seconds of ``time.monotonic()``, as ``sent_at``.
    """

    def __init__(self, query_id: str, changed: threading.Condition,
                 cancel: Callable[[str], None], watch: Callable[[], None] | None = None) -> None:
        """``watch`` is called in the client's thread after each change."""
        super().__init__(query_id, changed, watch)
        self.first_text_at: float | None = None
        self.chunks: list[ResponseChunk] = []
        self.response: Response | None = None
        self._cancel = cancel

    def __iter__(self) -> Iterator[str]:
        return self.stream()

    def stream(self, timeout_s: float | None = None, *,
               until: Callable[[], bool] | None = None) -> Iterator[str]:
        """
        Yield pieces of the text as they arrive.

        Stops early once ``until`` returns True, which is asked about 50 times a second; the query
        is not cancelled by that. Raises TimeoutError if no piece arrives for ``timeout_s``, and
        ConnectionError if the node has ended (see :meth:`result`).
        """
        yielded = ''
        while True:
            with self._changed:
                if not self._wait_unless(until, partial(self._has_more_than, yielded), timeout_s):
                    return
                complete, text = self.is_complete(), self.text
            if text != yielded:
                yield text[len(yielded):]
                yielded = text
            if complete:
                return

    @property
    def text(self) -> str:
        """The text received so far, of the first answer if ``n`` is above 1."""
        # The response is on another topic and may arrive before the last chunks.
        if self.response is not None:
            return str(self.response.text)
        return ''.join(chunk.text for chunk in self.chunks if chunk.choice == 0)

    def is_complete(self) -> bool:
        """Return whether the response has arrived."""
        return self.response is not None

    def result(self, timeout_s: float | None = None) -> Response:
        """
        Wait for the response and return it.

        Raises TimeoutError after ``timeout_s``, and ConnectionError if the node has ended. A
        node that ends announces it; one that was killed is noticed by the middleware after
        about 20 s, or when it is started again.
        """
        with self._changed:
            self._wait(self.is_complete, timeout_s)
        return self.response

    def cancel(self) -> None:
        """Cancel the query; its response will say CANCELLED."""
        self._cancel(self.id)

    def _wait_unless(self, until: Callable[[], bool] | None, condition: Callable[[], bool],
                     timeout_s: float | None) -> bool:
        """Wait for the condition; return False as soon as ``until`` returns True."""
        if until is None:
            self._wait(condition, timeout_s)
            return True
        end = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not until():
            if self._changed.wait_for(lambda: condition() or self.lost, UNTIL_POLL_S) or (
                    time.monotonic() > end):
                self._wait(condition, 0.0)
                return True
        return False

    def _has_more_than(self, known: str) -> bool:
        return self.is_complete() or self.text != known

    def _wait(self, condition: Callable[[], bool], timeout_s: float | None) -> None:
        if not self._changed.wait_for(lambda: condition() or self.lost, timeout_s):
            raise TimeoutError(f'query {self.id}: nothing arrived for {timeout_s} s')
        if not condition():
            raise ConnectionError(f'query {self.id}: {self.lost}')


class CorrectionHandle(Handle):
    """
    A correction that was sent; ``statuses`` are those received so far.

    If it is lost before the first one, the node may not have received it.
    """

    def __init__(self, correction_id: str, changed: threading.Condition,
                 watch: Callable[[], None] | None = None) -> None:
        """``watch`` is called in the client's thread after each change."""
        super().__init__(correction_id, changed, watch)
        self.statuses: list[CorrectionStatus] = []

    @property
    def status(self) -> CorrectionStatus | None:
        """The newest status, None before the first one."""
        return self.statuses[-1] if self.statuses else None

    def is_final(self) -> bool:
        """Return whether no other status will follow."""
        return bool(self.statuses) and self.statuses[-1].state in FINAL_STATES

    def wait(self, state: int = CorrectionStatus.LEARNED,
             timeout_s: float | None = None) -> CorrectionStatus:
        """
        Wait for a state, or for a final one, and return the status.

        Raises TimeoutError after ``timeout_s``, and ConnectionError if the node has ended before
        its first status. An ACCEPTED correction is on disk: a node that is started again
        continues with it, and so does this wait.
        """
        def reached() -> list[CorrectionStatus]:
            return [s for s in self.statuses if s.state == state or s.state in FINAL_STATES]

        with self._changed:
            self._wait(reached, timeout_s, 'state not reached after')
            return reached()[0]

    def follow(self, timeout_s: float | None = None) -> Iterator[CorrectionStatus]:
        """Yield each status up to the final one; raise as :meth:`wait_for_more`."""
        known = 0
        while not (known and self.statuses[known - 1].state in FINAL_STATES):
            self.wait_for_more(known, timeout_s)
            yield self.statuses[known]
            known += 1

    def wait_for_more(self, known: int, timeout_s: float | None = None) -> None:
        """Wait until there are more than ``known`` statuses; raise as :meth:`wait`."""
        with self._changed:
            self._wait(lambda: len(self.statuses) > known, timeout_s, 'no status for')

    def _wait(self, condition: Callable[[], object], timeout_s: float | None,
              problem: str) -> None:
        def lost() -> bool:
            return bool(self.lost) and not self.statuses

        if not self._changed.wait_for(lambda: condition() or lost(), timeout_s):
            raise TimeoutError(f'correction {self.id}: {problem} {timeout_s} s')
        if lost():
            raise ConnectionError(f'correction {self.id}: {self.lost}')
