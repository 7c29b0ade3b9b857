# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is: those that wait, in an order in which a plan need not look at all of them."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heappop, heappush
import math
from typing import TypeAlias

from mace_ros.scheduling.request import Request

# A request that waited for so many of its TTFT objectives goes before every class of
# priority: whatever else arrives, it is served.
PATIENCE = 20

# Rank, latest start and number of a request without its next token, and whether it waits.
Place: TypeAlias = tuple[float, float, int, Request, bool]


class WaitingQueue:
    """
    Requests without KV blocks, by class of priority and then by deadline.

    Neither changes while they wait, so that the order is kept and not made for each plan.
    """

    def __init__(self, requests: Iterable[Request] = ()) -> None:
        """Begin with ``requests``."""
        self._requests: list[Request] = []
        self._longest = 0
        self._patient_until = math.inf
        for request in requests:
            self.add(request)

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """Iterate from the most urgent to the least."""
        return iter(self._requests)

    @property
    def longest(self) -> int:
        """No prompt of those that wait has more tokens, nor one with its output so far."""
        return self._longest

    def add(self, request: Request) -> None:
        """Let ``request`` wait."""
        if not self._requests:
            self._longest, self._patient_until = 0, math.inf
        insort(self._requests, request, key=_urgency)
        self._longest = max(self._longest, request.known_tokens)
        self._patient_until = min(self._patient_until, _patient_until(request))

    def remove(self, request: Request) -> None:
        """Let ``request`` wait no longer; ``ValueError`` if it did not."""
        self._requests.remove(request)

    def are_patient(self, now: float) -> bool:
        """Return whether nobody has waited for too long; see :func:`is_impatient`."""
        if now > self._patient_until:   # who was the first to run out of it may be gone
            self._patient_until = min(map(_patient_until, self._requests), default=math.inf)
        return now <= self._patient_until


class Queue:
    """
    Those whose prompt is to be computed, the most urgent first.

    Within a class of priority: least slack first, that is, by the latest time at which
    work may start, or had to. What is computed of a prompt gives it no slack, or all that came
    at once would be begun before one of them is done. Whoever ran out of patience goes first,
    in order of arrival. Who waits is looked at only when its turn may have come.
    """

    __slots__ = ('_heap', '_look_up', '_most_s', '_next', '_now', '_prefill_s', '_seen',
                 '_waiting', 'left')

    def __init__(self, started: Sequence[Request], waiting: WaitingQueue,
                 get_computed_blocks: Callable[[Request], object],
                 prefill_s: Callable[[int], float], now: float) -> None:
        """
        Begin with those whose prompt is ``started`` and all that wait.

        ``get_computed_blocks`` updates how many tokens a waiting request shares. ``prefill_s``
        is the time that so many tokens take; it never falls as tokens are added.
        """
        self._look_up, self._prefill_s, self._now = get_computed_blocks, prefill_s, now
        self._heap: list[Place] = []
        self._seen = 0
        self.left = len(started) + len(waiting)     # in it
        for request in started:
            self._push(request, request.prompt_tokens + request.output_tokens, waits=False)
        self._waiting = iter(waiting)
        self._next = next(self._waiting, None)
        # By how much the latest start of one that waits may be before its deadline.
        self._most_s = prefill_s(waiting.longest) if waiting.are_patient(now) else math.inf

    def places(self) -> list[Place]:
        """Return all that are left, in order."""
        while self._next is not None:
            self._pull(self._next)
        self._heap.sort()
        return self._heap

    def pop(self, *, admits: bool) -> Place | None:
        """Take out the most urgent one, of those that wait only if it ``admits``; None: no more."""
        heap = self._heap
        while admits and (request := self._next) is not None:
            if heap and self._most_s < math.inf and heap[0][:2] < (
                    -request.priority, request.deadline - self._most_s):
                break    # nor is any after it more urgent
            self._pull(request)
        while heap:
            place = heappop(heap)
            self.left -= 1
            if admits or not place[4]:
                return place
        return None

    def _pull(self, request: Request) -> None:
        self._look_up(request)
        self._push(request, request.prompt_tokens + request.output_tokens
                   - request.computed_tokens, waits=True)
        self._next = next(self._waiting, None)

    def _push(self, request: Request, tokens: int, *, waits: bool) -> None:
        self._seen = seen = self._seen + 1
        # is_impatient and Request.deadline, inlined: what a plan has to call is not in a
        # processor's cache after a pass.
        arrival, objective = request.arrival, request.ttft_slo
        if self._now > arrival + PATIENCE * objective:
            rank, due = -math.inf, arrival
        else:
            rank = -request.priority
            due = ((request.deadline if request.output_tokens else arrival + objective)
                   - self._prefill_s(tokens))
        heappush(self._heap, (rank, due, seen, request, waits))


def is_impatient(request: Request, now: float) -> bool:
    """Return whether a request is to be served whatever else arrives."""
    return now > _patient_until(request)


def _patient_until(request: Request) -> float:
    return request.arrival + PATIENCE * request.ttft_slo


def _urgency(request: Request) -> tuple[int, float]:
    return -request.priority, request.deadline
