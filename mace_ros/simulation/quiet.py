# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
How long decode passes repeat without learning, so that a replay need not plan each of them.

A policy needs no support for this: passes under a policy that is unknown here are all planned. One
that derives from a policy below must not learn earlier than that policy does.
"""

from __future__ import annotations

import math

from mace_ros.api.settings import Settings
from mace_ros.scheduling.mace import Mace
from mace_ros.scheduling.plan import State
from mace_ros.scheduling.policies import Continuous, InferenceOnly, Periodic
from mace_ros.scheduling.scheduler import Scheduler


def quiet_until(scheduler: Scheduler, state: State, settings: Settings, now: float) -> float:
    """
    Return a time until which plans of the same decode rows contain no learning.

    To be called right after ``scheduler`` planned decode rows without learning. Holds as long as
    the same rows decode and no request arrives. The time may be too early, never too late.
    """
    work, policy, ledger = state.finetune, scheduler.policy, scheduler.ledger
    if work is None or isinstance(policy, InferenceOnly):
        return math.inf
    if not ledger.may_learn:
        again = ledger.learns_again_at
        return math.inf if again is None else again
    if isinstance(policy, Continuous):
        return now + policy.owed_s
    if isinstance(policy, Periodic):
        due = policy.next_retraining_at
        return now if due is None else due
    if isinstance(policy, Mace) and state.waiting:
        # While a request waits, only overdue corrections are learned, by their claim.
        return max(work.oldest_correction_at + settings.slo.freshness_s,
                   ledger.claim.available_at())
    return now
