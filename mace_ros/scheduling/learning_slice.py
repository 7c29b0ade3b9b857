# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Learning slices: the part of a fine-tune step that one iteration runs."""

from __future__ import annotations

import math
from typing import NamedTuple

from mace_ros.scheduling.batching import Batch
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.plan import FinetuneWork, Plan, SegmentKind

# Fewer fine-tune tokens are not worth their share of a pass, unless fewer are left.
MIN_PIGGYBACK_TOKENS = 16


class LearningSlice(NamedTuple):
    """
    The learning of one iteration: tokens piggybacked on its pass, or segments after it.

    ``seconds`` is the predicted time that the slice adds to the iteration.
    """

    tokens: int = 0
    segments: int = 0
    seconds: float = 0.0


EMPTY_SLICE = LearningSlice()


def segments_within(work: FinetuneWork, cost: CostModel, seconds: float, *,
                    minimum: int = 0) -> LearningSlice:
    """Return the next segments that end within ``seconds``, but at least ``minimum`` of them."""
    count, predicted, upper = 0, 0.0, 0.0
    last, segment_s, segment_upper = None, 0.0, 0.0
    for segment in work.segments():
        if segment is not last:   # steps repeat the same segment for each layer
            last = segment
            segment_s = cost.segment_s(segment.kind, segment.tokens)
            segment_upper = cost.segment_s(segment.kind, segment.tokens, upper=True)
        upper += segment_upper
        if upper > seconds and count >= minimum:
            break
        count += 1
        predicted += segment_s
    return LearningSlice(segments=count, seconds=predicted)


def piggyback_within(work: FinetuneWork, cost: CostModel, batch: Batch, pass_s: float,
                     max_tokens: int, *, minimum: int = 0) -> LearningSlice:
    """
    Return the most piggybacked tokens with which the pass ends within ``pass_s``.

    At least ``minimum`` tokens, if a pass of ``max_tokens`` has room for them.
    """
    limit = min(work.piggyback_tokens, max_tokens - batch.shape.tokens)
    low, high = 0, max(limit, 0)
    middle = high
    while low < high:
        shape = batch.shape._replace(finetune_tokens=middle)
        if cost.pass_s(*shape, upper=True) <= pass_s:
            low = middle
        else:
            high = middle - 1
        middle = (low + high + 1) // 2
    tokens = max(low, min(minimum, limit))
    if tokens <= 0 or (not minimum and tokens < min(MIN_PIGGYBACK_TOKENS, work.piggyback_tokens)):
        return EMPTY_SLICE
    shape = batch.shape._replace(finetune_tokens=tokens)
    return LearningSlice(tokens=tokens, seconds=cost.pass_s(*shape) - batch.seconds)


def next_slice(work: FinetuneWork, cost: CostModel, batch: Batch, seconds: float,
               max_tokens: int) -> LearningSlice:
    """
    Return the next slice that ends within ``seconds``, or the smallest slice if none does.

    The slice consists of segments, unless the step's forward began piggybacked: then the forward
    must be finished in passes, if need be in passes without requests.
    """
    segments = segments_within(work, cost, seconds, minimum=1)
    if segments.segments:
        return segments
    return piggyback_within(work, cost, batch, batch.seconds + seconds, max_tokens,
                            minimum=MIN_PIGGYBACK_TOKENS)


def piggyback_saves_s(work: FinetuneWork, cost: CostModel) -> float:
    """
    Return the device time that each piggybacked forward token saves later.

    It needs no forward segment. But a piggybacked forward keeps no autograd graphs: where the
    forward segments would have kept them, each layer of the backward is recomputed.
    """
    forward_s = recompute_s = 0.0
    last, segment_s = None, 0.0
    for segment in work.segments():
        kind = segment.kind
        if kind is SegmentKind.FORWARD:
            if segment is not last:
                segment_s = cost.segment_s(kind, segment.tokens)
            forward_s += segment_s
        elif kind is SegmentKind.BACKWARD:
            if segment is not last:
                # Upper, because the two nearly cancel out, and piggybacking wrongly costs more
                # than not piggybacking.
                segment_s = (
                    cost.segment_s(SegmentKind.BACKWARD_RECOMPUTED, segment.tokens, upper=True)
                    - cost.segment_s(kind, segment.tokens))
            recompute_s += segment_s
        last = segment
    if last is None:
        return math.inf   # the forward began piggybacked and cannot be finished otherwise
    return (forward_s - max(recompute_s, 0.0)) / work.piggyback_tokens


def make_plan(batch: Batch, learning: LearningSlice = EMPTY_SLICE, *, interruptible: bool = True,
              wake_at: float | None = None) -> Plan:
    """Return the plan that runs ``batch`` and ``learning``."""
    return Plan(
        decode=batch.decode, prefill=batch.prefill, finetune_tokens=learning.tokens,
        segments=learning.segments, interruptible=interruptible, rejected=batch.rejected,
        preempted=batch.preempted, lacks_memory=batch.lacks_memory,
        predicted_s=batch.seconds + learning.seconds, wake_at=wake_at,
        shape=batch.shape._replace(finetune_tokens=learning.tokens)
        if learning.tokens else batch.shape)
