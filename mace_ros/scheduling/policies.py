# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The interface of a scheduling policy, and the baselines that ``mace`` is measured against.

All policies serve requests alike (:mod:`mace_ros.scheduling.batching`); they differ in when they
learn. To add a policy:

1. Derive a class from :class:`Policy`, in a module of its own, and implement :meth:`Policy.plan`.
2. Name it in :mod:`mace_ros.api.policies`, add the class to ``POLICY_CLASSES`` in
   :mod:`mace_ros.scheduling.scheduler`, and the name to the choices in ``launch/mace.launch.py``.
   The parameter follows; its table and file are generated.
3. An input that plans do not have yet, such as the time of day, is a field of
   :class:`mace_ros.scheduling.plan.State`, set in ``Engine._prepare`` and in
   ``VirtualEngine._receive``. A policy reads no clock itself: the same plans must come out of a
   test and of a simulation.
4. A policy that leaves a pending step alone for a time sets the plan's ``wake_at`` when there is
   nothing to run, since an idle engine otherwise waits for a message. It also overrides
   :meth:`Policy.is_overdue`.

The simulator then runs it, too: ``python -m mace_ros.simulation --policy NAME ...``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
import math

from mace_ros.api.settings import Settings
from mace_ros.scheduling.batching import Batch, Batcher
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.learning_slice import EMPTY_SLICE, LearningSlice, make_plan, next_slice
from mace_ros.scheduling.ledger import Ledger
from mace_ros.scheduling.plan import FinetuneWork, Plan, State


class Policy(ABC):
    """Decides what each iteration does."""

    def __init__(self, settings: Settings, cost: CostModel, ledger: Ledger) -> None:
        """Plan with ``cost`` and ``ledger``, which the scheduler keeps up to date."""
        self._settings = settings
        self._cost = cost
        self._ledger = ledger
        self._batcher = Batcher(settings, cost)

    def update(self, settings: Settings) -> None:
        """Apply new settings."""
        self._settings = settings
        self._batcher.update(settings)

    @abstractmethod
    def plan(self, state: State, now: float) -> Plan:
        """
        Return what to do at ``now``, in seconds on the engine's monotonic clock.

        ``state.finetune`` is None while ``finetune.budget`` is used up.
        """

    def observe(  # noqa: B027 - an optional hook
        self, serving_s: float, learning_s: float, steps: int,
    ) -> None:
        """Take in an iteration's device time, and how many fine-tune steps it completed."""

    def is_overdue(self, state: State, since: float, now: float) -> bool:
        """
        Return whether a correction that has waited since ``since`` takes precedence.

        Then memory is reserved for its step, and the requests that learning waits for are served
        like those of users. ``state`` is that of the next plan, whose step need not train this
        correction: ``state.finetune`` may be None.
        """
        return (self._settings.finetune.budget > 0.0
                and now - since > self._settings.slo.freshness_s)

    @property
    def late_for_learning(self) -> int:
        """Number of requests that missed or will miss an SLO because of learning."""
        return 0

    # -- for the plans of derived classes ----------------------------------------------

    def _next_slice(self, work: FinetuneWork, batch: Batch, seconds: float) -> LearningSlice:
        """Return the next slice that ends within ``seconds``, or the smallest slice."""
        return next_slice(
            work, self._cost, batch, seconds, self._settings.scheduler.max_batch_tokens)

    def _rest_of_step(self, work: FinetuneWork, batch: Batch) -> Plan:
        """Return a plan that runs the rest of the step undivided, and none of ``batch``."""
        alone = Batch(rejected=batch.rejected)
        return make_plan(alone, self._next_slice(work, alone, math.inf), interruptible=False)


class InferenceOnly(Policy):
    """Never learns: the reference for what serving costs."""

    def plan(self, state: State, now: float) -> Plan:
        """Return the next pass."""
        return make_plan(self._batcher.batch(state, now))

    def is_overdue(self, state: State, since: float, now: float) -> bool:
        """Return False: nothing will be learned."""
        return False


class Continuous(Policy):
    """
    Always learns, in undivided steps.

    While there are requests as well, steps and passes alternate: after each step the requests
    get as much device time as the step took.
    """

    def __init__(self, settings: Settings, cost: CostModel, ledger: Ledger) -> None:
        """Start with no debt."""
        super().__init__(settings, cost, ledger)
        self.owed_s = 0.0      # device time owed to the requests; negative if they are ahead
        self._learning_pending = False

    def plan(self, state: State, now: float) -> Plan:
        """Return a pass if the requests are owed one, otherwise a whole step."""
        work = state.finetune
        self._learning_pending = work is not None
        if work is None or not state.has_requests:
            self.owed_s = 0.0
        batch = self._batcher.batch(state, now)
        if work is not None and (batch.is_empty or self.owed_s <= 0.0):
            return self._rest_of_step(work, batch)
        return make_plan(batch)

    def observe(self, serving_s: float, learning_s: float, steps: int) -> None:
        """Update the debt."""
        if self._learning_pending:
            self.owed_s += learning_s - serving_s


class Periodic(Policy):
    """
    Stops serving once per ``finetune.period_s`` for a retraining of some steps.

    A retraining that takes more than half the period is followed by as much time for the
    requests, so that it cannot starve them.
    """

    def __init__(self, settings: Settings, cost: CostModel, ledger: Ledger) -> None:
        """Start with a period of serving."""
        super().__init__(settings, cost, ledger)
        self._began: float | None = None        # the latest retraining, or serving at first
        self._ended = 0.0
        self._steps_left: int | None = None     # of the current retraining

    def plan(self, state: State, now: float) -> Plan:
        """Return the next step of a retraining, otherwise the next pass."""
        if self._began is None:
            self._began = self._ended = now
        work = state.finetune
        if self._steps_left is not None and (self._steps_left <= 0 or work is None):
            self._ended, self._steps_left = now, None
        due = self._due(self._began)
        if self._steps_left is None and work is not None and now >= due:
            self._began, self._steps_left = now, self._settings.finetune.period_steps
        batch = self._batcher.batch(state, now)
        if self._steps_left is not None and work is not None:
            return self._rest_of_step(work, batch)
        idle = batch.is_empty and work is not None
        return make_plan(batch, wake_at=due if idle else None)

    def observe(self, serving_s: float, learning_s: float, steps: int) -> None:
        """Count the completed steps."""
        if self._steps_left is not None:
            self._steps_left -= steps

    @property
    def next_retraining_at(self) -> float | None:
        """When the next retraining is due; None during a retraining and before the first plan."""
        if self._began is None or self._steps_left is not None:
            return None
        return self._due(self._began)

    def _due(self, began: float) -> float:
        """Return when the retraining after the one that began at ``began`` is due."""
        return max(began + self._settings.finetune.period_s, 2.0 * self._ended - began)


class StaticSplit(Policy):
    """
    Gives learning a fixed share of the device time while there are requests as well.

    Time that one side leaves idle goes to the other side. Partitions of a device, or two
    processes with threads of their own, could not do that.
    """

    def __init__(self, settings: Settings, cost: CostModel, ledger: Ledger) -> None:
        """Start with no debt."""
        super().__init__(settings, cost, ledger)
        self._owed_s = 0.0      # device time owed to learning; negative if it is ahead
        self._learning_pending = False

    def plan(self, state: State, now: float) -> Plan:
        """Return a pass, followed by the learning that is due."""
        work = state.finetune
        self._learning_pending = work is not None
        batch = self._batcher.batch(state, now)
        max_s = self._settings.finetune.max_blocking_ms / 1000.0
        share = self._settings.scheduler.static_share
        if work is None or batch.is_empty:
            self._owed_s = 0.0
            return make_plan(
                batch, EMPTY_SLICE if work is None else self._next_slice(work, batch, max_s))
        if self._owed_s >= max_s:
            # A slice after each pass would not pay back enough: run one without a pass.
            alone = Batch(rejected=batch.rejected)
            learning = self._next_slice(work, alone, max_s)
            if learning.seconds <= self._owed_s:
                return make_plan(alone, learning)
        due_s = self._owed_s + batch.seconds * share / (1.0 - share)
        if due_s <= 0.0:
            return make_plan(batch)
        learning = self._next_slice(work, batch, min(due_s, max_s))
        # A single segment may take longer than what is due: it waits until half of it is due.
        return make_plan(batch, learning if learning.seconds <= 2.0 * due_s else EMPTY_SLICE)

    def observe(self, serving_s: float, learning_s: float, steps: int) -> None:
        """Update the debt."""
        share = self._settings.scheduler.static_share
        if self._learning_pending:
            self._owed_s += serving_s * share / (1.0 - share) - learning_s
