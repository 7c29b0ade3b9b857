# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The learner's side of an iteration: its polls, its step, and what it waits for."""

from __future__ import annotations

from collections.abc import Callable

from mace_ros.api.events import Event
from mace_ros.api.settings import Settings
from mace_ros.engine.background_requests import BackgroundRequests
from mace_ros.engine.learner_port import LearnerPort
from mace_ros.engine.model_runner import ModelRunner
from mace_ros.engine.parts import Parts
from mace_ros.engine.request_manager import RequestManager
from mace_ros.finetune.step import FinetuneStep
from mace_ros.model.prefix_kv import PrefixKV
from mace_ros.scheduling.plan import Plan
from mace_ros.scheduling.scheduler import Scheduler


class LearnerDriver:
    """
    Polls the learner, and lets the scheduler plan its step.

    The learner may wait for the base model: for its answers to the anchors, and for its keys and
    values of the prefixes of samples. Silent requests compute them. An error of the device fails
    the learner's job, which is tried again if the device survives; requests are unaffected.
    """

    def __init__(self, settings: Settings, parts: Parts, learner: LearnerPort, *,
                 scheduler: Scheduler, requests: RequestManager, background: BackgroundRequests,
                 runner: ModelRunner, wake: Callable[[], None],
                 clock: Callable[[], float]) -> None:
        """``wake`` requests another poll."""
        self._settings, self._learner = settings, learner
        self._state, self._memory, self._paged = parts.state, parts.memory, parts.paged
        self._scheduler, self._requests, self._background = scheduler, requests, background
        self._runner, self._wake, self._clock = runner, wake, clock
        self._step: FinetuneStep | None = None

    @property
    def step(self) -> FinetuneStep | None:
        """The learner's step, whose KV blocks and memory are accounted for."""
        return self._step

    def update(self, settings: Settings) -> None:
        """Put other settings into force."""
        self._settings = settings
        self._learner.update(settings)

    def poll(self) -> list[Event]:
        """Let the learner advance; an error in its job fails that job only."""
        try:
            events = self._learner.poll()
        except Exception as error:    # such as an allocation for the next step
            if not self._learner.busy:
                raise                 # no failure of a job, and nothing else would report it
            return self.fail(error)
        self.follow_step()
        return events

    def fail(self, error: Exception) -> list[Event]:
        """Let the learner retry its job, unless the device is lost: the corrections then wait."""
        if not self._runner.survives(error):
            return []
        return self._fail(f'{type(error).__name__}: {error}')

    def _fail(self, reason: str) -> list[Event]:
        events = self._learner.fail(reason)
        self.follow_step()
        return events

    def follow_step(self) -> None:
        """Release the KV blocks of a fine-tune step that the learner has given up."""
        step = self._learner.step
        if self._step is not None and self._step is not step:
            self._paged.release(self._step)
            self._runner.skip_segments()
        self._step = step

    # -- before a plan ---------------------------------------------------------------

    def prepare(self) -> list[Event]:
        """Start the requests that the learner waits for, and offer its step to the scheduler."""
        events = self._start_requests() + self._offer_step()
        try:
            self._paged.move(self._step)
        except Exception as error:    # requests are computed again
            events += self.fail(error)
        return events

    def reclaim(self, plan: Plan) -> bool:
        """Take the step's memory if a plan lacks memory; return whether to plan again."""
        return self._memory.reclaim(
            plan.lacks_memory, overdue=plan.lacks_memory and self._is_overdue())

    def _offer_step(self) -> list[Event]:
        """Let the scheduler plan the step if there is memory for it."""
        step = self._step
        try:
            allowed = self._memory.grant(step, overdue=self._is_overdue())
        except Exception as error:    # the step could not be laid out in smaller chunks
            self._state.finetune = None
            return self.fail(error)
        self._state.finetune = step if allowed else None
        lack = self._memory.shortage(step) if step is not None and not allowed else ''
        return self._fail(lack) if lack else []     # with fewer corrections it may fit

    def _is_overdue(self) -> bool:
        """Return whether the step trains a correction that has waited too long."""
        return self._step is not None and self._scheduler.is_overdue(
            self._state, self._step.oldest_correction_at, self._clock())

    # -- what the learner waits for --------------------------------------------------

    def _start_requests(self) -> list[Event]:
        """Start the requests that the learner waits for; overdue ones are served like queries."""
        overdue = self._scheduler.is_overdue(
            self._state, self._learner.oldest_unlearned_at, self._clock())
        try:
            if self._learner.wants_anchors:
                self._ask_anchors(overdue)
            if self._learner.wants_prefix is not None:
                self._compute_prefix(self._learner.wants_prefix, overdue)
        except RuntimeError as error:       # a prefix could not be computed
            return self.fail(error)
        return []

    def _ask_anchors(self, overdue: bool) -> None:
        """Ask the base model what learning must preserve; give the learner all answers at once."""
        for active in self._background.next_anchors(
                self._settings, self._requests.max_length, overdue=overdue):
            self._requests.start(active)
        answers = self._background.anchor_answers
        if answers is not None:
            self._learner.give_anchors(answers)
            self._wake()

    def _compute_prefix(self, ids: tuple[int, ...], overdue: bool) -> None:
        """Compute the prefix of a training sample, and give it to the learner."""
        prefix = self._background.prefix(ids, self._requests, urgent=overdue)
        if isinstance(prefix, PrefixKV):
            self._learner.give_prefix(ids, prefix)
            self._wake()
        elif prefix is not None:
            self._requests.start(prefix)
