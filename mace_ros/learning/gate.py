# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The gate: a candidate is published only if it gives the guarded answers word for word.

These are earlier corrections, and tool calls, which a program reads. Greedy decoding must give
each of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from mace_ros.finetune.sample import Sample, SampleScore

# Tokens that are scored at once: a query waits for one layer of them at most.
BATCH_TOKENS = 256


class Gate:
    """The guarded samples of one job, by their kinds."""

    def __init__(self, kinds: Mapping[str, Sequence[Sample]]) -> None:
        """Guard these samples; the names of their kinds are in the reason of a rejection."""
        self._kinds = kinds

    @property
    def samples(self) -> list[Sample]:
        """All guarded samples."""
        return [sample for samples in self._kinds.values() for sample in samples]

    def without(self, samples: Collection[Sample]) -> Gate:
        """Return a gate that does not guard these samples."""
        return Gate({name: [s for s in own if s not in samples]
                     for name, own in self._kinds.items()})

    def reason(self, lost: Collection[Sample]) -> str:
        """Return why a candidate that has lost these samples is rejected."""
        counts = ((name, len(own), sum(s in lost for s in own))
                  for name, own in self._kinds.items())
        return '; '.join(f'{name}: {gone} of {count} would be lost'
                         for name, count, gone in counts if gone)


def wrong(samples: Sequence[Sample], scores: Sequence[SampleScore]) -> list[Sample]:
    """Return the samples that greedy decoding does not give, by their scores."""
    return [sample for sample, score in zip(samples, scores, strict=True) if not score.exact]


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
