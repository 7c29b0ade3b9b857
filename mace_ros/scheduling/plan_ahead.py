# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What comes after a pass that the device is still running, if nothing happens meanwhile."""

from __future__ import annotations

from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.plan import Plan, State


def plan_ahead(plan: Plan, state: State, cost: CostModel) -> Plan | None:
    """Return the plan after ``plan``: the same rows again; None if more is to be decided."""
    if plan.prefill or plan.finetune_tokens or plan.segments or state.finetune is not None:
        return None
    shape = plan.shape._replace(
        decode_context=plan.shape.decode_context + plan.shape.decode_rows)
    return plan._replace(rejected=(), preempted=(), shape=shape, predicted_s=cost.pass_s(*shape))


def still_valid(planned_ahead: Plan, state: State, free_blocks: int) -> bool:
    """Return whether nothing has happened: nobody came, ended, or needs what may be lacking."""
    return (not state.waiting and state.finetune is None
            and planned_ahead.decode == tuple(state.running)
            and len(planned_ahead.decode) <= free_blocks)
