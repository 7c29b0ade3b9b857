# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The parts that the jobs of a learner share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mace_ros.api.policies import LearningTraits, POLICIES
from mace_ros.api.settings import Settings
from mace_ros.learning.anchor_replay import AnchorReplay
from mace_ros.learning.backoff import Backoff
from mace_ros.learning.baseline import BaselineScores
from mace_ros.learning.correction_queue import CorrectionQueue
from mace_ros.learning.disk import Disk
from mace_ros.learning.drift import Drift
from mace_ros.learning.live_versions import LiveVersions
from mace_ros.learning.publishing import Publisher
from mace_ros.learning.regression_check import RegressionCheck
from mace_ros.learning.scoped_training_set import ScopedTrainingSetBuilder
from mace_ros.learning.training import Training
from mace_ros.learning.training_set import TrainingSetBuilder
from mace_ros.model.chat import ChatTokenizer
from mace_ros.store.adapter_store import AdapterStore


@dataclass
class JobContext:
    """The parts that outlive a job."""

    settings: Settings      # replaced when the parameters change
    chat: ChatTokenizer
    training: Training
    anchors: AnchorReplay
    builder: TrainingSetBuilder
    scoped_builder: ScopedTrainingSetBuilder
    live: LiveVersions
    baseline: BaselineScores
    queue: CorrectionQueue
    disk: Disk
    store: AdapterStore
    publisher: Publisher
    drift: Drift
    regression_check: RegressionCheck
    backoff: Backoff        # between jobs that the disk or the device broke off
    clock: Callable[[], float]

    @property
    def scores_first(self) -> bool:
        """Whether corrections are scored before training; see :class:`LearningTraits`."""
        return self.traits.scores_first

    @property
    def traits(self) -> LearningTraits:
        """How the policy in force lets corrections be learned."""
        return POLICIES[self.settings.scheduler.policy]
