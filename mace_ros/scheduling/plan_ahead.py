# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Overlap scheduling: plan the next decode pass while the device runs the current one."""

from __future__ import annotations

from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.plan import Plan, State


def plan_ahead(plan: Plan, state: State, cost: CostModel) -> Plan | None:
    """Return the plan after ``plan``, with the same rows; None if it needs the scheduler."""
    if plan.prefill or plan.finetune_tokens or plan.segments or state.finetune is not None:
        return None
    shape = plan.shape._replace(
        decode_context=plan.shape.decode_context + plan.shape.decode_rows)
    return plan._replace(rejected=(), preempted=(), shape=shape, predicted_s=cost.pass_s(*shape))


def still_valid(planned_ahead: Plan, state: State, free_blocks: int) -> bool:
    """Return whether no request arrived, ended or may lack memory, and nothing is to learn."""
    return (not state.waiting and state.finetune is None
            and planned_ahead.decode == tuple(state.running)
            and len(planned_ahead.decode) <= free_blocks)
