# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The interface between the engine and a learner."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from mace_ros.api.events import AdapterVersion, Event
from mace_ros.api.settings import Settings
from mace_ros.finetune.step import FinetuneStep
from mace_ros.learning.acceptance import Accepted
from mace_ros.learning.rollback import RolledBack
from mace_ros.learning.status import LearningStatus
from mace_ros.model.prefix_kv import PrefixKV
from mace_ros.scheduling.plan import Segment


class LearnerPort(Protocol):
    """
    Chooses what to train and publish; the engine runs the fine-tune steps.

    All methods but :meth:`versions`, which any thread may call, run in the device's thread. None
    blocks except :meth:`restore`. The engine publishes returned events in order.
    """

    @property
    def step(self) -> FinetuneStep | None:
        """The fine-tune step that can run now."""

    @property
    def busy(self) -> bool:
        """Whether corrections wait or a job runs."""

    @property
    def wake_at(self) -> float | None:
        """When to call :meth:`poll` again, if the learner waits for nothing but a time."""

    @property
    def wants_anchors(self) -> bool:
        """Whether a job waits for the base model's answers; see :meth:`give_anchors`."""

    @property
    def wants_prefix(self) -> tuple[int, ...] | None:
        """Token ids that come before what a job trains; see :meth:`give_prefix`."""

    @property
    def oldest_unlearned_at(self) -> float:
        """When the oldest correction arrived that is not learned; infinity without one."""

    def restore(self) -> list[Event]:
        """Put the live versions into force, and queue the pending corrections. Blocks."""

    def update(self, settings: Settings) -> None:
        """Put other settings into force."""

    def accepted(self, accepted: Accepted) -> list[Event]:
        """Take a correction that the journal has accepted."""

    def answered(self, query_id: str) -> None:
        """Note an answer that learning may use."""

    def give_anchors(self, anchors: list[tuple[list[int], list[int]]]) -> None:
        """Take the base model's answers to the anchors, as (prompt ids, output ids)."""

    def give_prefix(self, ids: tuple[int, ...], prefix: PrefixKV) -> None:
        """Take the base model's keys and values for ``ids``."""

    def poll(self) -> list[Event]:
        """Advance as far as possible without waiting."""

    def commit(self, segments: Sequence[tuple[Segment, float]]) -> None:
        """Account for segments that have run, with their seconds."""

    def fail(self, reason: str) -> list[Event]:
        """Give up the running job because the device or the disk has failed."""

    def rollback(self, profile: str, version: int, reason: str,
                 done: Future[RolledBack]) -> None:
        """Make an earlier version live; ``done`` receives the outcome."""

    def versions(self, profile: str) -> Future[list[AdapterVersion]]:
        """Read all versions of a profile, oldest first."""

    def status(self) -> LearningStatus:
        """Return a snapshot."""

    def close(self, reason: str) -> None:
        """End the running job and refuse the rollbacks that wait."""
