# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What is known of a job: the corrections of one profile, on their way to a version."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
import math

from torch import Tensor

from mace_ros.api.events import Event
from mace_ros.finetune.null_space import InputSubspace
from mace_ros.finetune.sample import Sample, SampleScore
from mace_ros.finetune.step import FinetuneStep
from mace_ros.finetune.trainer import AccumulationWindow, Trainer
from mace_ros.learning.backoff import Backoff
from mace_ros.learning.gate import Gate
from mace_ros.learning.outcomes import SuspectedRegression
from mace_ros.store.journal import AnswerRecord, CorrectionRecord, VersionRecord


@dataclass
class PendingCorrection:
    """A correction that is to be learned."""

    record: CorrectionRecord
    arrived: float    # on the engine's clock
    tries: int = 1
    repeats: int = 0  # earlier corrections of the same question that it took the place of ...
    since: float = math.inf     # ... of which the first arrived then
    leads: tuple[float, ...] = ()   # mean log p of its texts when it was scored
    reference: float = 0.0    # log p(corrected) - log p(rejected) under the live version

    @property
    def waits_since(self) -> float:
        """Since when somebody waits for this question to be answered right."""
        return min(self.arrived, self.since)


@dataclass
class JobInputs:
    """What a job needs from disk; tensors are let go of once they are taken up."""

    live: VersionRecord | None                  # what the job begins from; None: the base model
    answers: tuple[AnswerRecord, ...]                 # given earlier, to be replayed
    learned: tuple[CorrectionRecord, ...]       # learned earlier, to be kept
    tensors: dict[str, Tensor] | None           # of the live version; None: the base model
    better: dict[str, Tensor] | None = None     # of the one that it is compared with; as above

    def take(self) -> dict[str, Tensor] | None:
        """Return the live version's, the first time."""
        tensors, self.tensors = self.tensors, None
        return tensors

    def take_better(self) -> dict[str, Tensor] | None:
        """Return the other one's, the first time."""
        better, self.better = self.better, None
        return better


@dataclass
class Scoring:
    """Scores of samples, batch by batch, and who waits for them."""

    batches: Iterator[list[Sample]]
    done: Callable[[list[SampleScore], list[Sample]], list[Event]]
    chunk_tokens: int       # of a layer, computed at once
    directions: InputSubspace | None = None
    step: FinetuneStep | None = None
    scores: list[SampleScore] = field(default_factory=list)
    taught: list[Sample] = field(default_factory=list)


@dataclass
class PullingBack:
    """Between which shares of what a job trained lies the one that is just enough."""

    samples: Sequence[Sample]       # that must be right
    still_learned: Callable[[Sequence[SampleScore]], bool]
    done: Callable[[], list[Event]]
    trained: dict[str, Tensor]
    too_little: float = 0.0
    enough: float = 1.0


@dataclass
class Job:
    """Corrections that are learned together, and how far that has come."""

    profile: str
    corrections: list[PendingCorrection]
    fetched: Future[JobInputs]
    begun: float = 0.0      # on the engine's clock
    parent: int = 0         # known with what is fetched
    samples: list[Sample] = field(default_factory=list)
    variants: list[Sample] = field(default_factory=list)    # in other words
    kept: list[Sample] = field(default_factory=list)        # earlier corrections
    forgotten: list[Sample] = field(default_factory=list)   # of these, by the live version
    replayed: list[Sample] = field(default_factory=list)    # what else is to stay
    trainer: Trainer | None = None
    began_with: dict[str, Tensor] = field(default_factory=dict)     # the live version's weights
    trained: dict[str, Tensor] | None = None    # its own, while those are in their place
    step: FinetuneStep | None = None
    # Of the step, those to come.
    parts: deque[tuple[list[Sample], AccumulationWindow]] = field(default_factory=deque)
    chunk_tokens: int = 0               # of a layer, computed at once
    gate: Gate | None = None
    told: set[str] = field(default_factory=set)     # of which corrections it was said: TRAINING
    scoring: Scoring | None = None
    sparing: Iterator[None] | None = None   # piece by piece, what learning is to spare is found
    before: list[SampleScore] = field(default_factory=list)     # of what the gate guards
    lost: list[Sample] = field(default_factory=list)    # that an earlier candidate lost
    repaired: bool = False              # trained on for what a candidate had lost
    rejections: int = 0                 # of its candidates: then more is replayed
    after: dict[tuple[int, ...], SampleScore] = field(default_factory=dict)
    rehearses: bool = False             # what was learned already
    suspicion: SuspectedRegression | None = None  # it learns nothing, but compares two versions
    least_steps: int = 0                # before it may end
    judged: bool = False                # this step's scores were looked at
    must_be_right: int = 0              # of its samples, the first so many
    steps: int = 0
    train_tokens: int = 0
    train_seconds: float = 0.0
    score_before: float = math.nan
    score_after: float | None = None    # set when training has ended
    saving: Future[tuple[VersionRecord, tuple[str, ...]]] | None = None
    slot: int | None = None
    publication: Backoff = field(default_factory=Backoff)     # while disk or slot refuses it

    @property
    def has_changed_weights(self) -> bool:
        """Whether what it trains is no longer the version that it began from."""
        return self.steps > 0 or (self.step is not None and self.step.done and not self.parts)
