# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
What a benchmark leaves behind: samples, checks computed from them, and the machine.

A file of results holds ``bench``, ``quick``, ``started``, ``seconds``, ``machine``,
``command``, ``settings``, ``notes``, ``checks``, ``reported``, ``tables`` and ``samples``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
import json
import math
import os
from pathlib import Path
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

FOLDER = Path(__file__).parent / 'results'
QUICK_FOLDER = FOLDER / 'quick'     # too few samples to judge by: kept apart

PACKAGES = ('torch', 'transformers', 'peft', 'numpy', 'llama-cpp-python')
CPU_FLAGS = ('avx2', 'avx512f', 'avx512_bf16', 'avx512_vnni', 'amx_bf16', 'asimddp', 'bf16', 'i8mm')


@dataclass(frozen=True)
class Check:
    """
    A number that was promised, and whether it holds.

    ``target`` is ``<= x``, ``>= x`` or ``x to y``. A ``value`` of None was not measured,
    and so doesn't hold. ``note`` says how the value came about.
    """

    name: str
    value: float | None
    target: str
    holds: bool
    note: str = ''


@dataclass(frozen=True)
class Reported:
    """A number that nothing hangs on; ``aim`` is what we would like it to be, in words."""

    name: str
    value: float | None
    aim: str = ''
    note: str = ''


@dataclass(frozen=True)
class Table:
    """A table to show; cells are text or numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ''


@dataclass
class Result:
    """Everything that one run of a benchmark found out."""

    bench: str
    samples: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    reported: list[Reported] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check(name: str, value: float | None, target: str, note: str = '') -> Check:
    """Compare ``value`` with ``target``; raises ``ValueError`` if that can't be read."""
    if value is not None and not math.isfinite(value):
        value = None
    words = target.split()
    match words:
        case ['<=', limit]:
            holds = value is not None and value <= float(limit)
        case ['>=', limit]:
            holds = value is not None and value >= float(limit)
        case [low, 'to', high]:
            holds = value is not None and float(low) <= value <= float(high)
        case _:
            raise ValueError(f'{name}: target {target!r} is not <= x, >= x or x to y')
    return Check(name, value, target, holds, note if value is not None else note or 'not measured')


def percentile(values: Iterable[float | None], percent: float) -> float:
    """Return a percentile, linear between the ranks; NaN of no values. None is left out."""
    ordered = sorted(v for v in values if v is not None and not math.isnan(v))
    if not ordered:
        return math.nan
    place = (len(ordered) - 1) * percent / 100.0
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    # In this form equal neighbours, infinite ones too, give themselves.
    if ordered[low] == ordered[high]:
        return ordered[low]
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True)
class Ratio:
    """The ratio of two systems in the blocks that both of them ran."""

    blocks: tuple[float, ...]

    @property
    def median(self) -> float | None:
        """By which the ratio is judged: one noisy block changes little."""
        return statistics.median(self.blocks) if self.blocks else None

    @property
    def spread(self) -> str:
        """Say how many blocks there were, and between what their ratios lay."""
        if not self.blocks:
            return 'not measured'
        count = len(self.blocks)
        return (f'median of {count} paired block{"s" * (count != 1)}, '
                f'{min(self.blocks):.3g} to {max(self.blocks):.3g}')


def paired(above: Mapping[int, float], below: Mapping[int, float]) -> Ratio:
    """Return the ratios of two values per block, where both were measured."""
    ratios = [above[b] / below[b] for b in sorted(above.keys() & below.keys()) if below[b]]
    return Ratio(tuple(r for r in ratios if math.isfinite(r)))


def machine() -> dict[str, Any]:
    """Describe where this process runs."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    model, flags = _cpu()
    pages = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return {
        'cpu': model, 'cores': len(os.sched_getaffinity(0)), 'flags': flags,
        'memory_gib': round(pages / 2**30, 1), 'gpu': _gpu(), 'system': platform.platform(),
        'python': platform.python_version(), 'packages': versions, 'commit': _commit(),
        # What decides how threads work and wait.
        'environment': {k: v for k, v in sorted(os.environ.items())
                        if k.startswith(('OMP_', 'GOMP_', 'KMP_', 'MKL_'))},
        'load_before': round(os.getloadavg()[0], 2)}


def _cpu() -> tuple[str, list[str]]:
    model, flags = platform.processor() or platform.machine(), set()
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(':')
        if key.strip() in ('model name', 'Model'):
            model = value.strip()
        elif key.strip() in ('flags', 'Features'):
            flags = set(value.split())
    return model, [f for f in CPU_FLAGS if f in flags]


def _gpu() -> str | None:
    torch = sys.modules.get('torch')    # not worth importing for this
    if torch is None or not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_name())


def _commit() -> str | None:
    def git(*words: str) -> str:
        return subprocess.run(
            ['git', *words], cwd=Path(__file__).parent, check=True, capture_output=True,
            text=True).stdout.strip()
    try:
        # Only what is tracked counts, and not the results of what ran before.
        changed = git('status', '--porcelain', '--untracked-files=no', '--', '..',
                      ':(exclude)results')
        return git('rev-parse', '--short=12', 'HEAD') + (' and changes' if changed else '')
    except (OSError, subprocess.CalledProcessError):
        return None


class Recorder:
    """Notes when and how a benchmark was started, and writes its results in the end."""

    def __init__(self, settings: Mapping[str, Any], *, quick: bool = False) -> None:
        """Begin; ``settings`` are the options in force. Results of a quick run are kept apart."""
        self.quick = quick
        # Where it is written is no condition of what was measured.
        self._settings = {k: str(v) if isinstance(v, Path) else v
                          for k, v in settings.items() if k != 'results'}
        self._machine = machine()
        self._started, self._clock = datetime.now(timezone.utc), time.monotonic()

    @property
    def commit(self) -> str | None:
        """What is measured."""
        commit: str | None = self._machine['commit']
        return commit

    @property
    def cpu(self) -> str:
        """What it is measured on."""
        cpu: str = self._machine['cpu']
        return cpu

    def earlier(self, bench: str, folder: Path | None = None) -> dict[str, Any]:
        """Return the samples of an earlier run that :meth:`write` would replace, if any."""
        path = self._path(bench, folder)
        return dict(json.loads(path.read_text())['samples']) if path.exists() else {}

    def _path(self, bench: str, folder: Path | None) -> Path:
        return (folder or (QUICK_FOLDER if self.quick else FOLDER)) / f'{bench}.json'

    def write(self, result: Result, folder: Path | None = None) -> Path:
        """Write ``<folder>/<bench>.json``, whole or not at all; return its path."""
        module = f'bench.{result.bench}'
        data = {
            'bench': result.bench, 'quick': self.quick,
            'started': self._started.isoformat(timespec='seconds'),
            'seconds': round(time.monotonic() - self._clock, 1),
            'machine': self._machine,
            'command': shlex.join(['python', '-m', module, *sys.argv[1:]]),
            'settings': self._settings, 'notes': result.notes,
            'checks': [asdict(c) for c in result.checks],
            'reported': [asdict(r) for r in result.reported],
            'tables': [asdict(t) for t in result.tables],
            'samples': result.samples}
        path = self._path(result.bench, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f'.{result.bench}-', dir=path.parent)
        try:
            with os.fdopen(handle, 'w') as file:
                file.write(dumps(data))
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
        return path


def dumps(data: Any) -> str:
    """Return JSON with one line for each sample, so that a diff can be read."""
    return _dumps(_plain(data), 0) + '\n'


def _dumps(data: Any, depth: int) -> str:
    inner = ' ' * (depth + 1)
    if isinstance(data, dict) and data and depth < 3:
        lines = [f'{inner}{json.dumps(k)}: {_dumps(v, depth + 1)}' for k, v in data.items()]
        return '{\n' + ',\n'.join(lines) + '\n' + ' ' * depth + '}'
    if isinstance(data, list) and any(isinstance(x, (dict, list, str)) for x in data):
        lines = [inner + json.dumps(x, allow_nan=False) for x in data]
        return '[\n' + ',\n'.join(lines) + '\n' + ' ' * depth + ']'
    return json.dumps(data, allow_nan=False)


def _plain(data: Any) -> Any:
    """Return ``data`` as JSON can hold it: no NaN, numbers no longer than their precision."""
    if isinstance(data, dict):
        return {str(k): _plain(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(x) for x in data]
    if isinstance(data, float):
        return float(f'{data:.6g}') if math.isfinite(data) else None
    return data


def read(folder: Path | None = None) -> list[dict[str, Any]]:
    """Return the results in a folder, by name of the benchmark."""
    return [json.loads(path.read_text()) for path in sorted((folder or FOLDER).glob('*.json'))]
