# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Requests that wait for admission, kept in order of urgency."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
import math

from mace_ros.scheduling.request import Request

# A request that has waited for this many of its TTFT objectives goes before every priority
# class, so that no load can starve it.
PATIENCE = 20


class WaitingQueue:
    """
    Requests without KV blocks, by priority and then by deadline.

    Neither key changes while a request waits, so the queue is sorted on insertion and no plan
    has to sort it.
    """

    def __init__(self, requests: Iterable[Request] = ()) -> None:
        """Start with ``requests``."""
        self._requests: list[Request] = []
        self._longest = 0
        self._patient_until = math.inf
        for request in requests:
            self.add(request)

    def __len__(self) -> int:
        """Return the number of waiting requests."""
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """Iterate from the most urgent to the least urgent request."""
        return iter(self._requests)

    @property
    def longest(self) -> int:
        """Upper bound of the known tokens of any waiting request."""
        return self._longest

    def add(self, request: Request) -> None:
        """Insert ``request``."""
        if not self._requests:
            self._longest, self._patient_until = 0, math.inf
        insort(self._requests, request, key=_urgency)
        self._longest = max(self._longest, request.known_tokens)
        self._patient_until = min(self._patient_until, _patient_until(request))

    def remove(self, request: Request) -> None:
        """Remove ``request``; ``ValueError`` if it does not wait."""
        self._requests.remove(request)

    def are_patient(self, now: float) -> bool:
        """Return whether no request has run out of patience; see :func:`is_impatient`."""
        if now > self._patient_until:   # the request that set this bound may have left
            self._patient_until = min(map(_patient_until, self._requests), default=math.inf)
        return now <= self._patient_until


def is_impatient(request: Request, now: float) -> bool:
    """Return whether a request goes before every priority class."""
    return now > _patient_until(request)


def _patient_until(request: Request) -> float:
    return request.arrival + PATIENCE * request.ttft_slo


def _urgency(request: Request) -> tuple[int, float]:
    return -request.priority, request.deadline
