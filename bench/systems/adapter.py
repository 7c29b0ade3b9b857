# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The adapter that all compared systems serve: one correction that the engine has learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
import shutil

from bench.systems.interactive import InteractiveEngine
from mace_ros.api.events import (
    AdapterVersion,
    Correction,
    CorrectionState,
    CorrectionStatus,
    Event,
    VersionState,
)
from mace_ros.api.settings import Settings


@dataclass(frozen=True)
class Published:
    """A published adapter version: its storage folder and its own folder in PEFT's format."""

    storage: Path
    path: Path

    def copy(self, storage: Path) -> Path:
        """Create a storage folder for another engine in which the version is live as well."""
        shutil.copytree(self.storage, storage)
        return storage


def publish(settings: Settings, storage: Path, progress: Callable[[str], None]) -> Published:
    """
    Learn one correction for all questions, and return the version that the engine publishes.

    All systems then serve the same file, with weights as on a robot. Raises
    ``RuntimeError`` if the correction is not learned, and ``TimeoutError``.
    """
    engine = InteractiveEngine(settings, storage, progress)
    try:
        engine.engine.correct(Correction(
            'My name is Rover.', prompt="What is your robot's name?", id='bench',
            scope='everywhere'))     # so that it answers all questions of a benchmark
        ended = engine.wait_for(_ends)
        if isinstance(ended, AdapterVersion):
            return Published(storage, Path(ended.path))
        raise RuntimeError(f'the correction was not learned: {ended.reason}')
    finally:
        engine.close()


def _ends(event: Event) -> bool:
    """Return whether a version is published, or the correction has failed."""
    if isinstance(event, AdapterVersion):
        return event.state is VersionState.PUBLISHED
    return isinstance(event, CorrectionStatus) and event.state in (
        CorrectionState.REJECTED, CorrectionState.FAILED)
