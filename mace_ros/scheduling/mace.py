# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The policy ``mace``: learn with the device time that serving does not need.

This is our reading of MACE (arXiv 2510.03283), whose formulas are not public. Below saturation,
a device has the same idle time however learning is interleaved with serving, so that
interleaving gains nothing and costs latency. At saturation there is no idle time, and only
interleaving is left. Hence:

- Idle: run segments; an arriving query interrupts them.
- A request waits for its first token: no learning.
- All requests decode: learning may lengthen each answer by ``scheduler.max_slowdown``, accrued
  over its tokens, and only while every next token meets its deadline. The SLO alone is not
  enough: an objective of 100 ms on a device that needs 30 ms would triple every answer's time.
- The oldest correction is older than ``slo.freshness_s``: learning takes ``finetune.min_share``
  of the time whatever that costs, and requests that become late are counted.
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
    make_plan,
    piggyback_saves_s,
    piggyback_within,
    segments_within,
)
from mace_ros.scheduling.ledger import Ledger
from mace_ros.scheduling.plan import FinetuneWork, Plan, State
from mace_ros.scheduling.policies import Policy
from mace_ros.scheduling.request import Request

# The longest slice of an idle device, in ``finetune.max_blocking_ms``. A query interrupts it after
# a segment; the longer a slice is, the less the host works between slices.
IDLE_SLICE = 4.0


class Mace(Policy):
    """Learns in idle time, within a small share of the answers' time, and when overdue."""

    def __init__(self, settings: Settings, cost: CostModel, ledger: Ledger) -> None:
        """Start without any request."""
        super().__init__(settings, cost, ledger)
        # The slowdown accrued when each row was first seen decoding; see _slowdown_s().
        self._accrued_at_start: dict[Request, float] = {}
        # A step, its piggyback tokens, and what each of them saves. The reference is weak: a
        # step keeps hundreds of megabytes alive.
        self._saving: tuple[ref[FinetuneWork] | None, int, float] = (None, 0, 0.0)
        self._delayed: set[Request] = set()
        self._late = 0

    @property
    def late_for_learning(self) -> int:
        """Number of requests that overdue learning was predicted to make late."""
        return self._late

    def update(self, settings: Settings) -> None:
        """Apply new settings."""
        if settings.scheduler.max_slowdown != self._settings.scheduler.max_slowdown:
            self._accrued_at_start.clear()   # accrued at another rate
        super().update(settings)

    def plan(self, state: State, now: float) -> Plan:
        """Return the next pass, and the learning that there is time for."""
        batch = self._batcher.batch(state, now)
        work = state.finetune
        if work is None:
            return make_plan(batch)
        max_s = self._settings.finetune.max_blocking_ms / 1000.0
        if batch.is_empty:
            if not state.running and (self._accrued_at_start or self._delayed):
                self._forget()
            return make_plan(batch, self._next_slice(work, batch, IDLE_SLICE * max_s))
        learning = EMPTY_SLICE
        if not batch.has_waiting:
            slowdown_s = min(self._slowdown_s(batch, now), max_s)
            if slowdown_s > 0.0:
                learning = self._beside_decodes(work, batch, slowdown_s, now)
        if learning is EMPTY_SLICE and self.is_overdue(
                state, work.oldest_correction_at, now):
            claim_s = min(self._ledger.claim_s, max_s)
            if claim_s > 0.0:
                learning = self._next_slice(work, batch, claim_s)
                self._count_late(state, batch, learning, now)
        return make_plan(batch, learning)

    def is_overdue(self, state: State, since: float, now: float) -> bool:
        """Return whether learning may claim its minimum share for a correction."""
        return super().is_overdue(state, since, now) and self._ledger.may_claim

    def _slowdown_s(self, batch: Batch, now: float) -> float:
        """
        Return by how many seconds this iteration may lengthen the answers, all of which decode.

        An answer that has taken t seconds, d of them for learning, may be lengthened by another
        ``gain * (t - d) - d``. Time and learning are the same for all answers, so that this is
        the difference between what has accrued now and what had accrued at its start.
        """
        gain = self._settings.scheduler.max_slowdown - 1.0
        accrued = gain * now - (1.0 + gain) * self._ledger.learning_s
        at_start = self._accrued_at_start
        latest = -math.inf
        for row in batch.decode:
            start = at_start.get(row)
            if start is None:
                start = at_start[row] = accrued
            if start > latest:
                latest = start
        if len(at_start) > 2 * len(batch.decode) + 64:
            self._forget(batch.decode)
        return accrued + gain * batch.seconds - latest

    def _beside_decodes(self, work: FinetuneWork, batch: Batch, slowdown_s: float,
                        now: float) -> LearningSlice:
        """Return the learning in or after a pass of decode rows that takes ``slowdown_s``."""
        pass_s = self._cost.pass_s(*batch.shape, upper=True)
        pending = work.piggyback_tokens
        # Twice the tokens, because a piggybacked forward takes whole KV blocks for each sample.
        if pending and batch.free_tokens >= 2 * pending:
            step, tokens, saving_s = self._saving
            if step is None or step() is not work or tokens != pending:
                saving_s = piggyback_saves_s(work, self._cost)
                self._saving = (ref(work), pending, saving_s)
            if saving_s > 0.0:
                learning = piggyback_within(
                    work, self._cost, batch, min(batch.due - now, pass_s + slowdown_s),
                    self._settings.scheduler.max_batch_tokens)
                if learning.tokens and learning.seconds <= saving_s * learning.tokens:
                    return learning
        # Segments run after this pass, and so delay the tokens of the next one.
        learning = segments_within(
            work, self._cost, min(slowdown_s, batch.next_due - now - 2.0 * pass_s))
        return learning if learning.segments else EMPTY_SLICE

    def _count_late(self, state: State, batch: Batch, learning: LearningSlice,
                    now: float) -> None:
        """Count the requests that would be in time without ``learning`` and are late with it."""
        token_s = batch.seconds / batch.shape.tokens
        ends = now + batch.seconds
        for request in chain(state.running, state.waiting):
            if request.first_token_at is None:
                slack = request.deadline - ends - token_s * request.remaining_tokens
            else:
                # At the last token: a request that is behind now may catch up until then.
                left = request.max_tokens - request.output_tokens - 1
                slack = request.deadline - ends + left * (request.tpot_slo - batch.seconds)
            if 0.0 <= slack < learning.seconds and request not in self._delayed:
                self._delayed.add(request)
                self._late += 1
        if len(self._delayed) > 2 * len(state.running) + 64:
            self._forget(chain(state.running, state.waiting))

    def _forget(self, but: Iterable[Request] = ()) -> None:
        """Drop the accounts of all requests ``but`` these."""
        kept = set(but)
        self._accrued_at_start = {
            r: accrued for r, accrued in self._accrued_at_start.items() if r in kept}
        self._delayed &= kept
