# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Which version a job of learning begins from, and which corrections it learns together.

Corrections disturb each other within one adapter: each of them takes longer to learn, and
paraphrases of earlier ones are forgotten. So a correction gets an adapter of its own, unless its
question is in the scope of a live version already. Then a job continues that version, which it may
contradict. A correction for every question continues the version that was trained for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mace_ros.api.settings import AdapterSettings, EVERYWHERE
from mace_ros.learning.correction_queue import PendingCorrection
from mace_ros.learning.live_versions import LiveVersions
from mace_ros.learning.question import questions
from mace_ros.memory.adapter_slots import ServedVersion
from mace_ros.store.records import CorrectionRecord

FRESH = 0       # continues no version


@dataclass(frozen=True)
class Start:
    """
    The version from whose weights a job trains; number 0 is a fresh adapter.

    ``everywhere`` tells that the new version is to answer every question. A profile's first one
    begins from that of the robot.
    """

    version: ServedVersion
    everywhere: bool = False

    def continued_by(self, profile: str) -> int:
        """Return the version whose place a version of this profile takes, 0 for none."""
        return self.version.version if self.version.profile == profile else FRESH


def group(live: LiveVersions, corrections: Sequence[PendingCorrection],
          settings: AdapterSettings) -> tuple[Start, list[PendingCorrection]]:
    """Return where the first correction's job starts, and all corrections that start there."""
    start = start_of(live, corrections[0].record, settings)
    return start, [c for c in corrections if start_of(live, c.record, settings) == start]


def start_of(live: LiveVersions, record: CorrectionRecord, settings: AdapterSettings) -> Start:
    """Return where the job of a correction starts."""
    profile = record.profile
    if (record.scope or settings.scope) == EVERYWHERE:
        owner = next((owner for owner in (profile, '') if live.everywhere(owner)), profile)
        return Start(ServedVersion(owner, live.everywhere(owner)), everywhere=True)
    found, _ = live.match(profile, questions(record.messages), settings)
    version = FRESH if found is None else found.version.version
    # Never the version that answers every question: a job with a scope does not guard the other
    # answers, which that version must keep.
    return Start(ServedVersion(profile, FRESH if version == live.everywhere(profile) else version))
