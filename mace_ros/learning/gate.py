# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Whether a trained adapter may be published: it is weighed against the live one.

Guarded answers are scored twice, under the live version and under the candidate. The score
of what was taught is the share that greedy decoding gives word for word; that of other
answers is their probability per token, for of a small model many words may change while
what they say does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
import math
from statistics import fmean

from mace_ros.finetune.sample import Sample, SampleScore
from mace_ros.learning.samples import own_tokens

# Tokens scored at once: one layer of them is a piece that a query can wait for.
BATCH_TOKENS = 256


class Measure(Enum):
    """What of the guarded answers counts."""

    EXACT = 'exact'                  # greedy decoding gives it, word for word
    PROBABILITY = 'probability'      # per token, the geometric mean


@dataclass(frozen=True)
class Group:
    """Guarded samples of one kind, with what a reason calls them."""

    name: str
    samples: tuple[Sample, ...]
    measure: Measure
    must_rise: bool = False


@dataclass(frozen=True)
class Verdict:
    """Why a candidate may not be published ('' if it may), and the samples that it lost."""

    reason: str
    lost: tuple[Sample, ...] = ()


class Gate:
    """The guarded samples of one job."""

    def __init__(self, groups: Sequence[Group]) -> None:
        """Guard these; a group may be empty."""
        self._groups = tuple(group for group in groups if group.samples)

    @property
    def samples(self) -> list[Sample]:
        """All samples, in the order in which they are judged."""
        return [sample for group in self._groups for sample in group.samples]

    @property
    def exact(self) -> list[Sample]:
        """Those that greedy decoding should give, word for word."""
        return [sample for group in self._groups if group.measure is Measure.EXACT
                for sample in group.samples]

    def wrong(self, scores: Sequence[SampleScore]) -> list[Sample]:
        """Return what greedy decoding should give and does not, by the scores of all samples."""
        must_be_exact = [group.measure is Measure.EXACT
                         for group in self._groups for _ in group.samples]
        return [sample for sample, must, score
                in zip(self.samples, must_be_exact, scores, strict=True)
                if must and not score.exact]

    def judge(self, before: Sequence[SampleScore], after: Sequence[SampleScore],
              tolerance: float) -> Verdict:
        """
        Compare the scores of all samples under the live version and under the candidate.

        No group's score may fall by more than ``tolerance``; one that must rise may not
        fall at all.
        """
        reasons: list[str] = []
        lost: list[Sample] = []
        start = 0
        for group in self._groups:
            rows = slice(start, start + len(group.samples))
            start = rows.stop
            pairs = list(zip(before[rows], after[rows], strict=True))
            had, has = (fmean(_value(s, group.measure) for s in side)
                        for side in zip(*pairs, strict=True))
            limit = had if group.must_rise else had - tolerance
            if has < limit - 1e-6:
                reasons.append(f'{group.name}: {had:.2f} would become {has:.2f}')
            if group.measure is Measure.EXACT:
                lost += [s for s, (b, a) in zip(group.samples, pairs, strict=True)
                         if b.exact and not a.exact]
        reason = f'{"; ".join(reasons)} (gate.tolerance {tolerance:g})' if reasons else ''
        return Verdict(reason, tuple(lost))


def batches(samples: Sequence[Sample], most: int = BATCH_TOKENS, *,
            shared: int = 0) -> Iterator[list[Sample]]:
    """
    Yield samples in order, some at a time: ``most`` tokens if possible.

    The ``shared`` tokens that all begin with count once.
    """
    batch: list[Sample] = []
    tokens = shared
    for sample in samples:
        own = own_tokens(sample, shared)
        if batch and tokens + own > most:
            yield batch
            batch, tokens = [], shared
        batch.append(sample)
        tokens += own
    if batch:
        yield batch


def _value(score: SampleScore, measure: Measure) -> float:
    return float(score.exact) if measure is Measure.EXACT else math.exp(score.log_probability)
