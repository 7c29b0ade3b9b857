# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Tasks: generators that yield the events that they wait for, and reports.

The learner resumes its task at each poll. Before it yields an event to wait for, a task has
checked that it cannot continue without it.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias, TypeVar

from mace_ros.api.events import AdapterVersion, CorrectionStatus
from mace_ros.finetune.step import FinetuneStep

T = TypeVar('T')


@dataclass(frozen=True)
class Until:
    """Wait for a time on the engine's clock, in seconds."""

    time: float


class Pause(Enum):
    """Wait for an event that causes a poll by itself; NEXT_POLL requests one."""

    NEXT_POLL = 'the next poll, so that requests can be served in between'
    ANCHORS = "the base model's answers to the anchors"
    PREFIX = "the base model's keys and values for a prefix"
    JOB = 'a job that is saving its version'


@dataclass(frozen=True)
class RetryNotice:
    """
    Report why the device or the disk delays a job.

    The status shows it until a version is published or the learner is idle.
    """

    reason: str


Wait: TypeAlias = FinetuneStep | Future[Any] | Until | Pause
Report: TypeAlias = CorrectionStatus | AdapterVersion | RetryNotice
# A generator that returns a T.
Task: TypeAlias = Generator[Wait | Report, None, T]


def on_disk(future: Future[T]) -> Task[T]:
    """Wait for work of the journal's thread; return its result or raise its error."""
    while not future.done():
        yield future
    return future.result()
