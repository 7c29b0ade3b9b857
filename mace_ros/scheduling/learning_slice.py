# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Pieces of fine-tune work, cut to the time that there is for them."""

from __future__ import annotations

import math
from typing import NamedTuple

from mace_ros.scheduling.batching import Batch, LEAST_CHUNK
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.plan import FinetuneWork, Plan, SegmentKind


class LearningSlice(NamedTuple):
    """
    Learning of one iteration: tokens that ride in its pass, or segments after it.

    ``seconds`` is what it adds to the iteration, as predicted.
    """

    tokens: int = 0
    segments: int = 0
    seconds: float = 0.0


EMPTY_SLICE = LearningSlice()


def segments_within(work: FinetuneWork, cost: CostModel, seconds: float, *,
                    at_least: int = 0) -> LearningSlice:
    """Return the next segments that surely end within ``seconds``, ``at_least`` so many."""
    count, predicted, upper = 0, 0.0, 0.0
    last, each_s, each_upper = None, 0.0, 0.0
    for segment in work.segments():
        if segment is not last:   # mostly they are many of one kind
            last = segment
            each_s = cost.segment_s(segment.kind, segment.tokens)
            each_upper = cost.segment_s(segment.kind, segment.tokens, upper=True)
        upper += each_upper
        if upper > seconds and count >= at_least:
            break
        count += 1
        predicted += each_s
    return LearningSlice(segments=count, seconds=predicted)


def tokens_within(work: FinetuneWork, cost: CostModel, batch: Batch, pass_s: float,
                  max_tokens: int, *, at_least: int = 0) -> LearningSlice:
    """
    Return the most tokens with which the pass surely ends within ``pass_s``.

    ``at_least`` so many if the pass has the room of ``max_tokens`` for them.
    """
    most = min(work.piggyback_tokens, max_tokens - batch.shape.tokens)
    low, high = 0, max(most, 0)
    middle = high
    while low < high:
        shape = batch.shape._replace(finetune_tokens=middle)
        if cost.pass_s(*shape, upper=True) <= pass_s:
            low = middle
        else:
            high = middle - 1
        middle = (low + high + 1) // 2
    tokens = max(low, min(at_least, most))
    if tokens <= 0 or (not at_least and tokens < min(LEAST_CHUNK, work.piggyback_tokens)):
        return EMPTY_SLICE
    shape = batch.shape._replace(finetune_tokens=tokens)
    return LearningSlice(tokens=tokens, seconds=cost.pass_s(*shape) - batch.seconds)


def next_slice(work: FinetuneWork, cost: CostModel, batch: Batch, seconds: float,
               max_tokens: int) -> LearningSlice:
    """
    Return the next piece within ``seconds`` of device time; the least there is if none fits.

    Segments, unless the forward began to ride: then it must go on in passes, alone if
    need be.
    """
    piece = segments_within(work, cost, seconds, at_least=1)
    if piece.segments:
        return piece
    return tokens_within(work, cost, batch, batch.seconds + seconds, max_tokens,
                         at_least=LEAST_CHUNK)


def rest_of_step(work: FinetuneWork, cost: CostModel, batch: Batch,
                 max_tokens: int) -> LearningSlice:
    """Return all that is left of the step, or of its forward if that began to ride."""
    return next_slice(work, cost, batch, math.inf, max_tokens)


def piggyback_saves_s(work: FinetuneWork, cost: CostModel) -> float:
    """
    Return the device time saved later on for each token of the forward that rides now.

    They need no forward of their own. But a forward that rides keeps no layer graphs:
    where it would have kept them alone, each layer of the backward is computed twice.
    """
    forward_s = again_s = 0.0
    last, each = None, 0.0
    for segment in work.segments():
        kind = segment.kind
        if kind is SegmentKind.FORWARD:
            if segment is not last:
                each = cost.segment_s(kind, segment.tokens)
            forward_s += each
        elif kind is SegmentKind.BACKWARD:
            if segment is not last:
                # Upper: the two nearly cancel out, and a forward that rides by mistake costs
                # more than one that does not.
                each = (cost.segment_s(SegmentKind.BACKWARD_RECOMPUTED, segment.tokens, upper=True)
                        - cost.segment_s(kind, segment.tokens))
            again_s += each
        last = segment
    if last is None:
        return math.inf   # it began to ride: there is no other way
    return (forward_s - max(again_s, 0.0)) / work.piggyback_tokens


def plan_of(batch: Batch, piece: LearningSlice = EMPTY_SLICE, *, interruptible: bool = True,
            wake_at: float | None = None) -> Plan:
    """Return the plan that runs ``batch`` and ``piece``."""
    return Plan(
        decode=batch.decode, prefill=batch.prefill, finetune_tokens=piece.tokens,
        segments=piece.segments, interruptible=interruptible, rejected=batch.rejected,
        preempted=batch.preempted, lacks_memory=batch.lacks_memory,
        predicted_s=batch.seconds + piece.seconds, wake_at=wake_at,
        shape=batch.shape._replace(finetune_tokens=piece.tokens)
        if piece.tokens else batch.shape)
