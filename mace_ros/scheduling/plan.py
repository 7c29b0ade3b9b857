# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The scheduler's input and output: the state of the engine, and the plan of one iteration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import auto, Enum
from typing import NamedTuple, Protocol

from mace_ros.scheduling.request import Request
from mace_ros.scheduling.waiting_queue import WaitingQueue


class SegmentKind(Enum):
    """Kinds of fine-tune segments: bounded parts of a step that run outside the forward pass."""

    FORWARD = auto()     # one layer, all tokens of the step
    HEAD = auto()        # final norm, logits, loss and their gradient, for a chunk of tokens
    BACKWARD = auto()    # one layer, all tokens of the step
    BACKWARD_RECOMPUTED = auto()  # the same, after computing the layer's forward again
    OPTIMIZER = auto()   # update of all LoRA weights


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment and the number of tokens that it computes."""

    kind: SegmentKind
    tokens: int


class FinetuneWork(Protocol):
    """The scheduler's view of the current fine-tune step."""

    @property
    def piggyback_tokens(self) -> int:
        """Forward tokens that can still be piggybacked on inference passes."""

    @property
    def oldest_correction_at(self) -> float:
        """Arrival time of the oldest correction in the step, on the scheduler's clock."""

    def segments(self) -> Iterable[Segment]:
        """
        Return the remaining segments in order, if no more tokens are piggybacked.

        There are none while a forward that began piggybacked is unfinished.
        """


class CacheView(Protocol):
    """The scheduler's view of the KV cache."""

    @property
    def free_tokens(self) -> int:
        """Tokens that the free blocks can hold; negative if some requests must be preempted."""

    @property
    def capacity_tokens(self) -> int:
        """Tokens that a request can use when it is alone in the cache."""

    def blocks_freed_by(self, request: Request) -> int:
        """Return how many blocks preempting a running request would free."""

    def get_computed_blocks(self, request: Request) -> list[int]:
        """
        Look up the cached blocks that a waiting request would share.

        Updates the request's ``computed_tokens`` and ``shared_blocks``.
        """


@dataclass(slots=True)
class State:
    """The input of a plan; ``running`` is in order of arrival."""

    cache: CacheView
    waiting: WaitingQueue = field(default_factory=WaitingQueue)
    running: list[Request] = field(default_factory=list)
    finetune: FinetuneWork | None = None

    @property
    def has_requests(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting or self.running)


class PassShape(NamedTuple):
    """
    Size of a hybrid pass in tokens; the cost model predicts its time from this.

    A context is the number of tokens attended to, summed over the decode rows or over the
    prefill tokens.
    """

    decode_rows: int = 0
    decode_context: int = 0
    prefill_tokens: int = 0
    prefill_context: int = 0
    finetune_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that go through the layers."""
        return self.decode_rows + self.prefill_tokens + self.finetune_tokens


EMPTY_SHAPE = PassShape()


class PrefillChunk(NamedTuple):
    """The next ``tokens`` tokens of a request's prompt."""

    request: Request
    tokens: int


@dataclass(frozen=True, slots=True)
class Rejection:
    """A waiting request that is rejected: it would miss its SLO, or is ``too_large``."""

    request: Request
    reason: str
    too_large: bool = False


class Plan(NamedTuple):
    """
    One iteration: at most one hybrid pass, then some fine-tune segments.

    Executed in this order:

    1. The running requests in ``preempted`` lose their KV blocks and wait again.
    2. Waiting requests in ``prefill`` are admitted.
    3. The pass computes ``decode``, ``prefill`` and ``finetune_tokens`` piggybacked tokens.
    4. The first ``segments`` remaining segments of the fine-tune step run. If ``interruptible``,
       they stop early when a query or another message arrives.

    An empty plan may set ``wake_at``, the time at which to plan again. ``lacks_memory`` says
    that a request waits or was preempted only for want of KV blocks. ``shape`` is the size of
    the pass at planning time: the requests have advanced by the time the pass is measured.
    """

    decode: tuple[Request, ...] = ()
    prefill: tuple[PrefillChunk, ...] = ()
    finetune_tokens: int = 0
    segments: int = 0
    interruptible: bool = True
    rejected: tuple[Rejection, ...] = ()
    preempted: tuple[Request, ...] = ()
    lacks_memory: bool = False
    predicted_s: float = 0.0
    wake_at: float | None = None
    shape: PassShape = EMPTY_SHAPE

    @property
    def has_pass(self) -> bool:
        """Whether the iteration runs the model forward."""
        return bool(self.decode or self.prefill or self.finetune_tokens)

    @property
    def is_empty(self) -> bool:
        """Whether the iteration does nothing."""
        return not (self.has_pass or self.segments or self.preempted)


@dataclass(frozen=True, slots=True)
class Measurement:
    """Measured seconds of an iteration's pass and of each segment that ran."""

    plan: Plan
    pass_s: float = 0.0
    segments: tuple[tuple[Segment, float], ...] = ()
