# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The memory that an engine divides."""

from __future__ import annotations

import pytest
from support.families import tiny_model, with_reference
import torch

from mace_ros.api.hardware import Hardware
from mace_ros.engine import builder

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
