# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
A learner whose fine-tuning is always pending and never publishes.

It takes the place of the engine's learner, so that a block measures how the device is shared
and not how many corrections happened to arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import cycle
import math

from mace_ros.api.events import AdapterVersion, Event
from mace_ros.api.settings import Settings
from mace_ros.engine.learner_port import LearnerPort
from mace_ros.engine.parts import Parts
from mace_ros.finetune.sample import Sample
from mace_ros.finetune.step import FinetuneStep
from mace_ros.finetune.trainer import Trainer
from mace_ros.learning.acceptance import Accepted
from mace_ros.learning.learner import LearningStatus
from mace_ros.learning.rollback import RolledBack
from mace_ros.model.prefix_kv import PrefixKV
from mace_ros.scheduling.plan import Segment, SegmentKind


class PendingLearner:
    """
    Supplies fine-tune steps without end, each over one sample of the same length.

    Implements ``LearnerPort``. The engine's own learner restores and lists the adapter versions.
    """

    wants_anchors = False
    wants_prefix: tuple[int, ...] | None = None
    busy = True
    wake_at: float | None = None
    oldest_unlearned_at = math.inf

    def __init__(self, learner: LearnerPort, parts: Parts, settings: Settings,
                 samples: Sequence[Sequence[int]], clock: Callable[[], float]) -> None:
        """Train on all but the first token of each of ``samples`` (token ids)."""
        self._learner, self._model, self._clock = learner, parts.model, clock
        self._settings = settings
        self._trainer = Trainer(parts.lora, settings.finetune.learning_rate)
        self._samples = cycle([Sample(tuple(s), (0.0,) + (1.0,) * (len(s) - 1)) for s in samples])
        self._has_samples, self._pending = bool(samples), False
        self._segments_run = 0      # of the current step
        self.step: FinetuneStep | None = None
        self.finished_steps = self.finished_tokens = 0

    # -- for the benchmark -----------------------------------------------------------

    def start(self) -> None:
        """Make fine-tuning pending, if there are samples, and reset the counts."""
        self._pending = self._has_samples
        self.finished_steps = self.finished_tokens = 0

    def stop(self) -> int:
        """
        End the pending fine-tuning; return the tokens learned since :meth:`start`.

        An unfinished step counts by the share of its segments that ran: counting only whole
        steps would favour systems that interrupt a step less often.
        """
        unfinished = 0.0
        if self.step is not None and self._segments_run and not self.step.done:
            left = sum(1 for _ in self.step.segments())
            unfinished = self.step.tokens * self._segments_run / (self._segments_run + left)
        self._pending, self.step = False, None
        return self.finished_tokens + round(unfinished)

    def new_step(self) -> FinetuneStep:
        """Return a step over the next sample, with the options that the learner uses."""
        recompute = self._settings.finetune.recompute
        # As if corrections were learned as fast as they arrive.
        return FinetuneStep(
            self._model, self._trainer, [next(self._samples)],
            keep_graphs=recompute != 'always', may_piggyback=recompute != 'never',
            oldest_correction_at=self._clock())

    # -- LearnerPort -----------------------------------------------------------------

    def restore(self) -> list[Event]:
        """Load the live adapter versions."""
        return self._learner.restore()

    def poll(self) -> list[Event]:
        """Begin the next step if the last one is done."""
        if self._pending and (self.step is None or self.step.done):
            self.step, self._segments_run = self.new_step(), 0
        return []

    def commit(self, segments: Sequence[tuple[Segment, float]]) -> None:
        """Count segments that ran, and the tokens of finished steps."""
        for segment, _ in segments:
            self._segments_run += 1
            if segment.kind is SegmentKind.OPTIMIZER:
                self.finished_steps += 1
                self.finished_tokens += segment.tokens

    def fail(self, reason: str) -> list[Event]:
        """Raise ``AssertionError``: a block with a failed step must not be measured."""
        raise AssertionError(f'a fine-tune step failed: {reason}')

    def accepted(self, accepted: Accepted) -> list[Event]:
        """Ignore a correction."""
        return []

    def answered(self, query_id: str) -> None:
        """Ignore a response."""

    def give_anchors(self, anchors: list[tuple[list[int], list[int]]]) -> None:
        """Ignore answers of the base model; they are never requested."""

    def give_prefix(self, ids: tuple[int, ...], prefix: PrefixKV) -> None:
        """Ignore a prefix; none is ever requested."""

    def versions(self, profile: str) -> Future[list[AdapterVersion]]:
        """Return the versions of a profile."""
        return self._learner.versions(profile)

    def rollback(self, profile: str, version: int, reason: str,
                 done: Future[RolledBack]) -> None:
        """Refuse: a block measures one version."""
        done.set_exception(NotImplementedError('a benchmark does not roll back'))

    def update(self, settings: Settings) -> None:
        """Use other settings from the next step on."""
        self._settings = settings
        self._learner.update(settings)

    def status(self) -> LearningStatus:
        """Return the status of the engine's learner, which is idle."""
        return self._learner.status()

    def close(self, reason: str) -> None:
        """Close the engine's learner."""
        self._learner.close(reason)
