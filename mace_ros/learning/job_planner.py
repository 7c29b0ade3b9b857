# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Which corrections are learned next, and when: budget, duty cycle and freshness."""

from __future__ import annotations

from dataclasses import dataclass

from mace_ros.learning.correction_queue import PendingCorrection
from mace_ros.learning.duty_cycle import DutyCycle
from mace_ros.learning.grouping import group, Start
from mace_ros.learning.job import JobKind
from mace_ros.learning.job_context import JobContext
from mace_ros.learning.rehearsal import Rehearsal
from mace_ros.learning.selection import candidates, fitting, JOB_CORRECTIONS


@dataclass(frozen=True)
class NextJob:
    """The corrections of one profile that a job is to learn or to rehearse, and its start."""

    profile: str
    corrections: list[PendingCorrection]
    start: Start
    kind: JobKind = JobKind.LEARNING


class JobPlanner:
    """Plans one job after the other."""

    def __init__(self, context: JobContext, rehearsal: Rehearsal) -> None:
        """Plan from the queue in ``context``."""
        self._context, self._rehearsal = context, rehearsal
        self._duty_cycle = DutyCycle()
        self.jobs = 0                       # begun so far
        self.wake_at: float | None = None   # when a job may begin, if that is a matter of time

    @property
    def budget(self) -> float:
        """Learning's share of device time, by drift and backlog, from 0 to 1."""
        settings = self._context.settings
        if not self._context.scores_first:      # the baseline policies ignore drift
            return settings.finetune.budget
        return self._context.drift.budget(
            settings.drift.min_budget, settings.finetune.budget,
            backlog=len(self._context.queue) >= JOB_CORRECTIONS)

    def may_begin(self) -> bool:
        """Return whether any job may begin: learning is on, and no retry is pending."""
        self.wake_at = None
        if self._context.settings.finetune.budget == 0:
            return False
        if self._context.clock() < self._context.backoff.until:
            self.wake_at = self._context.backoff.until
            return False
        return True

    def next(self, held: str | None) -> NextJob | None:
        """
        Take the corrections of the next job from the queue; None if none may begin now.

        Nothing is begun for the profile ``held``, whose version is being rolled back.
        """
        context = self._context
        ready = [c for c in context.queue if c.record.profile != held]
        if not ready:
            return self._rehearse(held)
        if context.scores_first and self._rests(min(c.waits_since for c in ready)):
            return None
        profile = context.queue.next_profile(ready, self.jobs + 1)
        waiting = [c for c in ready if c.record.profile == profile]
        if context.scores_first:
            chosen = candidates(
                waiting, by_priority=context.settings.finetune.order == 'priority')
        else:
            chosen = fitting(waiting, context.chat, context.training.step_tokens)
        job = self._grouped(profile, chosen, JobKind.LEARNING)
        context.queue.remove(job.corrections)
        return job

    def begun(self) -> int:
        """Note that the planned job begins; return its number."""
        self._duty_cycle.begun(self._context.clock(), self.budget)
        self.jobs += 1
        return self.jobs

    def spent(self, seconds: float) -> None:
        """Note device time of the running job."""
        self._duty_cycle.spent(seconds)

    def _rests(self, oldest_at: float) -> bool:
        """Return whether learning rests, and set ``wake_at``; no correction gets too old."""
        until = min(self._duty_cycle.until(self.budget),
                    oldest_at + self._context.settings.slo.freshness_s)
        if self._context.clock() >= until:
            return False
        self.wake_at = until
        return True

    def _grouped(self, profile: str, chosen: list[PendingCorrection],
                 kind: JobKind) -> NextJob:
        """Keep the corrections that can be learned together with the first one."""
        start, together = group(self._context.live, chosen, self._context.settings.adapter)
        return NextJob(profile, together, start, kind)

    def _rehearse(self, held: str | None) -> NextJob | None:
        profile = self._rehearsal.profile
        if not self._context.traits.rehearses or profile is None or profile == held:
            return None
        again = self._rehearsal.corrections(self.jobs, self._context.clock())
        return self._grouped(profile, again, JobKind.REHEARSAL)
