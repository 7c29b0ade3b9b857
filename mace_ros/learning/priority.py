# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Which corrections to learn next: expected gain of alignment per second of the device.

That learning should be ordered by gain over cost is MACE's idea (arXiv 2510.03283); its
formula is not public, this one is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
import math
import re


@dataclass(frozen=True)
class Candidate:
    """
    A correction that could be learned, and how the live adapter does on it.

    ``loss`` is the mean of -log p per token of the corrected text, ``margin`` the lead of
    its mean log p over that of the rejected text, both in nats; ``resembling`` counts
    corrections that ask much the same; ``seconds`` is what one step over it costs.
    """

    loss: float
    margin: float
    weight: float = 1.0
    age_s: float = 0.0
    resembling: int = 0
    seconds: float = 1.0


def gain(candidate: Candidate, freshness_s: float) -> float:
    """
    Return what learning a correction is expected to be worth.

    ``weight * (loss + log(1 + e^-margin)) * (1 + log(1 + resembling)) / (1 + age /
    freshness)``: how wrong the live adapter still is, and how often that is met; what was
    asked long ago is asked again less soon.
    """
    wrong = max(candidate.loss, 0.0) + _softplus(-candidate.margin)
    often = 1.0 + math.log1p(candidate.resembling)
    return candidate.weight * wrong * often / (1.0 + candidate.age_s / freshness_s)


def priority(candidate: Candidate, freshness_s: float) -> float:
    """Return the gain per device second."""
    return gain(candidate, freshness_s) / max(candidate.seconds, 1e-9)


def resemble(one: str, other: str) -> bool:
    """Return whether two questions share at least half of their words."""
    a, b = (set(re.findall(r'\w+', text.casefold())) for text in (one, other))
    return bool(a | b) and 2 * len(a & b) >= len(a | b)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
