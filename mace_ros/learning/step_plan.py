# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The samples of an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

from mace_ros.finetune.sample import Preference, Sample


@dataclass(frozen=True)
class StepPlan:
    """
    The samples of an optimizer step, in parts that run one after the other.

    The first part has the preferences, and begins with the ``must_be_right`` samples that
    must be right before the job may end. The last of them may be ``wordings`` of the corrected
    questions, which do not fail a job that has run out of steps.
    """

    parts: tuple[list[Sample], ...]
    must_be_right: int
    preferences: tuple[Preference, ...] = ()
    wordings: int = 0
