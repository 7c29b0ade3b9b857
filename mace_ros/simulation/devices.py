# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Performance of devices: numbers, each with its source.

The source of an unpublished number begins with ASSUMED; the report lists all sources. Rates are
those of dense bfloat16 on tensor cores, bandwidths those of the memory that holds the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ASSUMED = 'assumed'


@dataclass(frozen=True)
class Number:
    """A value, in the unit that its field's name says, and its source."""

    value: float
    source: str

    @property
    def is_assumed(self) -> bool:
        """Whether the value is an assumption."""
        return self.source.startswith(ASSUMED)


@dataclass(frozen=True)
class PowerMode:
    """The factors by which a power mode lowers compute rate and memory bandwidth."""

    compute: Number = Number(1.0, 'all clocks at their maximum')
    bandwidth: Number = Number(1.0, 'all clocks at their maximum')


# Shares of the peak rates that a pass reaches; see docs/guides/simulate.md.
_COMPUTE_SHARE = Number(
    0.5, f'{ASSUMED}: packed passes of some hundred tokens reach half the peak of the products')
_BANDWIDTH_SHARE = Number(0.8, f'{ASSUMED}: reading weights reaches four fifths of the peak')


@dataclass(frozen=True)
class DeviceProfile:
    """
    Parameters of a roofline: the time is the maximum of bytes / bandwidth and operations / rate.

    Each layer adds a constant for kernel launches and small kernels: ``layer_us`` in a pass,
    ``training_layer_us`` in the forward of a fine-tune step, and twice that in its backward.
    """

    name: str
    tflops: Number
    gb_per_s: Number
    memory_gb: Number
    layer_us: Number
    training_layer_us: Number
    compute_share: Number = _COMPUTE_SHARE
    bandwidth_share: Number = _BANDWIDTH_SHARE
    # On a Jetson, the memory is shared with the rest of the robot.
    usable_share: Number = Number(0.75, f'{ASSUMED}: the rest is for the system and its nodes')
    modes: Mapping[str, PowerMode] = field(default_factory=lambda: {'maxn': PowerMode()})

    def numbers(self, mode: str) -> Mapping[str, Number]:
        """Return all numbers by name, including those of a power mode."""
        found = {name: value for name, value in vars(self).items() if isinstance(value, Number)}
        power = self.modes[mode]
        return {**found, f'{mode} compute': power.compute, f'{mode} bandwidth': power.bandwidth}


_AGX = 'NVIDIA Jetson AGX Orin Series data sheet DS-10662-001'
_PER_SM = ('tensor cores x clock x 512 operations, the rate per tensor core and clock that the '
           'AGX Orin data sheet gives (170 sparse INT8 TOPS of 64 cores at 1.3 GHz)')
_NX = 'NVIDIA Jetson Orin NX Series data sheet'
_NANO = 'NVIDIA Jetson Orin Nano Series data sheet'
_THOR = 'NVIDIA Jetson Thor: T5000 module specifications'
_H100 = 'NVIDIA H100 Tensor Core GPU data sheet (SXM)'

# From a probe of device graphs on one H100, before this engine was written: 9.5 ms for a token of
# an 8B model, whose weights take 5.0 ms to read; 0.38 ms for the forward and 0.9 ms for the
# recomputed backward of one of its layers with 256 tokens.
_H100_LAYER = Number(100.0, 'from a probe of device graphs on an H100, not of this engine')
_H100_TRAINING = Number(200.0, 'from a probe of device graphs on an H100, not of this engine')
_JETSON_LAYER = Number(
    150.0, f'{ASSUMED}: a probe on an H100, times the ratio of the clocks')
_JETSON_TRAINING = Number(
    300.0, f'{ASSUMED}: a probe on an H100, times the ratio of the clocks')


def _jetson(name: str, tflops: Number, gb_per_s: Number, memory_gb: Number,
            modes: Mapping[str, PowerMode] | None = None) -> DeviceProfile:
    return DeviceProfile(
        name, tflops, gb_per_s, memory_gb, _JETSON_LAYER, _JETSON_TRAINING,
        modes={'maxn': PowerMode(), **(modes or {})})


_MAXQ = PowerMode(
    Number(624.75 / 1301.0, 'MLPerf Inference MaxQ submission for AGX Orin: GPU at 624.75 MHz'),
    Number(2133.0 / 3200.0, 'MLPerf Inference MaxQ submission for AGX Orin: memory at 2133 MHz'))

DEVICES: Mapping[str, DeviceProfile] = {d.name: d for d in (
    _jetson('orin-agx-64',
            Number(42.5, f'{_AGX}: 170 sparse INT8 TOPS of the GPU; dense bfloat16 is a quarter'),
            Number(204.8, f'{_AGX}: 256-bit LPDDR5'), Number(64.0, _AGX), {'maxq': _MAXQ}),
    _jetson('orin-agx-32',
            Number(27.0, f'{_AGX}: 108 sparse INT8 TOPS of the GPU; dense bfloat16 is a quarter'),
            Number(204.8, f'{_AGX}: 256-bit LPDDR5'), Number(32.0, _AGX)),
    _jetson('orin-nx-16',
            Number(15.0, f'{_NX}: 32 tensor cores at 918 MHz; {_PER_SM}'),
            Number(102.4, f'{_NX}: 128-bit LPDDR5'), Number(16.0, _NX)),
    _jetson('orin-nx-8',
            Number(12.5, f'{_NX}: 32 tensor cores at 765 MHz; {_PER_SM}'),
            Number(102.4, f'{_NX}: 128-bit LPDDR5'), Number(8.0, _NX)),
    _jetson('orin-nano-8',
            Number(10.2, f'{_NANO}: 32 tensor cores at 625 MHz; {_PER_SM}'),
            Number(68.0, f'{_NANO}: 128-bit LPDDR5'), Number(8.0, _NANO),
            {'super': PowerMode(
                Number(1020.0 / 625.0, 'NVIDIA Jetson Orin Nano Super: GPU at 1020 MHz'),
                Number(102.0 / 68.0, 'NVIDIA Jetson Orin Nano Super: 102 GB/s'))}),
    _jetson('thor',
            Number(258.8, f'{_THOR}: 2070 sparse FP4 TFLOPS; dense bfloat16 is an eighth'),
            Number(273.0, f'{_THOR}: 256-bit LPDDR5X'), Number(128.0, _THOR)),
    DeviceProfile(
        'h100', Number(989.4, _H100), Number(3350.0, _H100), Number(80.0, _H100),
        _H100_LAYER, _H100_TRAINING,
        usable_share=Number(0.9, f'{ASSUMED}: the rest is for contexts and graphs')),
)}
