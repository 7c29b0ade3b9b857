# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Times of passes and segments: from a roofline, or as measured on this machine."""

from __future__ import annotations

from collections.abc import Iterator
import random
from typing import Protocol

from mace_ros.scheduling.cost_curve import KNOTS
from mace_ros.scheduling.cost_model import CostModel, Sample
from mace_ros.scheduling.plan import Measurement, PassShape, Segment, SegmentKind
from mace_ros.simulation.devices import DeviceProfile
from mace_ros.simulation.models import ModelShape

FLOAT32 = 4
# Queries of a prefill that share one read of the keys and values.
TILE = 64


class DeviceTimes(Protocol):
    """The times of a device that runs a model, in seconds."""

    layers: int     # of the model

    def seconds(self, what: PassShape | Segment) -> float:
        """Return the time without noise."""

    def run(self, what: PassShape | Segment) -> float:
        """Return the time of one run, with the device's noise."""


class Roofline:
    """The times of a model on a device, without noise."""

    def __init__(self, device: DeviceProfile, model: ModelShape, *, mode: str = 'maxn',
                 weight_bytes: float = 2.0, rank: int = 8) -> None:
        """Derive bytes and operations; each weight takes ``weight_bytes``."""
        power = device.modes[mode]
        self.layers = model.layers
        self._byte_s = 1.0 / (device.gb_per_s.value * 1e9 * device.bandwidth_share.value
                              * power.bandwidth.value)
        self._operation_s = 1.0 / (device.tflops.value * 1e12 * device.compute_share.value
                                   * power.compute.value)
        # The time of kernel launches and small kernels scales with the clock.
        self._layer_s = device.layer_us.value * 1e-6 / power.compute.value
        self._training_s = device.training_layer_us.value * 1e-6 / power.compute.value
        linear, head = model.linear_parameters, model.head_parameters
        lora = model.lora_parameters(rank)
        self._layer_bytes = linear * weight_bytes
        self._weights = model.layers * linear * weight_bytes + head * weight_bytes
        self._token = 2.0 * model.layers * (linear + lora)
        self._head_bytes, self._head = head * weight_bytes, 2.0 * head
        # Operations of one token that attends to one other: q·k and p·v.
        self._pair = 4.0 * model.layers * model.query_width
        self._kv_bytes = model.layers * 2 * model.kv_width * 2.0
        self._optimizer_bytes = 7.0 * FLOAT32 * model.layers * lora
        self._lora = lora
        self._linear = linear
        self._fixed_s = (model.layers + 1) * self._layer_s

    def seconds(self, what: PassShape | Segment) -> float:
        """Return the time."""
        if isinstance(what, Segment):
            return self._segment_s(what)
        rows, decode_context, prefill, prefill_context, finetune = what
        read = self._weights + self._kv_bytes * (decode_context + prefill_context / TILE)
        operations = (self._token * (rows + prefill + finetune)
                      + self._pair * (decode_context + prefill_context)
                      + self._head * (rows + (prefill > 0)))
        return self._time_s(read, operations) + self._fixed_s

    def run(self, what: PassShape | Segment) -> float:
        """Return the time, which has no noise."""
        return self.seconds(what)

    def _time_s(self, read: float, operations: float) -> float:
        return max(read * self._byte_s, operations * self._operation_s)

    def _segment_s(self, segment: Segment) -> float:
        kind, tokens = segment.kind, segment.tokens
        if kind is SegmentKind.OPTIMIZER:
            return self._optimizer_bytes * self._byte_s + self._training_s
        if kind is SegmentKind.HEAD:
            # The logits, and the gradient of the hidden states.
            return (2.0 * self._time_s(self._head_bytes, self._head * tokens)
                    + 2.0 * self._training_s)
        attention = self._pair / self.layers * tokens * (tokens + 1) / 2.0
        forward = (self._time_s(
            self._layer_bytes, 2.0 * (self._linear + self._lora) * tokens + attention)
            + self._training_s)
        if kind is SegmentKind.FORWARD:
            return forward
        # The base weights need no gradient; attention's backward takes twice its forward.
        backward = (self._time_s(
            self._layer_bytes, (2.0 * self._linear + 4.0 * self._lora) * tokens + 2.0 * attention)
            + 2.0 * self._training_s)
        return backward if kind is SegmentKind.BACKWARD else forward + backward


class Measured:
    """
    The machine that a cost model was calibrated on, with the noise that was measured there.

    Each run takes the predicted time, multiplied by a measured ratio of actual to predicted time
    that is drawn at random.
    """

    def __init__(self, cost: CostModel, *, layers: int, pass_ratios: list[float],
                 segment_ratios: list[float], seed: int = 0) -> None:
        """Predict with ``cost``, which must not keep learning."""
        self.layers = layers
        self._cost = cost
        self._pass_ratios = pass_ratios or [1.0]
        self._segment_ratios = segment_ratios or [1.0]
        self._random = random.Random(seed)

    def seconds(self, what: PassShape | Segment) -> float:
        """Return the time without noise."""
        if isinstance(what, Segment):
            return self._cost.segment_s(what.kind, what.tokens)
        return self._cost.pass_s(*what)

    def run(self, what: PassShape | Segment) -> float:
        """Return the time with noise."""
        ratios = self._segment_ratios if isinstance(what, Segment) else self._pass_ratios
        return self.seconds(what) * ratios[int(self._random.random() * len(ratios))]


class SteadyCost(CostModel):
    """
    A cost model that no longer learns.

    A simulated device never changes, so that nothing is to be learned while it serves.
    """

    def observe(self, measurement: Measurement) -> float:
        """Return the predicted time, and learn nothing."""
        return measurement.plan.predicted_s

    @classmethod
    def of(cls, device: DeviceTimes, *, max_tokens: int) -> SteadyCost:
        """Return a model that was calibrated on passes of up to ``max_tokens``."""
        model = cls()
        samples = list(_samples(device, max_tokens))
        model.calibrate(samples)
        for what, seconds in samples:
            model.ratios_of(what).add(seconds / model.predicted_s(what))
        return model


def _samples(device: DeviceTimes, max_tokens: int) -> Iterator[Sample]:
    """Yield the samples of a calibration, each often enough for the curves to be sure."""
    shapes: list[PassShape | Segment] = []
    sizes = [n for n in KNOTS if n <= max(max_tokens, 4096)]
    for tokens in (n for n in sizes if n <= 2 * max_tokens):
        shapes.append(PassShape(prefill_tokens=tokens, prefill_context=tokens * (tokens + 1) // 2))
        shapes.append(PassShape(prefill_tokens=tokens, prefill_context=tokens * 2048))
    for rows in (n for n in sizes if n <= 64):
        shapes += [PassShape(rows, rows * context) for context in (64, 1024, 4096)]
    # The optimizer's time does not depend on the tokens: a few sizes are enough.
    shapes += [Segment(kind, tokens) for kind in SegmentKind for tokens in sizes
               if tokens <= 1024 or kind is not SegmentKind.OPTIMIZER]
    for _ in range(6):
        for shape in shapes:
            yield shape, device.seconds(shape)
