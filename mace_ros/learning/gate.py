# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Whether a trained adapter may be published: what it would lose is weighed against the live one.

Guarded answers are scored twice, under the live version and under the candidate. What
counts is greedy decoding: an answer that the live version gives, word for word, and the
candidate would not give, is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mace_ros.execution.finetune import Sample, SampleScore

# Tokens scored at once: one layer of them is a piece that a query can wait for.
BATCH_TOKENS = 256


@dataclass(frozen=True)
class Verdict:
    """Why a candidate may not be published ('' if it may), and the samples that it lost."""

    reason: str
    lost: tuple[Sample, ...] = ()


class Gate:
    """The guarded samples of one job, in groups with a name."""

    def __init__(self, groups: Mapping[str, Sequence[Sample]]) -> None:
        """Guard these; a group may be empty."""
        self._groups = {name: tuple(samples) for name, samples in groups.items() if samples}

    def batches(self) -> Iterator[list[Sample]]:
        """Yield all samples in order, some at a time."""
        batch: list[Sample] = []
        tokens = 0
        for sample in (s for samples in self._groups.values() for s in samples):
            if batch and tokens + len(sample.tokens) > BATCH_TOKENS:
                yield batch
                batch, tokens = [], 0
            batch.append(sample)
            tokens += len(sample.tokens)
        if batch:
            yield batch

    def judge(self, before: Sequence[SampleScore], after: Sequence[SampleScore],
              tolerance: float) -> Verdict:
        """
        Compare the scores of all samples, in the order of :meth:`batches`.

        No group may lose more than ``tolerance`` (a share) of the answers that it had.
        """
        reasons, lost = [], []
        start = 0
        for name, samples in self._groups.items():
            rows = range(start, start + len(samples))
            start += len(samples)
            had = [i for i in rows if before[i].exact]
            gone = [i for i in had if not after[i].exact]
            lost += [samples[i - rows.start] for i in gone]
            if len(gone) > tolerance * len(had):
                reasons.append(f'{len(gone)} of {len(had)} {name} would change')
        if not reasons:
            return Verdict('')
        return Verdict(f'{"; ".join(reasons)} (gate.tolerance {tolerance:g})', tuple(lost))
