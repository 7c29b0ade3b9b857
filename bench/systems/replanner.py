# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""An observer that makes each plan a second time, to measure what the plan itself costs."""

from __future__ import annotations

import time

from mace_ros.scheduling.plan import Plan, State
from mace_ros.scheduling.scheduler import Scheduler
from mace_ros.telemetry.observer import IterationObserver


class Replanner(IterationObserver):
    """
    Plans again right after each plan, and drops the result.

    The first plan follows a pass that has read all weights: most of its time is spent in waiting
    for the planner's own code and data to come back into the processor's caches. The second one
    finds them there, so that its time is the work of the plan.
    """

    def __init__(self, scheduler: Scheduler, state: State, in_flight: int) -> None:
        """Measure plans with at least ``in_flight`` requests."""
        self.microseconds: list[float] = []     # processor time of each second plan
        self._scheduler, self._state, self._in_flight = scheduler, state, in_flight

    def planned(self, plan: Plan, in_flight: int) -> None:
        """Make the plan again, and note its processor time."""
        if in_flight < self._in_flight:
            return
        now = time.monotonic()
        began = time.thread_time()
        self._scheduler.plan(self._state, now)
        self.microseconds.append((time.thread_time() - began) * 1e6)
