# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What learning needs from the base model: answers to the anchors, and prefixes of samples."""

from __future__ import annotations

from collections.abc import Callable

from mace_ros.api.settings import Settings
from mace_ros.engine.background_requests import BackgroundRequests
from mace_ros.engine.learner_port import LearnerPort
from mace_ros.engine.request_manager import RequestManager
from mace_ros.model.prefix_kv import PrefixKV


class LearnerRequests:
    """Starts silent requests for the learner, and gives it the results."""

    def __init__(self, learner: LearnerPort, requests: RequestManager,
                 background: BackgroundRequests, wake: Callable[[], None]) -> None:
        """``wake`` requests another poll of the learner."""
        self._learner, self._requests, self._background = learner, requests, background
        self._wake = wake

    def start(self, settings: Settings, *, overdue: bool) -> None:
        """
        Start the requests that the learner waits for; ``overdue`` ones yield to no other.

        Raises ``RuntimeError`` if a prefix could not be computed.
        """
        if self._learner.wants_anchors:
            self._ask_anchors(settings, overdue)
        if self._learner.wants_prefix is not None:
            self._compute_prefix(self._learner.wants_prefix, overdue)

    def _ask_anchors(self, settings: Settings, overdue: bool) -> None:
        """Ask the base model what learning must preserve; give the learner all answers at once."""
        for active in self._background.next_anchors(
                settings, self._requests.max_length, overdue=overdue):
            self._requests.start(active)
        answers = self._background.anchor_answers
        if answers is not None:
            self._learner.give_anchors(answers)
            self._wake()

    def _compute_prefix(self, ids: tuple[int, ...], overdue: bool) -> None:
        """Compute the prefix of a training sample, and give it to the learner."""
        prefix = self._background.prefix(ids, self._requests, urgent=overdue)
        if isinstance(prefix, PrefixKV):
            self._learner.give_prefix(ids, prefix)
            self._wake()
        elif prefix is not None:
            self._requests.start(prefix)
