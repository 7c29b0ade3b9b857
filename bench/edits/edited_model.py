# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The interface of the systems that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bench.edits.edit_set import Edit


@dataclass(frozen=True)
class Reply:
    """An answer; ``drew_on`` is the id of the correction that explains it, if there is one."""

    text: str
    drew_on: str = ''


@dataclass(frozen=True)
class Learned:
    """
    How one edit was learned.

    ``seconds`` pass from the correction until it is live; None if the answer was right before.
    ``device_s`` and ``tokens`` are this edit's share of what the device computed and trained.
    ``stages`` are the parts of ``seconds``, by the state of the job, for an edit that comes alone.
    """

    correction_id: str
    state: str              # KNOWN, or the last state of the correction
    seconds: float | None
    device_s: float = 0.0
    tokens: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)


class EditedModel(Protocol):
    """A model that can be edited and asked."""

    def ask(self, questions: Sequence[str]) -> list[Reply]:
        """Return the answers to questions, each of which is a conversation by itself."""

    def learn(self, edits: Sequence[Edit]) -> list[Learned]:
        """Learn edits that come at the same time."""

    def restart(self) -> None:
        """Stop, and start again with what is on disk."""

    def close(self) -> None:
        """Release the model."""
