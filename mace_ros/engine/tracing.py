# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The trace that records iterations, from its request to its end."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from mace_ros.engine.inbox import BeginTrace
from mace_ros.scheduling.plan import State
from mace_ros.telemetry.observer import Observers
from mace_ros.telemetry.trace import Record, Trace


class Tracing:
    """Lets one trace at a time observe the iterations."""

    def __init__(self, observers: Observers, state: State, clock: Callable[[], float]) -> None:
        """``clock`` is the engine's."""
        self._observers, self._state, self._clock = observers, state, clock
        self._trace: Trace | None = None
        self._done: Future[list[Record]] = Future()     # of the last trace

    @property
    def ends_at(self) -> float | None:
        """When the trace ends at the latest, on the engine's clock; None without a trace."""
        return None if self._trace is None else self._trace.ends_at

    def begin(self, message: BeginTrace) -> None:
        """Record from now on."""
        self._trace = Trace(message.iterations, self._clock() + message.seconds, self._clock)
        self._done = message.done
        self._observers.add(self._trace)

    def end_if_complete(self) -> None:
        """End the trace once it has reached its number of iterations or its time."""
        if self._trace is not None and self._trace.complete:
            self.end()

    def end(self) -> None:
        """End the trace, if there is one: it hands over its records."""
        trace, self._trace = self._trace, None
        if trace is not None:
            self._observers.remove(trace)
            self._done.set_result(trace.finish(self._state.waiting))
