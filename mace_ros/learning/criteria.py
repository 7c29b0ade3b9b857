# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""When an answer counts as right, and a correction as learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import math
from statistics import fmean

from mace_ros.finetune.sample import Sample, SampleScore

# Smallest lead of each right token, in logits. An answer with this lead stays right when another
# batch adds its terms in another order.
RIGHT_MARGIN = 0.5
# The lead up to which a correction is trained: with it, paraphrases are answered right, too.
LEARNED_MARGIN = 1.0
# The score of an answer that is known to be right.
RIGHT = SampleScore(log_probability=0.0, tokens=0, exact=True, margin=math.inf)


def learned_well(scores: Sequence[SampleScore], count: int) -> bool:
    """Return whether the first ``count`` scores are learned, and the others right."""
    return (all(s.margin >= LEARNED_MARGIN for s in scores[:count])
            and all(s.margin >= RIGHT_MARGIN for s in scores[count:]))


@dataclass(frozen=True)
class StepScores:
    """
    Scores of the samples that must be right, from the forward of a step.

    The corrections come first.
    """

    samples: tuple[Sample, ...]
    scores: tuple[SampleScore, ...]
    corrections: int

    @property
    def learned_well(self) -> bool:
        """Whether training may end."""
        return learned_well(self.scores, self.corrections)

    @property
    def right(self) -> list[bool]:
        """Which of the corrections are right."""
        return [s.margin >= RIGHT_MARGIN for s in self.scores[:self.corrections]]

    @property
    def mean(self) -> float:
        """Mean log p per token of the corrected texts."""
        return fmean(s.log_probability for s in self.scores[:self.corrections])
