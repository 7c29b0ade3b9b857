# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The scheduler: one plan for each iteration, and the accounts of what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
import math

from mace_ros.api.settings import Settings
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.ledger import Ledger
from mace_ros.scheduling.mace import Mace
from mace_ros.scheduling.plan import EMPTY, Measurement, PassShape, Plan, SegmentKind, State
from mace_ros.scheduling.policies import Continuous, InferenceOnly, Periodic, Policy, StaticSplit

# By the values of the parameter ``scheduler.policy``.
POLICIES: Mapping[str, type[Policy]] = {
    'mace': Mace,
    'inference_only': InferenceOnly,
    'continuous': Continuous,
    'periodic': Periodic,
    'static_split': StaticSplit,
}


@dataclass(frozen=True, slots=True)
class Statistics:
    """
    What the scheduler did, in plain numbers.

    Shares are of the time up to now, fading over ten seconds; everything else counts
    from the start. Serving and learning split a pass in which fine-tune tokens ride.
    """

    serving_share: float = 0.0
    learning_share: float = 0.0
    serving_s: float = 0.0
    learning_s: float = 0.0
    iterations: int = 0
    decode_tokens: int = 0
    prefill_tokens: int = 0
    ridden_tokens: int = 0     # fine-tune forward tokens that rode in passes
    finetune_tokens: int = 0   # of finished steps
    finetune_steps: int = 0
    rejected: int = 0          # requests turned away
    late_for_learning: int = 0   # requests made late by overdue learning, as predicted
    shape: PassShape = EMPTY   # of the latest iteration's pass
    predicted_s: float = 0.0   # what the latest iteration ran was predicted to take ...
    measured_s: float = 0.0    # ... and took

    @property
    def busy_share(self) -> float:
        """Share of the time in which the device worked."""
        return min(self.serving_share + self.learning_share, 1.0)


class Scheduler:
    """
    Decides each iteration by the policy that the settings name.

    All times are given to it: the same object runs on a robot's clock, in a test and in
    a simulation, and does the same for the same calls.
    """

    def __init__(self, settings: Settings, cost: CostModel) -> None:
        """Plan with ``cost``, which goes on learning from what is observed."""
        self.cost = cost
        self._settings = settings
        self._ledger = Ledger(settings)
        self._policy = self._make_policy()
        self._late_before = 0   # of policies that are no longer in force
        self._counts = Statistics()

    def plan(self, state: State, now: float) -> Plan:
        """Return what to do at ``now``; of ``state`` only what is shared is brought up to date."""
        self._ledger.advance(now)
        held = state.finetune is not None and not self._ledger.may_learn
        if held:
            state = replace(state, finetune=None)
        plan = self._policy.plan(state, now)
        if held and plan.is_empty and plan.wake_at is None:
            plan = plan._replace(wake_at=self._ledger.learns_again_at)
        if plan.rejected:
            self._counts = replace(
                self._counts, rejected=self._counts.rejected + len(plan.rejected))
        return plan

    def quiet_until(self, state: State, now: float) -> float:
        """
        Return a time until which :meth:`plan` adds no learning to the rows that it just planned.

        To be asked right after it gave a plan of decode rows alone; it holds as long as the
        same rows decode and nobody comes. Who asks early loses nothing.
        """
        if state.finetune is None:
            return math.inf
        if not self._ledger.may_learn:
            again = self._ledger.learns_again_at
            return math.inf if again is None else again
        return self._policy.quiet_until(state, now)

    def is_overdue(self, since: float, now: float) -> bool:
        """Return whether answers must make way for what has waited since then to be learned."""
        return self._policy.is_overdue(since, now)

    def observe(self, measurement: Measurement, now: float) -> None:
        """Learn from an iteration that ended at ``now``."""
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
        self._ledger.spend(serving_s, learning_s, now)
        steps = [s.tokens for s, _ in measurement.segments if s.kind is SegmentKind.OPTIMIZER]
        self._policy.observe(serving_s, learning_s, len(steps))
        self._counts = replace(
            counts,
            iterations=counts.iterations + 1,
            decode_tokens=counts.decode_tokens + shape.decode_rows,
            prefill_tokens=counts.prefill_tokens + shape.prefill_tokens,
            ridden_tokens=counts.ridden_tokens + shape.finetune_tokens,
            finetune_tokens=counts.finetune_tokens + sum(steps),
            finetune_steps=counts.finetune_steps + len(steps),
            shape=shape, predicted_s=predicted_s, measured_s=measured_s)

    def update(self, settings: Settings) -> None:
        """Put other settings in force from the next plan on."""
        policy = settings.scheduler.policy
        changed = policy != self._settings.scheduler.policy
        self._settings = settings
        self._ledger.update(settings)
        if changed:
            self._late_before += self._policy.late_for_learning
            self._policy = self._make_policy()
        else:
            self._policy.update(settings)

    def statistics(self, now: float) -> Statistics:
        """Return the numbers at ``now``."""
        self._ledger.advance(now)
        return replace(
            self._counts,
            serving_share=self._ledger.serving_share,
            learning_share=self._ledger.learning_share,
            serving_s=self._ledger.serving_s,
            learning_s=self._ledger.learning_s,
            late_for_learning=self._late_before + self._policy.late_for_learning)

    def _make_policy(self) -> Policy:
        return POLICIES[self._settings.scheduler.policy](
            self._settings, self.cost, self._ledger)
