# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The priority of corrections: expected gain of alignment per second of device time.

Learning in the order of gain over cost is MACE's idea (arXiv 2510.03283). Its formula is not
public; this one is ours.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
import math


@dataclass(frozen=True)
class ScoredCorrection:
    """
    A correction that could be learned, scored under the live version.

    ``loss`` is the mean of -log p per token of the corrected text, and ``margin`` the lead of
    its mean log p over that of the rejected text, both in nats. ``resembling`` counts similar
    questions that were corrected as well; ``seconds`` is the device time of one step.
    """

    loss: float
    margin: float
    weight: float = 1.0
    age_s: float = 0.0
    resembling: int = 0
    seconds: float = 1.0


def gain(candidate: ScoredCorrection, freshness_s: float) -> float:
    """
    Return the expected gain of learning a correction.

    ``weight * (loss + log(1 + e^-margin)) * (1 + log(1 + resembling)) / (1 + age / freshness)``:
    how wrong the live version is, times how often that matters. A question that was asked long
    ago is expected again later.
    """
    wrong = max(candidate.loss, 0.0) + _softplus(-candidate.margin)
    often = 1.0 + math.log1p(candidate.resembling)
    return candidate.weight * wrong * often / (1.0 + candidate.age_s / freshness_s)


def priority(candidate: ScoredCorrection, freshness_s: float) -> float:
    """Return the gain per device second."""
    return gain(candidate, freshness_s) / max(candidate.seconds, 1e-9)


def resemble(one: Set[str], other: Set[str]) -> bool:
    """Return whether two questions, given by their words, share at least half of them."""
    every = one | other
    return bool(every) and 2 * len(one & other) >= len(every)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
