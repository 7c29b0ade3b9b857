# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Questions to the base model before anything is learned, so that its answers can be kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
import uuid

from mace_ros.api.events import Query
from mace_ros.engine.active_request import BACKGROUND_PRIORITY, BACKGROUND_SLO_S
from mace_ros.learning.anchors import ANCHOR_TOKENS, ANCHORS
from mace_ros.scheduling.plan import State
from mace_ros.store.journal_writer import JournalWriter

IDLE_BATCH = 8     # questions at once while no user request is active
BUSY_BATCH = 4     # questions at once beside user requests, which each one slows down a little
MIN_TOKENS = ANCHOR_TOKENS // 3     # an aborted answer of this length is kept


class AnchorRequests:
    """
    Tracks which of :data:`ANCHORS` are being asked, and their answers.

    Queries never wait for anchors: anchors are asked while no query waits, and an arriving
    query aborts all but one of them. An aborted anchor is asked again unless its answer was
    long enough. When queries always wait, anchors are asked one by one once a correction is
    overdue.
    """

    def __init__(self, known: Mapping[tuple[int, ...], list[int]],
                 record: Callable[[Sequence[int], Sequence[int]], object]) -> None:
        """
        Begin with the answers of earlier starts.

        ``known`` maps prompt ids to output ids; ``record(prompt, output)`` saves a new answer.
        """
        self._known, self._record = known, record
        self._asked: dict[str, int] = {}    # query id -> index of the anchor
        self._answers: dict[int, tuple[list[int], list[int]]] = {}

    def next(self, state: State, *, overdue: bool) -> list[Query]:
        """
        Return the queries to ask now: none before those asked earlier have ended.

        If a correction is ``overdue``, they are served like a user's, and one is asked even while
        queries wait.
        """
        if self._asked or (state.waiting and not overdue):
            return []
        count = 1 if overdue and state.waiting else BUSY_BATCH if state.running else IDLE_BATCH
        unanswered = [i for i in range(len(ANCHORS)) if i not in self._answers]
        queries = []
        for i in unanswered[:count]:
            query = Query(ANCHORS[i], id=str(uuid.uuid4()), max_tokens=ANCHOR_TOKENS,
                          temperature=0.0, repetition_penalty=1.0)
            if not overdue:
                query = replace(
                    query, priority=BACKGROUND_PRIORITY, ttft_slo_ms=BACKGROUND_SLO_S * 1e3,
                    tpot_slo_ms=BACKGROUND_SLO_S * 1e3)
            self._asked[query.id] = i
            queries.append(query)
        return queries

    @property
    def abortable(self) -> list[str]:
        """The query ids that an arriving query aborts."""
        return list(self._asked)[1:]

    def answer_known(self, query_id: str, prompt: list[int]) -> bool:
        """Take the answer to a query from an earlier start; return whether there is one."""
        output = self._known.get(tuple(prompt))
        if output is None:
            return False
        self._answers[self._asked.pop(query_id)] = (prompt, output)
        return True

    def ended(self, query_id: str, prompt: list[int], output: list[int], *,
              complete: bool) -> None:
        """Keep an answer, or an aborted one if it is long enough."""
        index = self._asked.pop(query_id)
        if complete or len(output) >= MIN_TOKENS:
            self._answers[index] = (prompt, output)
            self._record(prompt, output)

    @property
    def remaining(self) -> int:
        """Number of anchors without an answer."""
        return len(ANCHORS) - len(self._answers)

    @property
    def answers(self) -> list[tuple[list[int], list[int]]] | None:
        """The answers as (prompt ids, output ids) in the order of the anchors; None until all."""
        if self.remaining:
            return None
        return [self._answers[i] for i in range(len(ANCHORS))]


def recorded_anchors(journal: JournalWriter, model: str) -> AnchorRequests:
    """
    Return the anchors with the answers that the journal holds for a base model. Blocks.

    ``model`` is the digest of its weights; new answers are recorded under it.
    """
    return AnchorRequests(
        journal.submit(lambda j: j.base_answers(model)).result(),
        record=lambda prompt, output: journal.submit(
            lambda j: j.record_base_answer(model, prompt, output)))
