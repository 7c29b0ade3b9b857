# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Weight interpolation between the live version and the trained weights.

A job trains further than its corrections need. The point nearest to the live version at which
they are still learned changes other answers least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mace_ros.finetune.sample import Sample, SampleScore
from mace_ros.learning.task import Task
from mace_ros.learning.training import Training

PRECISION = 1 / 8       # of the share that is kept: found with three bisections


def interpolate(training: Training, start: Mapping[str, Tensor], samples: Sequence[Sample],
                still_learned: Callable[[Sequence[SampleScore]], bool],
                ) -> Task[list[SampleScore] | None]:
    """
    Leave the weights at the smallest share of the trained change with which all is still learned.

    ``start`` are the weights that the job began with. Returns the scores of ``samples`` under
    the weights that are kept; None if those are the trained ones.
    """
    trained = training.lora.copies()
    scores, too_little, enough = None, 0.0, 1.0
    while enough - too_little > PRECISION:
        share = (too_little + enough) / 2
        training.set_weights(_between(start, trained, share))
        scored = yield from training.score(samples)
        if still_learned(scored.scores):
            enough, scores = share, scored.scores
        else:
            too_little = share
    training.set_weights(_between(start, trained, enough))
    return scores


def _between(start: Mapping[str, Tensor], end: Mapping[str, Tensor],
             share: float) -> dict[str, Tensor]:
    return {name: torch.lerp(start[name], tensor, share) for name, tensor in end.items()}
