# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The adapter that all compared systems serve: one correction, really learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
import shutil
import time

from mace_ros.api.events import (
    AdapterVersion,
    Correction,
    CorrectionState,
    CorrectionStatus,
    VersionState,
)
from mace_ros.api.settings import Settings
from mace_ros.engine.builder import build_engine

LEARN_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Published:
    """An adapter version: the storage folder it is live in, and its own folder (PEFT's)."""

    storage: Path
    path: Path

    def copy(self, storage: Path) -> Path:
        """Make a storage folder, for one more engine, in which the version is live too."""
        shutil.copytree(self.storage, storage)
        return storage


def publish(settings: Settings, storage: Path, say: Callable[[str], None]) -> Published:
    """
    Learn a correction; raises ``RuntimeError`` if that does not come to an end.

    The adapter is the one that the engine publishes, so that what is compared is served
    with weights that a robot might have, from the same file on both sides.
    """
    engine = build_engine(settings, storage=storage, progress=say)
    try:
        engine.correct(Correction(
            'My name is Rover.', prompt="What is your robot's name?", id='bench'))
        deadline = time.monotonic() + LEARN_TIMEOUT_S
        while time.monotonic() < deadline:
            iteration = engine.step()
            for event in iteration.events:
                if isinstance(event, AdapterVersion) and event.state is VersionState.PUBLISHED:
                    return Published(storage, Path(event.path))
                if (isinstance(event, CorrectionStatus)
                        and event.state in (CorrectionState.REJECTED, CorrectionState.FAILED)):
                    raise RuntimeError(f'the correction was not learned: {event.reason}')
            if iteration.wake_at is None:
                time.sleep(0.001)
        raise RuntimeError(f'the correction was not learned within {LEARN_TIMEOUT_S:g} s')
    finally:
        engine.close()
