# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What an engine is built of: the memory that it divides, and compiled decoding on a CPU."""

from __future__ import annotations

import os
from pathlib import Path
import time

import pytest
from support.families import tiny_model, with_reference
from support.robot import Robot
import torch

from mace_ros.api.hardware import Hardware
from mace_ros.api.settings import Settings
from mace_ros.engine import builder
from mace_ros.model import cpu_decode_check, cpu_threads

pytestmark = pytest.mark.usefixtures('one_thread')


def test_the_memory_of_a_gpu_is_measured_when_its_layers_are_converted(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caching allocator holds in vain is returned first, since it counts as used."""
    model, lora, _ = with_reference(tiny_model('llama'))
    steps: list[str] = []

    def measured(device: torch.device, counted_mb: float) -> float:
        steps.append('measured')
        return 1000.0

    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: steps.append('emptied'))
    monkeypatch.setattr(builder, 'free_memory', measured)
    assert builder.free_beside(model, lora, Hardware()) == (
        1000.0 + model.kv_cache.nbytes + lora.nbytes)
    assert steps == ['emptied', 'measured']


@pytest.mark.parametrize('installed', [True, False])
def test_on_a_cpu_decode_rows_are_compiled_or_the_log_says_why_not(
        installed: bool, tiny_settings: Settings, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    if not installed:
        monkeypatch.setattr(cpu_decode_check, 'find_spec', lambda name: None)
    lines: list[str] = []
    engine = builder.build_engine(tiny_settings, storage=tmp_path, progress=lines.append)
    try:
        assert (engine.model.fast_passes is not None) == installed
    finally:
        engine.close()
    reason = 'passes of decode rows are not compiled: Numba is not installed'
    assert (reason in lines) == (not installed)


def test_an_engine_takes_the_threads_that_other_programs_leave(
        tiny_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0.0         # cores

    def used(cores: frozenset[int]) -> float:
        return taken * time.monotonic()

    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0, 1, 2})
    monkeypatch.setattr(cpu_threads, 'used_by_others', used)
    monkeypatch.setattr(cpu_threads, 'INTERVAL_S', 0.0)
    engine = builder.build_engine(
        tiny_settings.updated({'model.threads': 0, 'finetune.budget': 0.0}), storage=tmp_path)
    robot = Robot(engine)
    try:
        answer = robot.ask('Who?', max_tokens=4).text
        assert torch.get_num_threads() == 3
        taken = 2.0
        engine.step()
        assert robot.ask('Who?', max_tokens=4).text == answer
        assert torch.get_num_threads() == 1
        taken = 0.0
        engine.step()
        assert robot.ask('Who?', max_tokens=4).text == answer
        assert torch.get_num_threads() == 3
    finally:
        engine.close()
