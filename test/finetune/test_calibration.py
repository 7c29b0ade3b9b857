# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What is measured of the device before it serves."""

from itertools import count

import pytest
from support.families import ALPHA, RANK, tiny_model

from mace_ros.finetune.calibration import measure, Measured
from mace_ros.model.lora import LoRAManager
from mace_ros.model.packed_model import PackedModel
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.plan import PassShape, Segment, SegmentKind


@pytest.fixture(scope='module')
def measured() -> list[Measured]:
    model = PackedModel(tiny_model('llama', max_position_embeddings=512), kv_tokens=1024)
    bank = LoRAManager(model.groups, targets='all-linear', rank=RANK, alpha=ALPHA, slots=1)
    return list(measure(model, bank, max_tokens=256, clock=count().__next__))


def test_a_slow_device_has_measured_each_kind_of_work_when_time_is_up(measured):
    """Or a step is cut by a guess: into many more pieces than that device needs."""
    larger = next(i for i, (what, _) in enumerate(measured)
                  if isinstance(what, PassShape) and what.prefill_tokens > 64)
    cost = CostModel()
    cost.calibrate(measured[:larger])
    assert all(cost.segment_s(kind, 64) == pytest.approx(1.0, rel=0.01) for kind in SegmentKind
               if kind is not SegmentKind.HEAD)     # in chunks of fewer tokens
    assert cost.pass_s(1, 65) == pytest.approx(1.0, rel=0.01)


def test_with_time_enough_larger_ones_too(measured):
    assert max(what.prefill_tokens for what, _ in measured if isinstance(what, PassShape)) == 256
    assert max(what.tokens for what, _ in measured if isinstance(what, Segment)) == 192
