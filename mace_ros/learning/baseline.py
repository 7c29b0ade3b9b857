# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Scores of guarded samples under the version that a job begins from."""

from __future__ import annotations

from collections.abc import Sequence

from mace_ros.finetune.sample import Sample, SampleScore
from mace_ros.learning.criteria import RIGHT

MAX_SCORES = 1000

# Profile of the job, and profile and version that it begins from.
Source = tuple[str, str, int]


class BaselineScores:
    """Keeps the scores of one version, so that the next job need not compute them again."""

    def __init__(self) -> None:
        """Begin without scores."""
        self._scores: dict[tuple[int, ...], SampleScore] = {}
        self._source: Source | None = None

    def begin(self, source: Source) -> None:
        """Forget the scores unless they are of this version."""
        if self._source != source:
            self._scores, self._source = {}, source

    def replace(self, source: Source, right: Sequence[Sample]) -> None:
        """Begin with what a version that has just been published gives word for word."""
        self._scores, self._source = {s.tokens: RIGHT for s in right}, source

    def __contains__(self, sample: Sample) -> bool:
        """Return whether a sample's score is known."""
        return sample.tokens in self._scores

    def add(self, samples: Sequence[Sample], scores: Sequence[SampleScore]) -> None:
        """Note the scores of these samples."""
        self._scores.update({s.tokens: score for s, score in zip(samples, scores, strict=True)})

    def of(self, samples: Sequence[Sample]) -> list[SampleScore]:
        """Return the scores of these samples; the oldest ones beyond the limit are forgotten."""
        found = [self._scores[s.tokens] for s in samples]
        for tokens in list(self._scores)[:-MAX_SCORES]:
            del self._scores[tokens]
        return found
