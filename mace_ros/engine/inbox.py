# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Messages from other threads to the engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
import threading
from typing import TypeAlias

from mace_ros.api.events import Correction, Event, InvalidQuery, Query
from mace_ros.api.settings import Settings
from mace_ros.engine.embeddings import Embedding
from mace_ros.learning.acceptance import Accepted
from mace_ros.learning.rollback import RolledBack
from mace_ros.memory.adapter_slots import ServedVersion
from mace_ros.model.constraints import Constraint
from mace_ros.telemetry.trace import Record


@dataclass(frozen=True, slots=True)
class SubmitQuery:
    """Answer a query that arrived at ``arrival`` on the engine's clock, if its format is valid."""

    query: Query
    arrival: float
    constraint: Constraint | InvalidQuery | None = None


@dataclass(frozen=True, slots=True)
class AbortQuery:
    """End a query early."""

    query_id: str


@dataclass(frozen=True, slots=True)
class CorrectionWritten:
    """The journal has accepted a correction, or refused it with an exception."""

    correction: Correction
    outcome: Future[Accepted]


@dataclass(frozen=True, slots=True)
class AnswerWritten:
    """A write to the journal has failed (``error`` says why), or works again (it is empty)."""

    error: str
    lost: int = 1       # answers that the journal lacks if the write has failed


@dataclass(frozen=True, slots=True)
class AdapterRead:
    """The file of a version that queries wait for was read, or cannot be read."""

    version: ServedVersion


@dataclass(frozen=True, slots=True)
class ChangeSettings:
    """Put other settings into force."""

    settings: Settings


@dataclass(frozen=True, slots=True)
class RollBack:
    """Make an earlier version live; ``done`` receives the outcome."""

    profile: str
    version: int
    reason: str
    done: Future[RolledBack]


@dataclass(frozen=True, slots=True)
class BeginTrace:
    """Record the next iterations; ``done`` receives the records."""

    iterations: int
    seconds: float
    done: Future[list[Record]]


@dataclass(frozen=True, slots=True)
class EmbedTexts:
    """Compute the embeddings of some texts; ``done`` receives them."""

    texts: tuple[str, ...]
    done: Future[list[Embedding]]


@dataclass(frozen=True, slots=True)
class Publish:
    """Publish an event that was known when its message arrived, such as a refusal."""

    event: Event


Message: TypeAlias = (SubmitQuery | AbortQuery | CorrectionWritten | AnswerWritten | AdapterRead
                      | ChangeSettings | RollBack | BeginTrace | EmbedTexts | Publish)


class Inbox:
    """A queue of messages from any thread to the thread that owns the device."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """``wake`` is called after each message, on the sender's thread."""
        self.wake = wake
        self._messages: deque[Message] = deque()
        self._lock = threading.Lock()
        self._queries = 0

    def __bool__(self) -> bool:
        """Return whether a message waits."""
        return bool(self._messages)

    @property
    def queries(self) -> int:
        """Queries that wait in the inbox."""
        return self._queries

    def put(self, message: Message) -> None:
        """Append a message; from any thread."""
        with self._lock:
            self._messages.append(message)
            self._queries += isinstance(message, SubmitQuery)
        self.wake()

    def drain(self) -> Iterator[Message]:
        """Take the messages out in order, those that arrive meanwhile included."""
        while self._messages:
            with self._lock:
                message = self._messages.popleft()
                self._queries -= isinstance(message, SubmitQuery)
            yield message
