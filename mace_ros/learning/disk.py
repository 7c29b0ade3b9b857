# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Work for the journal's thread, requested by learning."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from mace_ros.api.events import CorrectionState, CorrectionStatus
from mace_ros.store.journal import Journal
from mace_ros.store.journal_writer import JournalWriter
from mace_ros.store.records import CorrectionRecord

T = TypeVar('T')


class Disk:
    """Submits work to the journal's thread and wakes the engine when it is done."""

    def __init__(self, journal: JournalWriter, wake: Callable[[], None]) -> None:
        """Use this journal; ``wake`` is called in its thread."""
        self._journal, self._wake = journal, wake

    def submit(self, function: Callable[[Journal], T]) -> Future[T]:
        """Run a function in the journal's thread; raises ``JournalError`` if it is closed."""
        future = self._journal.submit(function)
        future.add_done_callback(lambda _: self._wake())
        return future

    def set_state(self, record: CorrectionRecord, state: CorrectionState, reason: str = '',
                  version: int = 0) -> CorrectionStatus:
        """Record the state of a correction, unless it is final; return its status event."""
        # A correction that was superseded in the meantime stays superseded.
        self._journal.submit(lambda j: j.set_correction(
            record.id, state, reason, version, if_pending=True))
        return CorrectionStatus(record.id, state, reason, version)
