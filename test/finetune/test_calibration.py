# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The measurement of the device at start."""

from itertools import count

import pytest
from support.families import ALPHA, RANK, tiny_model

from mace_ros.finetune.calibration import measure, Measured
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.packing import pack
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.plan import PassShape, Segment, SegmentKind


@pytest.fixture(scope='module')
def measured() -> list[Measured]:
    model = pack(tiny_model('llama', max_position_embeddings=512), kv_tokens=1024)
    lora = LoRAManager(model.linears, targets='all-linear', rank=RANK, alpha=ALPHA, slots=1)
    return list(measure(model, lora, max_tokens=256, clock=count().__next__))


def test_every_kind_of_work_is_measured_before_long_prefills(measured):
    """A slow device may stop there; unknown costs would split steps into too many parts."""
    larger = next(i for i, (what, _) in enumerate(measured)
                  if isinstance(what, PassShape) and what.prefill_tokens > 64)
    cost = CostModel()
    cost.calibrate(measured[:larger])
    assert all(cost.segment_s(kind, 64) == pytest.approx(1.0, rel=0.01) for kind in SegmentKind
               if kind is not SegmentKind.HEAD)     # which has fewer tokens
    assert cost.pass_s(1, 65) == pytest.approx(1.0, rel=0.01)


def test_long_prefills_and_steps_are_measured_last(measured):
    assert max(what.prefill_tokens for what, _ in measured if isinstance(what, PassShape)) == 256
    assert max(what.tokens for what, _ in measured if isinstance(what, Segment)) == 192
