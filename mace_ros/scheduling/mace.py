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

from collections.abc import Iterable
from itertools import chain
import math
from weakref import ref

from mace_ros.api.settings import Settings
from mace_ros.scheduling.batching import Batch
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.learning_slice import (
    EMPTY_SLICE,
    LearningSlice,
    piggyback_saves_s,
    plan_of,
    segments_within,
    tokens_within,
)
from mace_ros.scheduling.ledger import Ledger
from mace_ros.scheduling.plan import FinetuneWork, Plan, State
from mace_ros.scheduling.policies import Policy
from mace_ros.scheduling.request import Request


class Mace(Policy):
    """Learns in idle time, within a small share of the answers' time, and when overdue."""

    def __init__(self, settings: Settings, cost: CostModel, ledger: Ledger) -> None:
        """Begin without knowing any request."""
        super().__init__(settings, cost, ledger)
        # What each row had earned when it was first seen decoding (see _slowdown_s).
        self._earned: dict[Request, float] = {}
        # A step, its tokens that may ride, and what each of them saves. The step is not held:
        # hundreds of megabytes would stay until another one may ride.
        self._saving: tuple[ref[FinetuneWork] | None, int, float] = (None, 0, 0.0)
        self._delayed: set[Request] = set()
        self._late = 0

    @property
    def late_for_learning(self) -> int:
        """Requests that overdue learning was predicted to make late."""
        return self._late

    def update(self, settings: Settings) -> None:
        """Put other settings in force."""
        if settings.scheduler.max_slowdown != self._settings.scheduler.max_slowdown:
            self._earned.clear()   # by another rate: begin again
        super().update(settings)

    def plan(self, state: State, now: float) -> Plan:
        """Return the next pass with the learning that there is room for."""
        batch = self._batcher.batch(state, now)
        work = state.finetune
        if work is None:
            return plan_of(batch)
        blocking_s = self._settings.finetune.max_blocking_ms / 1000.0
        if batch.is_empty:
            if not state.running and (self._earned or self._delayed):
                self._forget()
            return plan_of(batch, self._piece(work, batch, blocking_s))
        piece = EMPTY_SLICE
        if not batch.waits:
            most_s = min(self._slowdown_s(batch, now), blocking_s)
            if most_s > 0.0:
                piece = self._beside(work, batch, most_s, now)
        if piece is EMPTY_SLICE and self.is_overdue(work.oldest_correction_at, now):
            claim_s = min(self._ledger.claim_s, blocking_s)
            if claim_s > 0.0:
                piece = self._piece(work, batch, claim_s)
                self._count_late(state, batch, piece, now)
        return plan_of(batch, piece)

    def is_overdue(self, since: float, now: float) -> bool:
        """Return whether learning may claim its minimum share for what waits since then."""
        return super().is_overdue(since, now) and self._ledger.may_claim

    def quiet_until(self, state: State, now: float) -> float:
        """Return when learning is overdue, if somebody waits."""
        work = state.finetune
        if work is None or not state.waiting:
            return now
        return max(work.oldest_correction_at + self._settings.slo.freshness_s,
                   self._ledger.claims_at)

    def _slowdown_s(self, batch: Batch, now: float) -> float:
        """
        Return by how much this iteration may still lengthen each answer, all of which decode.

        An answer that has taken t seconds, d of them for learning, may be lengthened by
        ``gain * (t - d) - d`` more. Time and learning being the same for all, that is
        the difference of what is earned now and what was earned when it began.
        """
        gain = self._settings.scheduler.max_slowdown - 1.0
        earned = gain * now - (1.0 + gain) * self._ledger.learning_s
        since = self._earned
        latest = -math.inf
        for row in batch.decode:
            began = since.get(row)
            if began is None:
                began = since[row] = earned
            if began > latest:
                latest = began
        if len(since) > 2 * len(batch.decode) + 64:
            self._forget(batch.decode)
        return earned + gain * batch.seconds - latest

    def _beside(self, work: FinetuneWork, batch: Batch, most_s: float, now: float) -> LearningSlice:
        """Return what may be learned within ``most_s`` in or after a pass of decode rows."""
        pass_s = self._cost.pass_s(*batch.shape, upper=True)
        ridable = work.piggyback_tokens
        # Of the KV cache a forward that rides takes blocks for each of its samples.
        if ridable and batch.free_tokens >= 2 * ridable:
            step, tokens, saving_s = self._saving
            if step is None or step() is not work or tokens != ridable:
                saving_s = piggyback_saves_s(work, self._cost)
                self._saving = (ref(work), ridable, saving_s)
            if saving_s > 0.0:
                piece = tokens_within(
                    work, self._cost, batch, min(batch.due - now, pass_s + most_s),
                    self._settings.scheduler.max_batch_tokens)
                if piece.tokens and piece.seconds <= saving_s * piece.tokens:
                    return piece
        # Segments delay the token after the one of this pass.
        piece = segments_within(
            work, self._cost, min(most_s, batch.next_due - now - 2.0 * pass_s))
        return piece if piece.segments else EMPTY_SLICE

    def _count_late(self, state: State, batch: Batch, piece: LearningSlice, now: float) -> None:
        """Count the requests that are in time without ``piece`` and late with it."""
        token_s = batch.seconds / batch.shape.tokens
        ends = now + batch.seconds
        for request in chain(state.running, state.waiting):
            if request.first_token_at is None:
                spare = request.deadline - ends - token_s * request.remaining_tokens
            else:
                # At its last token: who is behind now may catch up until then.
                left = request.max_tokens - request.output_tokens - 1
                spare = request.deadline - ends + left * (request.tpot_slo - batch.seconds)
            if 0.0 <= spare < piece.seconds and request not in self._delayed:
                self._delayed.add(request)
                self._late += 1
        if len(self._delayed) > 2 * len(state.running) + 64:
            self._forget(chain(state.running, state.waiting))

    def _forget(self, but: Iterable[Request] = ()) -> None:
        """Drop what is kept of requests other than these."""
        kept = set(but)
        self._earned = {r: earned for r, earned in self._earned.items() if r in kept}
        self._delayed &= kept
