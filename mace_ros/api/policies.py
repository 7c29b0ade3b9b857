# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The scheduling policies by name, and how learning behaves under each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LearningTraits:
    """
    How corrections are learned under a policy.

    - ``scores_first``: corrections are scored before they are trained. Drift, priorities, joining
      a running job, interpolation and the regression check need these scores.
    - ``rehearses``: corrections that are learned already are trained again and again.
    """

    scores_first: bool = False
    rehearses: bool = False


# The values of the parameter ``scheduler.policy``.
POLICIES: Mapping[str, LearningTraits] = {
    'mace': LearningTraits(scores_first=True),
    'inference_only': LearningTraits(),
    'continuous': LearningTraits(rehearses=True),
    'periodic': LearningTraits(),
    'static_split': LearningTraits(),
}
