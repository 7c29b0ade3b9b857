# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Reports of each iteration, from the engine to a trace, a benchmark, or a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
import time

from mace_ros.api.events import Event
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.plan import Measurement, Plan
from mace_ros.scheduling.request import Request

_UNTIMED: AbstractContextManager[None] = nullcontext()


class IterationObserver:
    """
    Reports of one iteration, in the order of its phases, on the device's thread.

    All times are seconds on the engine's clock. Subclasses override the methods that they
    need; those of this class do nothing.
    """

    def phase(self, name: str, began: float, ended: float, values: Mapping[str, float]) -> None:
        """
        Report a phase that has ended.

        ``values`` has ``cpu_ms``, except for fine-tune segments: the thread's processor time,
        without preemption by other threads.

        Names: ``receive``, ``learn``, ``plan``, ``pass``, ``masks``, ``sample``, ``wait``,
        ``commit``, ``fine-tune begin``, ``fine-tune <kind>`` and, around all of them,
        ``iteration``.
        """

    def planned(self, plan: Plan, in_flight: int) -> None:
        """Report the plan, and how many requests the engine holds."""

    def committed(self, requests: Sequence[Request]) -> None:
        """Report the requests that received a token, before their events are published."""

    def measured(self, measurement: Measurement, cost: CostModel) -> None:
        """Report the measured times, before the cost model learns from them."""

    def finished(self, events: Sequence[Event]) -> None:
        """Report the events that the iteration returns."""


class Observers:
    """Passes each report on to every observer; costs next to nothing without one."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """``clock`` is the engine's."""
        self._clock = clock
        self._observers: tuple[IterationObserver, ...] = ()

    def add(self, observer: IterationObserver) -> None:
        """Report to ``observer`` from now on."""
        self._observers = (*self._observers, observer)

    def remove(self, observer: IterationObserver) -> None:
        """Report to ``observer`` no longer."""
        self._observers = tuple(o for o in self._observers if o is not observer)

    def timed(self, name: str, **values: float) -> AbstractContextManager[None]:
        """Report the body of the ``with`` statement as a phase."""
        return _Phase(self, self._clock, name, values) if self._observers else _UNTIMED

    def phase(self, name: str, began: float, ended: float, values: Mapping[str, float]) -> None:
        """See :meth:`IterationObserver.phase`."""
        for observer in self._observers:
            observer.phase(name, began, ended, values)

    def planned(self, plan: Plan, in_flight: int) -> None:
        """See :meth:`IterationObserver.planned`."""
        for observer in self._observers:
            observer.planned(plan, in_flight)

    def committed(self, requests: Sequence[Request]) -> None:
        """See :meth:`IterationObserver.committed`."""
        for observer in self._observers:
            observer.committed(requests)

    def measured(self, measurement: Measurement, cost: CostModel) -> None:
        """See :meth:`IterationObserver.measured`."""
        for observer in self._observers:
            observer.measured(measurement, cost)

    def finished(self, events: Sequence[Event]) -> None:
        """See :meth:`IterationObserver.finished`."""
        for observer in self._observers:
            observer.finished(events)


class _Phase:
    """Reports its body to observers; a generator would take longer than some phases."""

    __slots__ = ('_began', '_clock', '_cpu', '_name', '_observers', '_values')

    def __init__(self, observers: Observers, clock: Callable[[], float], name: str,
                 values: Mapping[str, float]) -> None:
        self._observers, self._clock = observers, clock
        self._name, self._values = name, values

    def __enter__(self) -> None:
        self._cpu = time.thread_time()
        self._began = self._clock()

    def __exit__(self, *_: object) -> None:
        ended = self._clock()
        self._observers.phase(self._name, self._began, ended, {
            **self._values, 'cpu_ms': (time.thread_time() - self._cpu) * 1e3})
