# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Load, memory, temperature and power of the device.

An Orin's GPU is read from sysfs, since NVML returns NOT_SUPPORTED or zeros there; other CUDA
devices are read through NVML, except the memory of those that share the system's. A CPU is read
through /proc and sysfs. Nothing here raises, and an unknown value is NaN, never zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
import math
import os
from pathlib import Path
from typing import Any

from mace_ros.api.hardware import Hardware

# Files with the GPU's load in per mille, by generation of Jetson.
JETSON_LOADS = (
    'sys/devices/platform/gpu.0/load',
    'sys/devices/gpu.0/load',
    'sys/devices/platform/bus@0/17000000.gpu/load',
)
GPU_ZONES = ('gpu-thermal', 'GPU-therm')
CPU_ZONES = ('x86_pkg_temp', 'cpu-thermal', 'CPU-therm', 'cpu_thermal', 'soc-thermal')
CPU_SENSORS = ('coretemp', 'k10temp', 'zenpower')     # below hwmon
# Power rails of a Jetson's INA3221 sensors; the first set whose rails all exist is used: the total
# of an Orin NX or Nano, or the rails of an AGX Orin. Channels above the third are sums of shunt
# voltages.
RAIL_CHANNELS = (1, 2, 3)
JETSON_RAILS = (('VDD_IN',), ('VDD_GPU_SOC', 'VDD_CPU_CV', 'VIN_SYS_5V0'))


@dataclass(frozen=True)
class Reading:
    """The counters at one moment; NaN is unknown."""

    load: float = math.nan                # share of the time in which the device worked
    memory_used_mb: float = math.nan      # by all processes; system memory where it is unified
    memory_total_mb: float = math.nan
    temperature_c: float = math.nan
    power_w: float = math.nan
    process_memory_mb: float = math.nan   # resident, of this process

    @property
    def memory_free_mb(self) -> float:
        """Memory that no process uses."""
        return self.memory_total_mb - self.memory_used_mb

    @property
    def memory_use(self) -> float:
        """Share of the memory that is in use."""
        return self.memory_used_mb / self.memory_total_mb


class DeviceCounters:
    """Reads the counters of one device; not thread-safe."""

    def __init__(self, hardware: Hardware, *, root: Path = Path('/'),
                 nvml: Any = None) -> None:
        """Read below ``root`` and by ``nvml``, the module pynvml; both are replaced in tests."""
        self._root = root
        self._cpu_times: tuple[float, float] | None = None
        self._sources: list[Callable[[], Reading]] = [self._process]
        if hardware.kind == 'cuda':
            if any((root / path).exists() for path in JETSON_LOADS):
                self._sources.append(self._jetson)
            else:
                self._nvml = nvml or _pynvml()
                self._handle = _handle(self._nvml, hardware.uuid)
                self._sources.append(self._discrete)
                if hardware.integrated:
                    self._sources.append(self._shared_memory)
        else:
            self._sources.append(self._cpu)

    def read(self) -> Reading:
        """Return the current counters."""
        values: dict[str, float] = {}
        for source in self._sources:
            reading = source()
            for field in fields(Reading):
                value = getattr(reading, field.name)
                if math.isfinite(value):
                    values[field.name] = value
        return Reading(**values)

    # -- sources ---------------------------------------------------------------------

    def _process(self) -> Reading:
        pages = _number(self._read('proc/self/statm').split(), 1)
        return Reading(process_memory_mb=pages * os.sysconf('SC_PAGE_SIZE') / 1e6)

    def _jetson(self) -> Reading:
        loads = (_number([self._read(path)]) for path in JETSON_LOADS)
        used, total = self._system_memory()
        return Reading(
            load=next((x / 1000 for x in loads if not math.isnan(x)), math.nan),
            memory_used_mb=used, memory_total_mb=total,
            temperature_c=self._zone(GPU_ZONES), power_w=self._rails())

    def _discrete(self) -> Reading:
        memory = self._nvml_call('nvmlDeviceGetMemoryInfo')
        total = _positive(getattr(memory, 'total', math.nan)) / 1e6
        used = load = math.nan
        # A driver that does not know the memory returns zeros for other values as well.
        if not math.isnan(total):
            used = getattr(memory, 'used', math.nan) / 1e6
            load = getattr(self._nvml_call('nvmlDeviceGetUtilizationRates'), 'gpu', math.nan) / 100
        return Reading(
            load=load, memory_used_mb=used, memory_total_mb=total,
            temperature_c=_positive(self._nvml_call('nvmlDeviceGetTemperature', 0)),
            power_w=_positive(self._nvml_call('nvmlDeviceGetPowerUsage')) / 1000)

    def _shared_memory(self) -> Reading:
        used, total = self._system_memory()
        return Reading(memory_used_mb=used, memory_total_mb=total)

    def _cpu(self) -> Reading:
        used, total = self._system_memory()
        temperature = self._zone(CPU_ZONES)
        return Reading(
            load=self._cpu_load(), memory_used_mb=used, memory_total_mb=total,
            temperature_c=self._sensor() if math.isnan(temperature) else temperature)

    # -- helpers ---------------------------------------------------------------------

    def _cpu_load(self) -> float:
        """Return the load since the last call; NaN at the first call."""
        times = [_number([x]) for x in self._read('proc/stat').partition('\n')[0].split()[1:9]]
        if len(times) < 5:
            return math.nan
        before, self._cpu_times = self._cpu_times, (sum(times), times[3] + times[4])
        if before is None or self._cpu_times[0] <= before[0]:
            return math.nan
        total, idle = (new - old for new, old in zip(self._cpu_times, before, strict=True))
        return min(max(1.0 - idle / total, 0.0), 1.0)

    def _system_memory(self) -> tuple[float, float]:
        """Return used and total MB; the page cache counts as free."""
        known = {}
        for line in self._read('proc/meminfo').splitlines():
            name, _, rest = line.partition(':')
            known[name] = _number(rest.split()) * 1024 / 1e6
        total = _positive(known.get('MemTotal', math.nan))
        return total - known.get('MemAvailable', math.nan), total

    def _zone(self, names: tuple[str, ...]) -> float:
        for zone in self._folders('sys/class/thermal', 'thermal_zone*'):
            if self._read(zone / 'type') in names:
                return _positive(_number([self._read(zone / 'temp')])) / 1000
        return math.nan

    def _sensor(self) -> float:
        for sensor in self._folders('sys/class/hwmon', 'hwmon*'):
            if self._read(sensor / 'name') in CPU_SENSORS:
                return _positive(_number([self._read(sensor / 'temp1_input')])) / 1000
        return math.nan

    def _rails(self) -> float:
        """Return the watts of the board's rails, which may be spread over several sensors."""
        watts: dict[str, float] = {}
        for sensor in self._folders('sys/class/hwmon', 'hwmon*'):
            if self._read(sensor / 'name') == 'ina3221':
                for channel in RAIL_CHANNELS:
                    volts, amperes = (
                        _number([self._read(sensor / f'{kind}{channel}_input')]) / 1000
                        for kind in ('in', 'curr'))
                    watts[self._read(sensor / f'in{channel}_label')] = volts * amperes
        totals = (sum(watts.get(rail, math.nan) for rail in rails) for rails in JETSON_RAILS)
        return next((w for w in totals if w > 0), math.nan)

    def _folders(self, parent: str, pattern: str) -> Iterator[Path]:
        try:
            yield from sorted((self._root / parent).glob(pattern))
        except OSError:
            return

    def _read(self, path: str | Path) -> str:
        try:
            return (self._root / path).read_text().strip()
        except (OSError, ValueError):
            return ''

    def _nvml_call(self, function: str, *arguments: object) -> Any:
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except Exception:    # NVMLError has a class per code, and pynvml may be missing
            return math.nan


def _pynvml() -> Any:
    try:
        import pynvml
        pynvml.nvmlInit()
    except Exception:    # no module, no driver, no device
        return None
    return pynvml


def _handle(nvml: Any, uuid: str) -> Any:
    # By UUID: CUDA_VISIBLE_DEVICES changes the device numbers.
    try:
        return nvml.nvmlDeviceGetHandleByUUID(uuid.encode())
    except Exception:
        return None


def _number(words: list[str], position: int = 0) -> float:
    try:
        return float(words[position])
    except (IndexError, ValueError):
        return math.nan


def _positive(value: float) -> float:
    """Return a counter that cannot be zero; NaN if it is."""
    return value if value > 0 else math.nan
