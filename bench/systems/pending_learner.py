# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Fine-tuning that is always pending, in the place of the engine's learner.

The engine asks its ``learner`` for nothing but the attributes below. This one has a step
to run at any time and never publishes, so that a block measures the sharing of the device
and not how many corrections happened to come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
import time

from mace_ros.api.events import Event
from mace_ros.api.settings import Settings
from mace_ros.engine.engine import Engine
from mace_ros.finetune.sample import Sample
from mace_ros.finetune.step import FinetuneStep, Trainer
from mace_ros.scheduling.plan import Segment

Spent = Callable[[float, float], None]


class TimedStep(FinetuneStep):
    """A fine-tune step that tells when its segments began and ended."""

    spent: Spent = staticmethod(lambda began, ended: None)
    _whole = 0

    def run_segment(self) -> Segment:
        """Run the next segment and return it."""
        self._whole = self._whole or len(list(self.segments()))
        began = time.monotonic()
        segment = super().run_segment()
        self.spent(began, time.monotonic())
        return segment

    @property
    def progress(self) -> float:
        """The part of the step that is done, by its segments; what rode counts for nothing."""
        return 1.0 - len(list(self.segments())) / self._whole if self._whole else 0.0


class PendingLearner:
    """Supplies one fine-tune step after another, each over one sample of the same length."""

    wants_anchors = wants_to_judge = backlog = False
    wake_at = None
    busy = True

    def __init__(self, engine: Engine, samples: Sequence[Sequence[int]]) -> None:
        """Learn all but the first token of each of ``samples`` (token ids)."""
        self._engine = engine
        self.drift = engine.learner.drift
        self._trainer = Trainer(engine.bank, engine.settings.finetune.learning_rate)
        self._samples = cycle([Sample(tuple(s), (0.0,) + (1.0,) * (len(s) - 1)) for s in samples])
        self._any, self._pending = bool(samples), False
        self.step: TimedStep | None = None      # that can run now
        self.on_spent: Spent = lambda began, ended: None
        self.finished_steps = self.finished_tokens = 0

    def begin(self) -> None:
        """Have fine-tuning pending from now on, if there are samples, and count from zero."""
        self._pending = self._any
        self.finished_steps = self.finished_tokens = 0

    def end(self) -> int:
        """
        Have nothing to learn any more; return the tokens learned since the beginning.

        A step that is cut off counts by its part: whole steps alone would favour whom
        they don't get in the way of.
        """
        unfinished = self.step.progress * self.step.tokens if self.step is not None else 0.0
        self._pending, self.step = False, None
        return self.finished_tokens + round(unfinished)

    def new_step(self) -> TimedStep:
        """Return a fresh step over the next sample, made as the learner makes it."""
        recompute = self._engine.settings.finetune.recompute
        # As old as it gets when corrections are learned as fast as they come.
        step = TimedStep(
            self._engine.model, self._trainer, [next(self._samples)],
            keep_graphs=recompute != 'always', may_piggyback=recompute != 'never',
            oldest_correction_at=time.monotonic())
        step.spent = self.on_spent
        return step

    def ran(self, tokens: int, seconds: float) -> None:
        """Count the tokens of whole steps."""
        self.finished_tokens += tokens
        self.finished_steps += tokens > 0

    def advance(self, settings: Settings) -> list[Event]:
        """Go on with the next step."""
        if self._pending and (self.step is None or self.step.done):
            self.step = self.new_step()
        return []

    def drop(self, reason: str) -> list[Event]:
        """Give up: an iteration that failed must not be measured."""
        raise AssertionError(f'a fine-tune step failed: {reason}')
