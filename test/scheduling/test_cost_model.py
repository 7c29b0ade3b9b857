# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The cost model, on devices whose true times are known."""

import random

import pytest
from support.virtual_device import (
    CPU_PASS,
    GPU_PASS,
    HEAD_TOKENS,
    observe,
    quantile,
    shapes,
    STEP_TOKENS,
    VirtualDevice,
)

from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.plan import PassShape, Segment, SegmentKind


@pytest.mark.parametrize('curve', [CPU_PASS, GPU_PASS])
@pytest.mark.parametrize(('calibrated', 'count'), [(True, 256), (False, 600)])
def test_predicts_noisy_iterations_of_unseen_shapes(curve, calibrated, count):
    device = VirtualDevice(curve=curve, noise=0.08, outliers=0.02, seed=3)
    cost = device.calibrated() if calibrated else CostModel()
    for shape in shapes(count, seed=4):
        observe(cost, shape, device.run(shape))
    errors = cost.relative_errors()   # of the latest 256 predictions, each made before learning
    assert len(errors) == 256
    assert quantile(errors, 0.5) <= 0.10
    assert quantile(errors, 0.95) <= 0.30


def test_interpolates_between_calibrated_sizes():
    device = VirtualDevice(noise=0.05, seed=5)
    cost = device.calibrated()
    errors = [abs(cost.pass_s(prefill_tokens=n, prefill_context=n * n // 2)
                  / device.seconds(PassShape(0, 0, n, n * n // 2)) - 1) for n in range(1, 257)]
    assert quantile(errors, 0.5) <= 0.10
    assert max(errors) <= 0.30


def test_learns_the_cost_of_context():
    device = VirtualDevice(noise=0.05, seed=6)
    cost = CostModel()
    for shape in shapes(1500, seed=7):
        observe(cost, shape, device.run(shape))
    for rows, context in ((1, 16), (1, 3000), (16, 16 * 50), (16, 16 * 1400)):
        true = device.seconds(PassShape(rows, context))
        assert cost.pass_s(rows, context) == pytest.approx(true, rel=0.25)


def test_nine_of_ten_measurements_stay_below_the_upper_prediction():
    device = VirtualDevice(noise=0.1, outliers=0.02, seed=8)
    cost = device.calibrated()
    below = []
    for shape in shapes(1500, seed=9):
        seconds = device.run(shape)
        below.append(seconds <= cost.pass_s(*shape, upper=True))
        observe(cost, shape, seconds)
    assert 0.86 <= sum(below) / len(below) <= 0.94


def test_an_outlier_hardly_changes_predictions():
    device = VirtualDevice(noise=0.02, seed=10)
    cost = device.calibrated()
    for shape in shapes(200, seed=11):
        observe(cost, shape, device.run(shape))
    shape = PassShape(4, 800)
    before = cost.pass_s(*shape)
    observe(cost, shape, 20 * before)
    assert cost.pass_s(*shape) == pytest.approx(before, rel=0.1)


def test_a_slower_device_changes_predictions_of_other_shapes():
    device = VirtualDevice(noise=0.03, seed=12)
    cost = device.calibrated()
    for shape in shapes(200, seed=13):
        observe(cost, shape, device.run(shape))
    device.scale = 2.0
    for _ in range(8):
        observe(cost, PassShape(1, 100), device.run(PassShape(1, 100)))
    prefill = PassShape(0, 0, 200, 20000)
    assert cost.pass_s(*prefill) == pytest.approx(device.seconds(prefill), rel=0.2)
    head = Segment(SegmentKind.HEAD, HEAD_TOKENS)
    assert cost.segment_s(head.kind, head.tokens) == pytest.approx(device.seconds(head), rel=0.2)


def test_a_change_of_a_single_size_is_learned():
    device = VirtualDevice(noise=0.03, seed=19)
    cost = device.calibrated()
    small, large = PassShape(1, 100), PassShape(16, 1600)
    for slower in (1.0, 2.0):
        for _ in range(100 if slower == 1.0 else 40):
            observe(cost, large, slower * device.run(large))
            for _ in range(3):
                observe(cost, small, device.run(small))
    assert cost.pass_s(*large) == pytest.approx(2.0 * device.seconds(large), rel=0.15)
    assert cost.pass_s(*small) == pytest.approx(device.seconds(small), rel=0.1)


def test_segments_are_predicted_by_kind_and_tokens():
    device = VirtualDevice(noise=0.05, seed=14)
    cost = CostModel()
    draw = random.Random(15)
    for _ in range(300):
        segment = Segment(draw.choice(list(SegmentKind)), draw.randint(20, 500))
        observe(cost, segment, device.run(segment))
    for kind in SegmentKind:
        for tokens in (60, STEP_TOKENS, 400):
            true = device.seconds(Segment(kind, tokens))
            assert cost.segment_s(kind, tokens) == pytest.approx(true, rel=0.2)
            assert cost.segment_s(kind, tokens, upper=True) >= cost.segment_s(kind, tokens)


def test_an_unmeasured_recomputed_backward_is_predicted_from_its_parts():
    cost = CostModel()
    cost.calibrate([(Segment(SegmentKind.FORWARD, 128), 0.014),
                    (Segment(SegmentKind.BACKWARD, 128), 0.022)])
    assert cost.segment_s(SegmentKind.BACKWARD_RECOMPUTED, 128) == pytest.approx(0.036)
    observe(cost, Segment(SegmentKind.BACKWARD_RECOMPUTED, 128), 0.05)
    assert cost.segment_s(SegmentKind.BACKWARD_RECOMPUTED, 128) == pytest.approx(0.05)


def test_tokens_within_fill_the_time():
    device = VirtualDevice()
    cost = device.calibrated()
    tokens = cost.tokens_within(SegmentKind.HEAD, 0.05, 512)
    assert cost.segment_s(SegmentKind.HEAD, tokens, upper=True) <= 0.05
    assert cost.segment_s(SegmentKind.HEAD, tokens + 1, upper=True) > 0.05
    assert cost.tokens_within(SegmentKind.HEAD, 0.0, 512) == 0


def test_calibration_takes_the_median_of_repeats():
    cost = CostModel()
    cost.calibrate([(PassShape(1, 10), 0.03), (PassShape(1, 10), 0.9), (PassShape(1, 10), 0.031)])
    assert cost.pass_s(1, 10) == pytest.approx(0.031, rel=0.01)


def test_errors_are_of_predictions_made_before_learning():
    cost = CostModel()
    cost.calibrate([(PassShape(1, 0), 0.02)] * 3)
    observe(cost, PassShape(1, 0), 0.04)
    assert cost.relative_errors() == pytest.approx([0.5])


def test_an_empty_pass_takes_no_time_and_an_unknown_one_some():
    cost = CostModel()
    assert cost.pass_s() == 0.0
    assert cost.pass_s(1, 10) > 0.0
    assert all(cost.segment_s(kind, 10) > 0.0 for kind in SegmentKind)


def test_tokens_that_are_not_decode_rows_may_take_longer():
    """As on a CPU, where passes of decode rows only are compiled."""
    def seconds(shape):
        return 0.01 * shape.decode_rows if shape.tokens == shape.decode_rows else (
            0.1 + 0.001 * shape.tokens)

    cost = CostModel()
    cost.calibrate((shape, seconds(shape)) for shape in (
        *(PassShape(n, n * 65) for n in (1, 2, 4, 8)),
        *(PassShape(0, 0, n, n * (n + 1) // 2) for n in (4, 16, 64, 128, 256))) for _ in range(3))
    for shape in (PassShape(1, 65), PassShape(3, 195), PassShape(8, 520), PassShape(1, 65, 3, 6),
                  PassShape(3, 195, finetune_tokens=4), PassShape(2, 130, 40, 820)):
        assert cost.pass_s(*shape) == pytest.approx(seconds(shape), rel=0.2), shape
