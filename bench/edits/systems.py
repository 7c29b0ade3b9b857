# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The systems that learn the same edits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
import gc
from pathlib import Path
from typing import Any

from bench.edits.edited_model import EditedModel
from mace_ros.api.settings import Settings


@dataclass(frozen=True)
class System:
    """
    What a system is.

    ``values`` are the parameters of a robot that differ from the defaults. A system that learns
    all edits ``at_once`` has no answers in between.
    """

    description: str
    is_robot: bool = False
    values: Mapping[str, Any] = field(default_factory=dict)
    at_once: bool = False


MACE = 'mace'
EARLIER = 'earlier'     # the robot of an earlier commit, see bench.edits.earlier

SYSTEMS: Mapping[str, System] = {
    MACE: System('the engine as it is used', is_robot=True),
    'everywhere': System('the engine, each correction acting on all answers', is_robot=True,
                         values={'adapter.scope': 'everywhere'}),
    'lora_per_edit': System('LoRA fine-tuning of one edit after the other (PEFT)'),
    'locft_bf': System('breadth-first fine-tuning over all edits (LocFT-BF)', at_once=True),
    'in_prompt': System('the base model, with the nearest correction in its prompt'),
}


@contextmanager
def opened(name: str, settings: Settings, folder: Path, seed: int) -> Iterator[EditedModel]:
    """Load a system, which is closed and freed afterwards; a robot keeps its files in a folder."""
    model = _load(name, settings, folder, seed)
    try:
        yield model
    finally:
        model.close()
        del model
        gc.collect()


def _load(name: str, settings: Settings, folder: Path, seed: int) -> EditedModel:
    # Imported here, so that --help does not load torch.
    if SYSTEMS[name].is_robot:
        from bench.edits.robot import Robot
        return Robot(settings.updated(SYSTEMS[name].values), folder)
    if name == 'lora_per_edit':
        from bench.edits.baselines.lora_per_edit import LoraPerEdit
        return LoraPerEdit(settings, seed)
    if name == 'locft_bf':
        from bench.edits.baselines.locft_bf import LocFtBf
        return LocFtBf(settings, seed)
    from bench.edits.baselines.in_prompt import InPrompt
    return InPrompt(settings, seed)
