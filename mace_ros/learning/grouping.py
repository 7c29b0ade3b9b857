# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Which live version learns a correction.

Corrections disturb each other within one adapter: each of them takes longer to learn, and
paraphrases of earlier ones are forgotten. So a correction gets an adapter of its own, unless its
question is in the scope of a live version already. Then a job continues that version, which it may
contradict.
"""

from __future__ import annotations

from collections.abc import Sequence

from mace_ros.api.settings import AdapterSettings
from mace_ros.learning.correction_queue import PendingCorrection
from mace_ros.learning.live_versions import LiveVersions
from mace_ros.learning.question import questions
from mace_ros.store.records import CorrectionRecord

FRESH = 0       # continues no version


def group(live: LiveVersions, corrections: Sequence[PendingCorrection],
          settings: AdapterSettings) -> tuple[int, list[PendingCorrection]]:
    """Return the version that the first correction's job continues, and all with the same one."""
    version = version_of(live, corrections[0].record, settings)
    return version, [c for c in corrections if version_of(live, c.record, settings) == version]


def version_of(live: LiveVersions, record: CorrectionRecord, settings: AdapterSettings) -> int:
    """Return the version of its profile in whose scope the question of a correction is."""
    found, _ = live.match(record.profile, questions(record.messages), settings)
    return FRESH if found is None else found.version.version
