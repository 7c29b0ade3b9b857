# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Latency windows, device counters of simulated machines, and findings."""

from __future__ import annotations

from dataclasses import fields, replace
import json
import math
from pathlib import Path
import re
from types import SimpleNamespace
from typing import Any
import xml.etree.ElementTree as ElementTree

import mace_ros.msg as msg
import pytest

from mace_ros.api.events import (
    AdapterVersion,
    CorrectionState,
    CorrectionStatus,
    ErrorCode,
    FinishReason,
    Response,
    VersionState,
)
from mace_ros.api.hardware import Hardware
from mace_ros.api.settings import Settings
from mace_ros.ros.status_publisher import diagnostic_status, scheduler_message
from mace_ros.scheduling.plan import PassShape
from mace_ros.scheduling.scheduler import Statistics
from mace_ros.telemetry.device_counters import DeviceCounters, JETSON_LOADS, Reading
from mace_ros.telemetry.health import Health, Level, NodeState
from mace_ros.telemetry.latency import Attainment, LatencyWindow, percentile
from mace_ros.telemetry.status import Status

GPU = Hardware('cuda', 'a GPU', 'GPU-1234')
CONFIG = Path(__file__).resolve().parents[2] / 'config'
NAN = math.nan
SETTINGS = Settings()
SHAPE = PassShape(decode_rows=1, prefill_tokens=2, finetune_tokens=3)


def outcome(reason: FinishReason = FinishReason.STOP, code: ErrorCode = ErrorCode.NONE,
            **values: object) -> Response:
    return Response('q', '', '', reason, code, **values)


def known(reading: Reading) -> dict[str, float]:
    values = {f.name: getattr(reading, f.name) for f in fields(reading)}
    return {name: value for name, value in values.items() if not math.isnan(value)}


# -- latency -----------------------------------------------------------------------------


def test_attainment_covers_the_window() -> None:
    window = LatencyWindow()
    for second, met in enumerate([False, False, True, True, False]):
        window.add(outcome(ttft_ms=100.0 * second, tpot_ms=NAN, slo_met=met), float(second))
    attainment = window.attainment(now=5.0, window_s=3.0)
    assert (attainment.requests, attainment.ttft_p95_ms) == (3, 400.0)
    assert attainment.slo_attainment == pytest.approx(2 / 3)
    assert math.isnan(attainment.tpot_p95_ms)


def test_attainment_of_an_empty_window_is_unknown() -> None:
    attainment = LatencyWindow().attainment(0.0, 60.0)
    assert attainment.requests == 0
    assert math.isnan(attainment.slo_attainment)
    assert math.isnan(attainment.ttft_p95_ms)


def test_only_outcomes_that_depend_on_the_node_count() -> None:
    window = LatencyWindow()
    reject, error = FinishReason.REJECTED, FinishReason.ERROR
    window.add(outcome(FinishReason.CANCELLED), 0.0)
    window.add(outcome(reject, ErrorCode.EMPTY_TEXT), 0.0)
    window.add(outcome(reject, ErrorCode.NOT_SERVING), 0.0)
    window.add(outcome(reject, ErrorCode.OVERLOADED), 0.0)
    window.add(outcome(error, ErrorCode.INTERNAL, error='broken'), 0.0)
    attainment = window.attainment(1.0, 60.0)
    assert (attainment.requests, attainment.slo_attainment) == (2, 0.0)
    assert (attainment.rejected, attainment.errors, attainment.error) == (1, 1, 'broken')


@pytest.mark.parametrize(('values', 'expected'), [
    ([3.0], 3.0), ([NAN, 1.0], 1.0), (list(range(1, 101)), 95), ([1.0] * 19 + [9.0], 1.0)])
def test_percentile(values: list[float], expected: float) -> None:
    assert percentile(values, 0.95) == expected


# -- counters ----------------------------------------------------------------------------


class Nvml:
    """A replacement of pynvml; a value of ``None`` raises."""

    def __init__(self, *, total: int | None = 80_000_000_000, used: int | None = 8_000_000_000,
                 gpu: int | None = 25, temperature: int | None = 40,
                 power: int | None = 70_000) -> None:
        self._answers = {
            'nvmlDeviceGetMemoryInfo': None if total is None else SimpleNamespace(
                total=total, used=used),
            'nvmlDeviceGetUtilizationRates': None if gpu is None else SimpleNamespace(gpu=gpu),
            'nvmlDeviceGetTemperature': temperature, 'nvmlDeviceGetPowerUsage': power}

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes) -> object:
        assert uuid == b'GPU-1234'
        return self

    def __getattr__(self, name: str) -> object:
        def ask(handle: object, *_: object) -> object:
            assert handle is self
            if self._answers[name] is None:
                raise RuntimeError('NOT_SUPPORTED')
            return self._answers[name]
        return ask


def test_a_gpu_is_read_through_nvml(tmp_path: Path) -> None:
    reading = DeviceCounters(GPU, root=tmp_path, nvml=Nvml()).read()
    assert known(reading) == {
        'load': 0.25, 'memory_used_mb': 8000.0, 'memory_total_mb': 80000.0,
        'temperature_c': 40.0, 'power_w': 70.0}
    assert reading.memory_use == 0.1


def test_an_idle_gpu_has_a_load_of_zero(tmp_path: Path) -> None:
    assert DeviceCounters(GPU, root=tmp_path, nvml=Nvml(gpu=0)).read().load == 0.0


@pytest.mark.parametrize('nvml', [
    Nvml(total=0, used=0, gpu=0, temperature=0, power=0),
    Nvml(total=None, gpu=None, temperature=None, power=None),
], ids=['zeros', 'not supported'])
def test_values_unknown_to_nvml_are_nan(tmp_path: Path, nvml: Nvml) -> None:
    assert known(DeviceCounters(GPU, root=tmp_path, nvml=nvml).read()) == {}


def test_without_a_driver_all_values_are_nan(tmp_path: Path) -> None:
    class Broken:
        def __getattr__(self, name: str) -> object:
            raise AttributeError(name)

    assert known(DeviceCounters(GPU, root=tmp_path, nvml=Broken()).read()) == {}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + '\n')


@pytest.mark.parametrize('load', JETSON_LOADS)
def test_a_jetson_is_read_from_sysfs(tmp_path: Path, load: str) -> None:
    write(tmp_path / load, '345')
    write(tmp_path / 'sys/class/thermal/thermal_zone0/type', 'cpu-thermal')
    write(tmp_path / 'sys/class/thermal/thermal_zone0/temp', '61000')
    write(tmp_path / 'sys/class/thermal/thermal_zone1/type', 'gpu-thermal')
    write(tmp_path / 'sys/class/thermal/thermal_zone1/temp', '51500')
    write(tmp_path / 'proc/meminfo', 'MemTotal: 1000000 kB\nMemAvailable: 250000 kB')
    reading = DeviceCounters(GPU, root=tmp_path, nvml=Nvml()).read()
    assert known(reading) == pytest.approx({
        'load': 0.345, 'temperature_c': 51.5, 'memory_total_mb': 1024.0, 'memory_used_mb': 768.0})


def test_the_memory_of_an_integrated_gpu_is_that_of_the_system(tmp_path: Path) -> None:
    """Also without an Orin's files: NVML does not know it, and CUDA counts the page cache."""
    write(tmp_path / 'proc/meminfo', 'MemTotal: 1000000 kB\nMemAvailable: 250000 kB')
    reading = DeviceCounters(replace(GPU, integrated=True), root=tmp_path, nvml=Nvml(
        total=0, used=0, gpu=0)).read()
    assert known(reading) == pytest.approx({
        'memory_total_mb': 1024.0, 'memory_used_mb': 768.0, 'temperature_c': 40.0,
        'power_w': 70.0})


AGX_ORIN = {    # channels of each sensor: label, mV, mA
    'hwmon3': [('VDD_GPU_SOC', '19000', '400'), ('VDD_CPU_CV', '19000', '200'),
               ('VIN_SYS_5V0', '5000', '1000')],
    'hwmon4': [('NC', '0', '0'), ('VDDQ_VDD2_1V8AO', '5000', '80'), ('NC', '0', '0')]}
ORIN_NANO = {'hwmon1': [('VDD_IN', '5000', '1200'), ('VDD_CPU_GPU_CV', '5000', '400'),
                        ('VDD_SOC', '5000', '300')]}
POWERS = {
    'an AGX Orin': (AGX_ORIN, 7.6 + 3.8 + 5.0),
    'an Orin Nano': (ORIN_NANO, 6.0),
    'a rail that is missing': ({'hwmon3': AGX_ORIN['hwmon3'][:2]}, NAN),
    'an empty current': ({'hwmon1': [('VDD_IN', '5000', '')]}, NAN),
    'zeros': ({'hwmon1': [('VDD_IN', '0', '0')]}, NAN),
    'nonsense': ({'hwmon1': [('VDD_IN', 'x', '\x00')]}, NAN),
    'no sensor': ({}, NAN),
}


@pytest.mark.parametrize('case', POWERS)
def test_the_power_of_a_jetson_is_the_sum_of_its_rails(tmp_path: Path, case: str) -> None:
    sensors, power = POWERS[case]
    write(tmp_path / JETSON_LOADS[0], '345')
    write(tmp_path / 'sys/class/hwmon/hwmon0/name', 'pwmfan')
    for name, channels in sensors.items():
        sensor = tmp_path / 'sys/class/hwmon' / name
        write(sensor / 'name', 'ina3221')
        write(sensor / 'in7_label', 'sum of shunt voltages')
        write(sensor / 'in7_input', '4')
        for channel, (label, millivolts, milliamperes) in enumerate(channels, 1):
            write(sensor / f'in{channel}_label', label)
            write(sensor / f'in{channel}_input', millivolts)
            write(sensor / f'curr{channel}_input', milliamperes)
    reading = DeviceCounters(GPU, root=tmp_path, nvml=Nvml()).read()
    assert reading.power_w == pytest.approx(power, nan_ok=True)


def test_a_cpu_is_read_from_proc(tmp_path: Path) -> None:
    write(tmp_path / 'proc/self/statm', '100 50 0 0 0 0 0')
    write(tmp_path / 'proc/stat', 'cpu  100 0 100 800 0 0 0 0 0 0\ncpu0 1 1 1 1')
    counters = DeviceCounters(Hardware(), root=tmp_path)
    assert set(known(counters.read())) == {'process_memory_mb'}    # the load needs two readings
    write(tmp_path / 'proc/stat', 'cpu  175 0 100 825 0 0 0 0 0 0\ncpu0 1 1 1 1')
    write(tmp_path / 'sys/class/hwmon/hwmon0/name', 'k10temp')
    write(tmp_path / 'sys/class/hwmon/hwmon0/temp1_input', '55000')
    reading = counters.read()
    assert (reading.load, reading.temperature_c) == (0.75, 55.0)


@pytest.mark.parametrize('text', ['', 'cpu', 'cpu a b c d e', '\x00'])
def test_a_malformed_file_gives_nan(tmp_path: Path, text: str) -> None:
    for name in ('proc/stat', 'proc/meminfo', 'proc/self/statm'):
        write(tmp_path / name, text)
    counters = DeviceCounters(Hardware(), root=tmp_path)
    counters.read()
    assert known(counters.read()) == {}


def test_the_memory_of_this_process_is_read() -> None:
    assert 10 < DeviceCounters(Hardware()).read().process_memory_mb < 100000


# -- findings ----------------------------------------------------------------------------


def findings(health: Health, status: Status | None = None, now: float = 100.0,
             reading: Reading | None = None, settings: Settings = SETTINGS) -> dict[str, object]:
    found = health.findings(status, reading or Reading(), settings, now)
    return {f.name: f for f in found}


def test_a_healthy_node_has_ok_findings() -> None:
    health = Health()
    health.state = NodeState.ACTIVE
    found = findings(health, Status(99.5, Statistics(), queue_depth=3))
    assert [f.level for f in found.values()] == [Level.OK] * 3
    assert found['serving'].message == 'active'
    assert found['serving'].values['queue_depth'] == 3


def test_missed_slos_are_a_warning() -> None:
    health = Health()
    health.state = NodeState.ACTIVE
    for met in [True] * 8 + [False] * 2:
        health.note(outcome(slo_met=met), 100.0)
    found = findings(health)['serving']
    assert found.level is Level.WARN
    assert '80% of 10 answers' in found.message
    lenient = SETTINGS.updated({'monitor.slo_target': 0.75})
    assert findings(health, settings=lenient)['serving'].level is Level.OK
    assert findings(health, now=1000.0)['serving'].level is Level.OK    # long ago
    health.state = NodeState.INACTIVE
    assert findings(health)['serving'].message == 'inactive'


PROBLEMS = {
    'a fault': ('serving', Level.ERROR, 'no such model'),
    'a failed query': ('serving', Level.ERROR, '1 query failed: out of memory'),
    'an overload': ('serving', Level.WARN, '1 query was rejected'),
    'a stalled iteration': ('serving', Level.ERROR, 'the current iteration has taken 40 s'),
    'a full disk': ('learning', Level.ERROR, 'disk is full'),
    'little space': ('learning', Level.WARN, '700 MB are free on the disk'),
    'no space': ('learning', Level.ERROR, 'rejected below 500 (storage.min_free_mb)'),
    'failed learning': ('learning', Level.ERROR, 'will be retried: OutOfMemoryError'),
    'a slow disk': ('learning', Level.WARN, '400 writes of the journal wait'),
    'answers that were not recorded': ('learning', Level.WARN, '3 answers were not recorded'),
    'an old correction': ('learning', Level.WARN, '2 corrections wait, the oldest for 500 s'),
    'a failed correction': ('learning', Level.WARN, 'a correction failed: not learned'),
    'a rejected version': ('learning', Level.WARN, "rejected by the gate: version 7 of profile ''"),
    'a corrupt version': ('learning', Level.ERROR, "version 7 of profile 'ann': bad checksum"),
    'little memory': ('device', Level.WARN, '95% of its memory'),
    'no memory': ('device', Level.ERROR, '99% of its memory'),
    'heat': ('device', Level.WARN, '95 °C'),
}


def test_pending_base_questions_are_reported_but_no_problem() -> None:
    status = Status(100.0, Statistics(), base_questions_left=12)
    learning = findings(Health(), status)['learning']
    assert learning.level is Level.OK and learning.message.startswith('12 questions left')


def test_frozen_learning_is_named_beside_problems() -> None:
    health = Health()
    health.frozen = True
    assert findings(health)['learning'].message == 'learning is frozen'
    health.note(CorrectionStatus('c', CorrectionState.FAILED, 'too long'), 99.0)
    learning = findings(health)['learning']
    assert learning.level is Level.WARN and learning.message.endswith('; learning is frozen')


@pytest.mark.parametrize('case', PROBLEMS)
def test_a_problem_is_reported(case: str) -> None:
    health, reading, status = Health(), Reading(), Status(100.0, Statistics())
    health.state = NodeState.ACTIVE
    if case == 'a fault':
        health.fault = 'no such model'
    elif case == 'a failed query':
        health.note(outcome(FinishReason.ERROR, ErrorCode.INTERNAL, error='out of memory'), 99.0)
    elif case == 'an overload':
        health.note(outcome(FinishReason.REJECTED, ErrorCode.OVERLOADED), 99.0)
    elif case == 'a stalled iteration':
        status = Status(60.0, Statistics())
    elif case == 'a full disk':
        status = Status(100.0, Statistics(), journal_error='disk is full')
    elif case in ('little space', 'no space'):
        status = Status(100.0, Statistics(),
                        storage_free_mb=700.0 if case == 'little space' else 300.0)
    elif case == 'failed learning':
        status = Status(100.0, Statistics(), learning_error='OutOfMemoryError: no')
    elif case == 'a slow disk':
        status = Status(100.0, Statistics(), journal_backlog=400)
    elif case == 'answers that were not recorded':
        status = Status(100.0, Statistics(), unrecorded=3)
    elif case == 'an old correction':
        status = Status(100.0, Statistics(), corrections_waiting=2, freshness_s=500.0)
    elif case == 'a failed correction':
        health.note(CorrectionStatus('c', CorrectionState.FAILED, 'not learned'), 99.0)
    elif case == 'a corrupt version':
        health.note(AdapterVersion(
            'ann', 7, 6, VersionState.REJECTED, 'bad checksum', path='/v7'), 1.0)
        health.note(AdapterVersion('ann', 0, 0, VersionState.PUBLISHED), 1.0)    # serves instead
    elif case == 'a rejected version':
        health.note(AdapterVersion('', 7, 6, VersionState.REJECTED, 'worse'), 99.0)
    elif case == 'heat':
        reading = Reading(temperature_c=95.0)
    else:
        used = {'little memory': 95.0, 'no memory': 99.0}[case]
        reading = Reading(memory_used_mb=used, memory_total_mb=100.0)
    found = findings(health, status, reading=reading)
    where, level, text = PROBLEMS[case]
    assert found[where].level is level
    assert text in found[where].message
    assert all(f.level is Level.OK for name, f in found.items() if name != where)


def test_a_published_version_clears_the_error() -> None:
    health = Health()
    health.note(AdapterVersion('', 7, 6, VersionState.REJECTED, 'bad checksum', path='/v7'), 1.0)
    health.note(AdapterVersion('', 8, 6, VersionState.PUBLISHED), 2.0)
    assert findings(health)['learning'].level is Level.OK


# -- messages ----------------------------------------------------------------------------


def test_rates_cover_the_time_since_the_last_message() -> None:
    before = Status(10.0, Statistics(decode_tokens=100, prefill_tokens=50))
    after = Status(12.0, Statistics(
        decode_tokens=160, prefill_tokens=50, piggybacked_tokens=10, finetune_tokens=30,
        serving_share=0.5, learning_share=0.25, measured_s=0.016), freshness_s=3.0)
    message = scheduler_message(after, before, Attainment())
    assert (message.decode_rate, message.prefill_rate, message.finetune_rate) == (30.0, 0.0, 20.0)
    assert (message.busy_share, message.measured_ms, message.freshness_s) == (0.75, 16.0, 3.0)
    assert math.isnan(message.slo_attainment)
    assert math.isnan(scheduler_message(after, after, Attainment()).decode_rate)


def test_the_scheduler_message_fills_every_field() -> None:
    status = Status(12.0, Statistics(
        serving_share=0.5, learning_share=0.25, iterations=3, finetune_steps=4, rejected=5,
        late_for_learning=6, predicted_s=1.0, measured_s=2.0, decode_tokens=1, prefill_tokens=1,
        piggybacked_tokens=1, shape=SHAPE), queue_depth=1, prefilling=2, decode_rows=3, kv_use=0.5,
        corrections_waiting=4, freshness_s=5.0, live_version=6, profiles=7,
        kv_cached=0.1, shared_tokens=8, preemptions=9, drift_state=1,
        budget_mb=100.0, planned_mb=90.0)
    message = scheduler_message(
        status, Status(11.0, Statistics()), Attainment(9, 0.5, 10.0, 11.0))
    empty = {name for name in message.get_fields_and_field_types()
             if not getattr(message, name)}
    assert empty == {'learning_frozen'}     # is not part of the status


def test_a_finding_becomes_a_diagnostic_status() -> None:
    health = Health()
    health.fault = 'no such model'
    status = diagnostic_status(findings(health)['serving'], 'robot1/mace', 'a GPU')
    assert (status.level, status.name, status.message, status.hardware_id) == (
        b'\x02', 'robot1/mace: serving', 'no such model', 'a GPU')
    assert {v.key: v.value for v in status.values} == {
        'state': 'unconfigured', 'requests': '0', 'slo_attainment': 'unknown',
        'ttft_p95_ms': 'unknown', 'tpot_p95_ms': 'unknown'}


# -- shipped plot layouts ---------------------------------------------------------------


@pytest.mark.parametrize('file', ['mace.perspective', 'plotjuggler.xml', 'foxglove.json'])
def test_the_shipped_layouts_plot_existing_numeric_fields(file: str) -> None:
    drawn = re.findall(r'/mace/(\w+)[/.](\w+)', (CONFIG / file).read_text())
    assert len(drawn) > 10
    types = {'scheduler': msg.Scheduler, 'latency': msg.Latency}
    for topic, field in drawn:
        assert re.match('u?int|float|double', types[topic].get_fields_and_field_types()[field])


def test_the_shipped_layouts_are_well_formed() -> None:
    ElementTree.parse(CONFIG / 'plotjuggler.xml')
    layout = json.loads((CONFIG / 'foxglove.json').read_text())
    assert panels(layout['layout']) == list(layout['configById'])


def panels(layout: str | dict[str, Any]) -> list[str]:
    """Return the panels that Foxglove shows, from the top left to the bottom right."""
    if isinstance(layout, str):
        return [layout]
    return panels(layout['first']) + panels(layout['second'])


def test_the_plots_show_a_minute() -> None:
    """Without a width, rqt_plot shows one second for ever after a redraw without data."""
    plugins = json.loads((CONFIG / 'mace.perspective').read_text())[
        'groups']['pluginmanager']['groups']
    plots = [plugin['groups']['plugin']['keys'] for name, plugin in plugins.items()
             if 'rqt_plot' in name]
    assert len(plots) == 3
    assert {plot['x_limits']['repr'] for plot in plots} == {'[0.0, 60.0]'}
    foxglove = json.loads((CONFIG / 'foxglove.json').read_text())['configById']
    assert {panel['followingViewWidth'] for name, panel in foxglove.items()
            if name.startswith('Plot')} == {60}
