# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The gate: a candidate is published only if it keeps what the live version has, within limits.

Guarded samples are scored under the live version and under the candidate. Earlier corrections and
tool calls count by the share that greedy decoding gives word for word. Other answers count by
their probability per token, because a small model may change many words and not their meaning.
No group's score may fall by more than ``gate.tolerance``, and that of some groups not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
import math
from statistics import fmean

from mace_ros.finetune.sample import Sample, SampleScore

# Tokens that are scored at once: a query waits for one layer of them at most.
BATCH_TOKENS = 256


class Measure(Enum):
    """How guarded samples are measured."""

    EXACT = 'exact'                  # greedy decoding gives it, word for word
    PROBABILITY = 'probability'      # per token, the geometric mean


@dataclass(frozen=True)
class Group:
    """
    Guarded samples of one kind; ``name`` is what a rejection's reason calls them.

    With ``may_not_fall``, its score may stay as it is, but not fall at all.
    """

    name: str
    samples: tuple[Sample, ...]
    measure: Measure
    may_not_fall: bool = False


@dataclass(frozen=True)
class Verdict:
    """The gate's decision; an empty reason approves publication."""

    reason: str
    lost: tuple[Sample, ...] = ()   # exact under the live version, not under the candidate


class Gate:
    """The guarded samples of one job."""

    def __init__(self, groups: Sequence[Group]) -> None:
        """Guard these groups; empty ones are left out."""
        self._groups = tuple(group for group in groups if group.samples)

    @property
    def samples(self) -> list[Sample]:
        """All guarded samples; scores are given in this order."""
        return [sample for group in self._groups for sample in group.samples]

    @property
    def exact(self) -> list[Sample]:
        """The samples that greedy decoding should give word for word."""
        return [sample for group in self._groups if group.measure is Measure.EXACT
                for sample in group.samples]

    def wrong(self, scores: Sequence[SampleScore]) -> list[Sample]:
        """Return the exact samples that greedy decoding does not give, by all samples' scores."""
        must_be_exact = [group.measure is Measure.EXACT
                         for group in self._groups for _ in group.samples]
        return [sample for sample, must, score
                in zip(self.samples, must_be_exact, scores, strict=True)
                if must and not score.exact]

    def judge(self, before: Sequence[SampleScore], after: Sequence[SampleScore],
              tolerance: float) -> Verdict:
        """
        Compare the scores of all samples under the live version and under the candidate.

        No group's score may fall by more than ``tolerance``, and that of a group with
        ``may_not_fall`` may not fall at all.
        """
        reasons: list[str] = []
        lost: list[Sample] = []
        start = 0
        for group in self._groups:
            rows = slice(start, start + len(group.samples))
            start = rows.stop
            pairs = list(zip(before[rows], after[rows], strict=True))
            old, new = (fmean(_value(s, group.measure) for s in side)
                        for side in zip(*pairs, strict=True))
            limit = old if group.may_not_fall else old - tolerance
            if new < limit - 1e-6:
                allowed = '' if group.may_not_fall else f' (gate.tolerance {tolerance:g})'
                reasons.append(f'{group.name}: {old:.2f} would become {new:.2f}{allowed}')
            if group.measure is Measure.EXACT:
                lost += [s for s, (live, candidate) in zip(group.samples, pairs, strict=True)
                         if live.exact and not candidate.exact]
        return Verdict('; '.join(reasons), tuple(lost))


def batches(samples: Sequence[Sample], most: int = BATCH_TOKENS) -> Iterator[list[Sample]]:
    """Yield samples in order, in batches of ``most`` tokens if possible."""
    batch: list[Sample] = []
    tokens = 0
    for sample in samples:
        if batch and tokens + sample.own_tokens > most:
            yield batch
            batch, tokens = [], 0
        batch.append(sample)
        tokens += sample.own_tokens
    if batch:
        yield batch


def _value(score: SampleScore, measure: Measure) -> float:
    return float(score.exact) if measure is Measure.EXACT else math.exp(score.log_probability)
