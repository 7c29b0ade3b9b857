# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What one iteration does, and the state it is decided from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import auto, Enum
from typing import NamedTuple, Protocol

from mace_ros.scheduling.request import Request
from mace_ros.scheduling.waiting_queue import WaitingQueue


class SegmentKind(Enum):
    """A bounded piece of a fine-tune step that runs outside the forward pass."""

    FORWARD = auto()     # one layer, all tokens of the step
    HEAD = auto()        # final norm, logits, loss and their gradient, for a chunk of tokens
    BACKWARD = auto()    # one layer, all tokens of the step
    BACKWARD_RECOMPUTED = auto()  # the same, computing the layer's forward again
    OPTIMIZER = auto()   # the update of all LoRA weights


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment and the number of tokens that it computes."""

    kind: SegmentKind
    tokens: int


class FinetuneWork(Protocol):
    """The current fine-tune step, as far as the scheduler must know it."""

    @property
    def piggyback_tokens(self) -> int:
        """Forward tokens that may still ride in inference passes."""

    @property
    def oldest_correction_at(self) -> float:
        """When the oldest correction that is being learned arrived, on the clock."""

    def segments(self) -> Iterable[Segment]:
        """Return the segments left in this step if nothing more rides, in their order."""


def _all_blocks(request: Request) -> int:
    return len(request.blocks)


def _shares_nothing(request: Request) -> None:
    pass


@dataclass(slots=True)
class State:
    """
    What the scheduler decides from.

    ``running`` is in order of arrival. ``free_tokens`` is how many tokens the KV cache can
    still take on; negative if some must leave. Of its ``capacity_tokens``, None is unknown.
    ``frees`` says how many blocks preempting a request makes free; ``get_computed_blocks``
    updates how many tokens a waiting request would share.
    """

    waiting: WaitingQueue = field(default_factory=WaitingQueue)
    running: list[Request] = field(default_factory=list)
    finetune: FinetuneWork | None = None
    free_tokens: int = 0
    capacity_tokens: int | None = None
    frees: Callable[[Request], int] = _all_blocks
    get_computed_blocks: Callable[[Request], object] = _shares_nothing

    @property
    def has_requests(self) -> bool:
        """Whether any query waits or runs."""
        return bool(self.waiting or self.running)


class PassShape(NamedTuple):
    """
    Size of a hybrid pass, in tokens: what its time is predicted from.

    The contexts count, summed over the decode rows or the prefill tokens, how many
    tokens each one attends to.
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


EMPTY = PassShape()


class PrefillChunk(NamedTuple):
    """The next ``tokens`` tokens of a request's prompt."""

    request: Request
    tokens: int


@dataclass(frozen=True, slots=True)
class Rejection:
    """A waiting request that is turned away, and why: by its objective, or its size."""

    request: Request
    reason: str
    too_large: bool = False


class Plan(NamedTuple):
    """
    One iteration: at most one hybrid pass, then some fine-tune segments.

    First the running requests in ``preempted`` lose their KV blocks and wait again, since
    the others need them. A waiting request in ``prefill`` is thereby admitted.
    ``finetune_tokens`` ride in the pass. Of the current step's remaining segments the first
    ``segments`` run after it; if ``interruptible``, they stop early when a query arrives. A
    plan that does nothing may name the time at which to ask again. ``lacks_memory`` says that
    somebody waits, or was preempted, for nothing but KV blocks. ``shape`` is the pass's size
    when it was planned: its requests have moved on by the time it is measured.
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
    shape: PassShape = EMPTY

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
    """How long the parts of an iteration took, in seconds."""

    plan: Plan
    pass_s: float = 0.0
    segments: tuple[tuple[Segment, float], ...] = ()
