# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The scheduler: plans each iteration, and accounts for its time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mace_ros.api.settings import Settings
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.ledger import Ledger
from mace_ros.scheduling.mace import Mace
from mace_ros.scheduling.plan import EMPTY_SHAPE, Measurement, PassShape, Plan, SegmentKind, State
from mace_ros.scheduling.policies import Continuous, InferenceOnly, Periodic, Policy, StaticSplit

# The class of each policy in :mod:`mace_ros.api.policies`, in the same order.
POLICY_CLASSES: Mapping[str, type[Policy]] = {
    'mace': Mace,
    'inference_only': InferenceOnly,
    'continuous': Continuous,
    'periodic': Periodic,
    'static_split': StaticSplit,
}


@dataclass(slots=True)
class Statistics:
    """
    What the scheduler has done so far.

    Shares are of recent time and fade over ten seconds; all other numbers count from the start,
    unless noted. The time of a pass with piggybacked tokens is split between serving and learning.
    """

    serving_share: float = 0.0
    learning_share: float = 0.0
    serving_s: float = 0.0
    learning_s: float = 0.0
    iterations: int = 0
    decode_tokens: int = 0
    prefill_tokens: int = 0
    piggybacked_tokens: int = 0  # fine-tune forward tokens that ran in passes
    finetune_tokens: int = 0     # of completed steps
    finetune_steps: int = 0
    rejected: int = 0            # requests
    late_for_learning: int = 0   # requests that overdue learning made late, as predicted
    shape: PassShape = EMPTY_SHAPE    # of the latest pass
    predicted_s: float = 0.0     # predicted time of what the latest iteration ran
    measured_s: float = 0.0      # measured time of the latest iteration

    @property
    def busy_share(self) -> float:
        """Share of recent time in which the device worked."""
        return min(self.serving_share + self.learning_share, 1.0)


class Scheduler:
    """
    Plans each iteration by the policy that the settings name.

    All times are arguments: the scheduler behaves the same on a robot's clock, in a test and in
    a simulation.
    """

    def __init__(self, settings: Settings, cost: CostModel) -> None:
        """Plan with ``cost``, and let it learn from each measurement."""
        self.cost = cost
        self.ledger = Ledger(settings)
        self._settings = settings
        self._policy = self._make_policy()
        self._late_before = 0   # late_for_learning of earlier policies
        self._counts = Statistics()

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._policy

    def plan(self, state: State, now: float) -> Plan:
        """Return what to do at ``now``; leaves ``state`` as it is, but for prefix lookups."""
        self.ledger.advance(now)
        over_budget = state.finetune is not None and not self.ledger.may_learn
        if over_budget:
            state = replace(state, finetune=None)
        plan = self._policy.plan(state, now)
        if over_budget and plan.is_empty and plan.wake_at is None:
            plan = plan._replace(wake_at=self.ledger.learns_again_at)
        self._counts.rejected += len(plan.rejected)
        return plan

    def is_overdue(self, state: State, since: float, now: float) -> bool:
        """Return whether a correction that has waited since ``since`` takes precedence."""
        return self._policy.is_overdue(state, since, now)

    def observe(self, measurement: Measurement, now: float) -> None:
        """Account for an iteration that ended at ``now``, and learn from its times."""
        plan, counts = measurement.plan, self._counts
        shape = plan.shape
        learning_s = sum([seconds for _, seconds in measurement.segments])
        serving_s = measurement.pass_s
        measured_s = serving_s + learning_s
        if shape.finetune_tokens:
            alone = self.cost.pass_s(*shape._replace(finetune_tokens=0))
            serving_s *= min(alone / self.cost.pass_s(*shape), 1.0)
            learning_s = measured_s - serving_s
        predicted_s = self.cost.observe(measurement)
        self.ledger.spend(serving_s, learning_s, now)
        steps = [s.tokens for s, _ in measurement.segments if s.kind is SegmentKind.OPTIMIZER]
        self._policy.observe(serving_s, learning_s, len(steps))
        counts.iterations += 1
        counts.decode_tokens += shape.decode_rows
        counts.prefill_tokens += shape.prefill_tokens
        counts.piggybacked_tokens += shape.finetune_tokens
        counts.finetune_tokens += sum(steps)
        counts.finetune_steps += len(steps)
        counts.shape, counts.predicted_s, counts.measured_s = shape, predicted_s, measured_s

    def update(self, settings: Settings) -> None:
        """Apply new settings from the next plan on."""
        changed = settings.scheduler.policy != self._settings.scheduler.policy
        self._settings = settings
        self.ledger.update(settings)
        if changed:
            self._late_before += self._policy.late_for_learning
            self._policy = self._make_policy()
        else:
            self._policy.update(settings)

    def statistics(self, now: float) -> Statistics:
        """Return a copy of the numbers at ``now``."""
        self.ledger.advance(now)
        return replace(
            self._counts,
            serving_share=self.ledger.serving_share,
            learning_share=self.ledger.learning_share,
            serving_s=self.ledger.serving_s,
            learning_s=self.ledger.learning_s,
            late_for_learning=self._late_before + self._policy.late_for_learning)

    def _make_policy(self) -> Policy:
        return POLICY_CLASSES[self._settings.scheduler.policy](
            self._settings, self.cost, self.ledger)
