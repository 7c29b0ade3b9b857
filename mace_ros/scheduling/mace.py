# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The policy ``mace``: learning uses what no answer needs.

Our reading of MACE (arXiv 2510.03283), whose formulas are not public. Below saturation
a device has the same idle time however learning is woven into the answers, so weaving
gains nothing there and costs latency; at saturation weaving is all there is. Hence:

- Idle: segments, up to ``finetune.max_blocking_ms``; a query interrupts them.
- Somebody waits for a first token: no learning.
- All are decoding: learning may lengthen each answer by ``scheduler.max_slowdown``, saved
  up over its tokens, and only while every next token stays within its deadline. The SLO
  alone would not do: an objective of 100 ms on a device that needs 30 would triple the
  time of every answer.
- The oldest correction is older than ``slo.freshness_s``: learning takes
  ``finetune.min_share`` of the time whatever it costs, and the cost is counted.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from mace_ros.scheduling.batching import Batch
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.ledger import Ledger
from mace_ros.scheduling.pieces import (
    NOTHING,
    Piece,
    plan_of,
    riding_saves_s,
    segments_within,
    tokens_within,
)
from mace_ros.scheduling.plan import FinetuneWork, Plan, State
from mace_ros.scheduling.policies import Policy
from mace_ros.scheduling.request import Request
from mace_ros.settings import Settings


class _Room(NamedTuple):
    """How long learning may take beside the answers, in seconds."""

    slowdown_s: float   # by what each answer may be lengthened
    this_s: float       # until the first deadline: this pass must end before it
    next_s: float       # until the first deadline of the tokens after those


class Mace(Policy):
    """Learns in idle time, within a small share of the answers' time, and when overdue."""

    def __init__(self, settings: Settings, cost: CostModel, ledger: Ledger) -> None:
        """Begin without knowing any request."""
        super().__init__(settings, cost, ledger)
        # When each row was first seen decoding, and the ledger's learning time then.
        self._since: dict[Request, tuple[float, float]] = {}
        self._delayed: set[Request] = set()
        self._late = 0

    @property
    def late_for_learning(self) -> int:
        """Requests that overdue learning was predicted to make late."""
        return self._late

    def plan(self, state: State, now: float) -> Plan:
        """Return the next pass with the learning that there is room for."""
        batch = self._batcher.batch(state, now)
        work = state.finetune
        if work is None:
            return plan_of(batch)
        blocking_s = self._settings.finetune.max_blocking_ms / 1000.0
        if batch.is_empty:
            if not state.running:
                self._forget()
            return plan_of(batch, self._piece(work, batch, blocking_s))
        piece = NOTHING
        if not batch.waits:
            piece = self._beside(work, batch, self._room(state, batch, now), blocking_s, now)
        if piece is NOTHING and now - work.oldest_correction_at > self._settings.slo.freshness_s:
            claim_s = min(self._ledger.claim_s, blocking_s)
            if claim_s > 0.0:
                piece = self._piece(work, batch, claim_s)
                self._count_late(state, batch, piece, now)
        return plan_of(batch, piece)

    def _room(self, state: State, batch: Batch, now: float) -> _Room:
        gain = self._settings.scheduler.max_slowdown - 1.0
        learned = self._ledger.learning_s
        since = self._since
        slowdown = first = then = math.inf
        for row in state.running:
            began, learned_before = since.setdefault(row, (now, learned))
            delayed = learned - learned_before
            slowdown = min(slowdown, gain * (now - began - delayed + batch.seconds) - delayed)
            deadline = row.deadline
            first = min(first, deadline)
            then = min(then, deadline + row.tpot_slo)
        if len(since) > 2 * len(state.running) + 64:
            self._forget(state.running)
        return _Room(slowdown, first - now, then - now)

    def _beside(self, work: FinetuneWork, batch: Batch, room: _Room, blocking_s: float,
                now: float) -> Piece:
        """Return what may be learned in or after this pass, all of whose rows decode."""
        pass_s = self._cost.pass_s(*batch.shape, upper=True)
        most_s = min(room.slowdown_s, blocking_s)
        if most_s <= 0.0:
            return NOTHING
        # Of the KV cache a forward that rides takes blocks for each of its samples.
        if work.ridable_tokens and batch.free_tokens >= 2 * work.ridable_tokens:
            piece = tokens_within(
                work, self._cost, batch, min(room.this_s, pass_s + most_s),
                self._settings.scheduler.max_batch_tokens)
            if piece.tokens and piece.seconds <= riding_saves_s(work, self._cost, piece.tokens):
                return piece
        # Segments delay the token after the one of this pass.
        piece = segments_within(work, self._cost, min(most_s, room.next_s - 2.0 * pass_s))
        return piece if piece.segments else NOTHING

    def _count_late(self, state: State, batch: Batch, piece: Piece, now: float) -> None:
        """Count the requests that are in time without ``piece`` and late with it."""
        token_s = batch.seconds / batch.shape.tokens
        ends = now + batch.seconds
        for request in state.running + state.waiting:
            if request.first_token_at is None:
                spare = request.deadline - ends - token_s * request.remaining_tokens
            else:
                spare = request.deadline + request.tpot_slo - ends - batch.seconds
            if 0.0 <= spare < piece.seconds and request not in self._delayed:
                self._delayed.add(request)
                self._late += 1
        if len(self._delayed) > 2 * len(state.running) + 64:
            self._forget(state.running + state.waiting)

    def _forget(self, but: list[Request] | None = None) -> None:
        """Drop what is kept of requests other than these."""
        kept = set(but or ())
        self._since = {r: since for r, since in self._since.items() if r in kept}
        self._delayed &= kept
