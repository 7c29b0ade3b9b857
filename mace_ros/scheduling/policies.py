# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Who decides about learning: the interface, and the baselines that mace is measured against.

All policies serve requests in the same way (:mod:`mace_ros.scheduling.batching`); they
differ in when they learn. Whoever wants another one derives from :class:`Policy`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
import math

from mace_ros.api.settings import Settings
from mace_ros.scheduling.batching import Batch, Batcher
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.learning_slice import (
    EMPTY_SLICE,
    LearningSlice,
    next_slice,
    plan_of,
    rest_of_step,
)
from mace_ros.scheduling.ledger import Ledger
from mace_ros.scheduling.plan import FinetuneWork, Plan, State


class Policy(ABC):
    """Decides one iteration after another."""

    def __init__(self, settings: Settings, cost: CostModel, ledger: Ledger) -> None:
        """Read from ``settings``, ``cost`` and ``ledger``; the scheduler keeps them current."""
        self._settings = settings
        self._cost = cost
        self._ledger = ledger
        self._batcher = Batcher(settings, cost)

    def update(self, settings: Settings) -> None:
        """Put other settings in force."""
        self._settings = settings
        self._batcher.settings = settings

    @property
    def late_for_learning(self) -> int:
        """Requests that came late, or will, for the sake of learning."""
        return 0

    @abstractmethod
    def plan(self, state: State, now: float) -> Plan:
        """Return what to do now. ``state.finetune`` is None while the budget is used up."""

    def is_overdue(self, since: float, now: float) -> bool:
        """Return whether answers must make way for what has waited since then to be learned."""
        return (self._settings.finetune.budget > 0.0
                and now - since > self._settings.slo.freshness_s)

    def observe(  # noqa: B027 - most need not know
        self, serving_s: float, learning_s: float, steps: int,
    ) -> None:
        """Note the device time of an iteration, and how many fine-tune steps ended in it."""

    def quiet_until(self, state: State, now: float) -> float:
        """
        Return until when plans of decode rows alone get no learning, as long as they go on.

        Asked right after such a plan, of a state with fine-tune work. ``now`` says nothing.
        """
        return now

    def _piece(self, work: FinetuneWork, batch: Batch, seconds: float) -> LearningSlice:
        """Return the next piece of learning that ends within ``seconds``; at least one."""
        return next_slice(
            work, self._cost, batch, seconds, self._settings.scheduler.max_batch_tokens)

    def _step(self, work: FinetuneWork, batch: Batch) -> Plan:
        """Return a plan that runs what is left of the step, undivided, and none of ``batch``."""
        alone = Batch(rejected=batch.rejected)
        return plan_of(alone, rest_of_step(
            work, self._cost, alone, self._settings.scheduler.max_batch_tokens),
            interruptible=False)


class InferenceOnly(Policy):
    """Never learns: what answers cost without learning."""

    def plan(self, state: State, now: float) -> Plan:
        """Return the next pass."""
        return plan_of(self._batcher.batch(state, now))

    def is_overdue(self, since: float, now: float) -> bool:
        """Return that nothing is to be learned."""
        return False

    def quiet_until(self, state: State, now: float) -> float:
        """Return that learning never comes."""
        return math.inf


class Continuous(Policy):
    """
    Always learns, in undivided steps.

    While there are requests too, steps and passes alternate: after each step the
    requests get as much device time as it took.
    """

    def __init__(self, settings: Settings, cost: CostModel, ledger: Ledger) -> None:
        """Begin with nothing owed."""
        super().__init__(settings, cost, ledger)
        self._owed_s = 0.0   # to the requests; less than 0 if they are ahead
        self._shares = False    # whether there is anything to share with

    def plan(self, state: State, now: float) -> Plan:
        """Return a pass if the requests are owed one, else a whole step."""
        work = state.finetune
        self._shares = work is not None
        if work is None or not state.has_requests:
            self._owed_s = 0.0
        batch = self._batcher.batch(state, now)
        if work is not None and (batch.is_empty or self._owed_s <= 0.0):
            return self._step(work, batch)
        return plan_of(batch)

    def quiet_until(self, state: State, now: float) -> float:
        """Return when what is owed is paid."""
        return now + self._owed_s

    def observe(self, serving_s: float, learning_s: float, steps: int) -> None:
        """Settle what is owed."""
        if self._shares:
            self._owed_s += learning_s - serving_s


class Periodic(Policy):
    """
    Stops the world for a retraining of some steps, every so many seconds.

    A retraining that takes more than half the period is followed by as much time for the
    requests: they must not be shut out.
    """

    def __init__(self, settings: Settings, cost: CostModel, ledger: Ledger) -> None:
        """Begin with a period of serving."""
        super().__init__(settings, cost, ledger)
        self._began: float | None = None    # the latest retraining, or serving at first
        self._ended = 0.0
        self._steps: int | None = None      # still to run of the retraining that goes on

    def plan(self, state: State, now: float) -> Plan:
        """Return the next step of a retraining, else the next pass."""
        finetune = self._settings.finetune
        if self._began is None:
            self._began = self._ended = now
        work = state.finetune
        if self._steps is not None and (self._steps <= 0 or work is None):
            self._ended, self._steps = now, None
        due = self._due(self._began)
        if self._steps is None and work is not None and now >= due:
            self._began, self._steps = now, finetune.period_steps
        batch = self._batcher.batch(state, now)
        if self._steps is not None and work is not None:
            return self._step(work, batch)
        idle = batch.is_empty and work is not None
        return plan_of(batch, wake_at=due if idle else None)

    def _due(self, began: float) -> float:
        """Return when the retraining after the one that began then is due."""
        return max(began + self._settings.finetune.period_s, 2.0 * self._ended - began)

    def quiet_until(self, state: State, now: float) -> float:
        """Return when the next retraining is due."""
        return now if self._began is None or self._steps is not None else self._due(self._began)

    def observe(self, serving_s: float, learning_s: float, steps: int) -> None:
        """Count the steps that were run to their end."""
        if self._steps is not None:
            self._steps -= steps


class StaticSplit(Policy):
    """
    Gives learning a fixed share of the device time while there are requests too.

    What either side leaves idle goes to the other one, which a split into partitions of
    a device or into processes with their own threads could not do.
    """

    def __init__(self, settings: Settings, cost: CostModel, ledger: Ledger) -> None:
        """Begin with nothing owed."""
        super().__init__(settings, cost, ledger)
        self._owed_s = 0.0   # to learning; less than 0 if it is ahead
        self._shares = False    # whether there is anything to share with

    def plan(self, state: State, now: float) -> Plan:
        """Return a pass, and after it the learning that has become due."""
        work = state.finetune
        self._shares = work is not None
        batch = self._batcher.batch(state, now)
        most_s = self._settings.finetune.max_blocking_ms / 1000.0
        share = self._settings.scheduler.static_share
        if work is None or batch.is_empty:
            self._owed_s = 0.0
            return plan_of(batch, EMPTY_SLICE if work is None else self._piece(work, batch, most_s))
        if self._owed_s >= most_s:
            # More than a piece after each pass would pay back: none in between.
            alone = Batch(rejected=batch.rejected)
            piece = self._piece(work, alone, most_s)
            if piece.seconds <= self._owed_s:
                return plan_of(alone, piece)
        due_s = self._owed_s + batch.seconds * share / (1.0 - share)
        if due_s <= 0.0:
            return plan_of(batch)
        piece = self._piece(work, batch, min(due_s, most_s))
        # A single segment may be longer than what is due: it waits until half of it is.
        return plan_of(batch, piece if piece.seconds <= 2.0 * due_s else EMPTY_SLICE)

    def observe(self, serving_s: float, learning_s: float, steps: int) -> None:
        """Settle what is owed."""
        share = self._settings.scheduler.static_share
        if self._shares:
            self._owed_s += serving_s * share / (1.0 - share) - learning_s
