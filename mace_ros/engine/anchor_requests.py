# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What the base model is asked before anything is learned, so that its answers can be kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
import uuid

from mace_ros.api.events import Query
from mace_ros.engine.active_request import BACKGROUND_PRIORITY, BACKGROUND_SLO_S
from mace_ros.learning.anchors import ANCHOR_TOKENS, ANCHORS
from mace_ros.scheduling.plan import State

AT_ONCE = 8     # questions, while nobody else asks anything ...
BESIDE = 4      # ... and beside answers, which each of them slows down a little
ENOUGH = ANCHOR_TOKENS // 3     # tokens of an answer that was broken off


class AnchorRequests:
    """
    Which of :data:`ANCHORS` are asked, and which are answered.

    No query may wait for them: they are asked while nobody waits, and whoever comes sends all but
    one away, to be asked again unless enough of the answer was there. If somebody always waits,
    they are asked one by one once a correction has waited for too long.
    """

    def __init__(self, known: Mapping[tuple[int, ...], list[int]],
                 record: Callable[[Sequence[int], Sequence[int]], object]) -> None:
        """Begin with what is ``known`` by its prompt, of earlier starts; ``record`` the others."""
        self._known, self._record = known, record
        self._asked: dict[str, int] = {}    # by the ids of the queries
        self._answers: dict[int, tuple[list[int], list[int]]] = {}

    def next(self, state: State, *, overdue: bool) -> list[Query]:
        """Return what to ask now: nothing before all that was asked has ended."""
        if self._asked or (state.waiting and not overdue):
            return []
        count = 1 if overdue and state.waiting else BESIDE if state.running else AT_ONCE
        left = [i for i in range(len(ANCHORS)) if i not in self._answers]
        queries = []
        for i in left[:count]:
            query = Query(ANCHORS[i], id=str(uuid.uuid4()), max_tokens=ANCHOR_TOKENS,
                          temperature=0.0)
            if not overdue:
                query = replace(
                    query, priority=BACKGROUND_PRIORITY, ttft_slo_ms=BACKGROUND_SLO_S * 1e3,
                    tpot_slo_ms=BACKGROUND_SLO_S * 1e3)
            self._asked[query.id] = i
            queries.append(query)
        return queries

    @property
    def in_the_way(self) -> list[str]:
        """The ids of those that a query which comes in sends away."""
        return list(self._asked)[1:]

    def knows(self, query_id: str, prompt: list[int]) -> bool:
        """Return whether this one need not be asked again."""
        output = self._known.get(tuple(prompt))
        if output is None:
            return False
        self._answers[self._asked.pop(query_id)] = (prompt, output)
        return True

    def ended(self, query_id: str, prompt: list[int], output: list[int], *,
              complete: bool) -> None:
        """Note an answer, or so much of it as there was when its query was sent away."""
        index = self._asked.pop(query_id)
        if complete or len(output) >= ENOUGH:
            self._answers[index] = (prompt, output)
            self._record(prompt, output)

    @property
    def left(self) -> int:
        """How many questions are not answered yet."""
        return len(ANCHORS) - len(self._answers)

    @property
    def all(self) -> list[tuple[list[int], list[int]]] | None:
        """The answers as (prompt, output) ids, in the order of the questions; None until then."""
        if self.left:
            return None
        return [self._answers[i] for i in range(len(ANCHORS))]
