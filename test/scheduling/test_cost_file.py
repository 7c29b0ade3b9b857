# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A cost model that was saved as JSON."""

import json

from support.virtual_device import observe, shapes, VirtualDevice

from mace_ros.scheduling.cost_file import from_dict, to_dict
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.plan import SegmentKind


def test_a_cost_model_read_from_json_predicts_and_learns_like_the_saved_one():
    device = VirtualDevice(noise=0.1, seed=16)
    cost = device.calibrated()
    for shape in shapes(100, seed=17):
        observe(cost, shape, device.run(shape))
    other = from_dict(CostModel, json.loads(json.dumps(to_dict(cost))))
    for shape in shapes(50, seed=18):
        seconds = device.run(shape)
        assert other.pass_s(*shape, upper=True) == cost.pass_s(*shape, upper=True)
        observe(cost, shape, seconds)
        observe(other, shape, seconds)
    assert other.relative_errors() == cost.relative_errors()
    assert (other.segment_s(SegmentKind.HEAD, 20, upper=True)
            == cost.segment_s(SegmentKind.HEAD, 20, upper=True))
