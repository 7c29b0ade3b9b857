# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The order in which one plan computes prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
import math
from typing import TypeAlias

from mace_ros.scheduling.plan import CacheView
from mace_ros.scheduling.request import Request
from mace_ros.scheduling.waiting_queue import PATIENCE, WaitingQueue

# Rank, latest start, insertion number, request, and whether the request waits for admission.
# A tuple: the heap compares candidates far more often than the batcher reads one.
PrefillCandidate: TypeAlias = tuple[float, float, int, Request, bool]


class PrefillQueue:
    """
    Requests with tokens to prefill, the most urgent first.

    Order: requests out of patience by arrival, then by priority, then by least slack, that is,
    by the latest time at which prefilling must start to meet the deadline. Tokens that are
    already computed add no slack to a running request; otherwise all prompts that arrive
    together would be started before the first one is finished.

    The waiting queue is consumed lazily: the prefix cache is only consulted for requests whose
    turn may have come.
    """

    __slots__ = ('_cache', '_heap', '_max_prefill_s', '_next_waiting', '_now', '_prefill_s',
                 '_pushed', '_waiting', 'remaining')

    def __init__(self, started: Sequence[Request], waiting: WaitingQueue, cache: CacheView,
                 prefill_s: Callable[[int], float], now: float) -> None:
        """
        Start with the running requests that still prefill, and all waiting ones.

        ``prefill_s`` predicts the seconds that prefilling a number of tokens takes; it must not
        decrease as tokens are added.
        """
        self._cache, self._prefill_s, self._now = cache, prefill_s, now
        self._heap: list[PrefillCandidate] = []
        self._pushed = 0
        self.remaining = len(started) + len(waiting)
        for request in started:
            self._push(request, waits=False)
        self._waiting = iter(waiting)
        self._next_waiting = next(self._waiting, None)
        # The latest start of a waiting request is at most this long before its deadline.
        self._max_prefill_s = (
            prefill_s(waiting.longest) if waiting.are_patient(now) else math.inf)

    def candidates(self) -> list[PrefillCandidate]:
        """Return all remaining candidates in order."""
        self._pull(all_waiting=True)
        self._heap.sort()
        return self._heap

    def pop(self, *, admit: bool) -> PrefillCandidate | None:
        """Remove and return the most urgent candidate; waiting ones only if ``admit``."""
        heap = self._heap
        if admit and self._next_waiting is not None:
            self._pull(all_waiting=self._max_prefill_s == math.inf)
        while heap:
            candidate = heappop(heap)
            self.remaining -= 1
            if admit or not candidate[4]:
                return candidate
        return None

    def _pull(self, *, all_waiting: bool) -> None:
        """Move the waiting requests that may be the most urgent, or all, into the heap."""
        heap, look_up, longest_s = self._heap, self._cache.get_computed_blocks, self._max_prefill_s
        request = self._next_waiting
        while request is not None:
            # Request.deadline is inlined, here and below: many may wait.
            deadline = (request.deadline if request.output_tokens
                        else request.arrival + request.ttft_slo)
            if heap and not all_waiting and heap[0] < (-request.priority, deadline - longest_s):
                break    # neither this request nor any after it is more urgent
            look_up(request)
            self._push(request, waits=True)
            request = next(self._waiting, None)
        self._next_waiting = request

    def _push(self, request: Request, *, waits: bool) -> None:
        # is_impatient() and Request.deadline are inlined: after a pass, a called function is
        # not in the processor's cache.
        arrival, objective, output = request.arrival, request.ttft_slo, request.output_tokens
        if self._now > arrival + PATIENCE * objective:
            rank, latest_start = -math.inf, arrival
        else:
            rank, tokens = -request.priority, request.prompt_tokens + output
            if waits:
                tokens -= request.computed_tokens
            latest_start = ((request.deadline if output else arrival + objective)
                            - self._prefill_s(tokens))
        self._pushed = pushed = self._pushed + 1
        heappush(self._heap, (rank, latest_start, pushed, request, waits))
