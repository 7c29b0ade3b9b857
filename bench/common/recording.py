# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Files of results: how a run was started, on which machine, and what it found.

A file holds ``bench``, ``quick``, ``started``, ``seconds``, ``machine``, ``command``,
``settings``, ``earlier``, ``notes``, ``checks``, ``reported``, ``tables`` and ``samples``. Where a
run has measured some parts only, ``earlier`` names the run that each of the other samples is of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
import json
import os
from pathlib import Path
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from typing import Any

from bench.common.results import Result
from mace_ros.simulation.report import plain

FOLDER = Path(__file__).parents[1] / 'results'
QUICK_FOLDER = FOLDER / 'quick'     # separate: a quick run has too few samples to judge by

PACKAGES = ('torch', 'transformers', 'peft', 'numpy', 'llama-cpp-python')
CPU_FLAGS = ('avx2', 'avx512f', 'avx512_bf16', 'avx512_vnni', 'amx_bf16', 'asimddp', 'bf16', 'i8mm')


def machine() -> dict[str, Any]:
    """Describe the machine and the software of this process."""
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
        # These variables decide how threads work and wait.
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
    torch = sys.modules.get('torch')    # do not import torch only for this
    if torch is None or not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_name())


def _commit() -> str | None:
    def git(*words: str) -> str:
        return subprocess.run(
            ['git', *words], cwd=FOLDER.parent, check=True, capture_output=True,
            text=True).stdout.strip()
    try:
        # Untracked files and earlier results do not change what is measured.
        changed = git('status', '--porcelain', '--untracked-files=no', '--', '..',
                      ':(exclude)results')
        return git('rev-parse', '--short=12', 'HEAD') + (' and changes' if changed else '')
    except (OSError, subprocess.CalledProcessError):
        return None


class Recorder:
    """Records when and how a benchmark was started, and writes its results."""

    def __init__(self, settings: Mapping[str, Any], *, quick: bool = False) -> None:
        """Record the options in ``settings``; ``quick`` results go to a separate folder."""
        self.quick = quick
        # The folder of the results does not influence the measurement.
        self._settings = {k: str(v) if isinstance(v, Path) else v
                          for k, v in settings.items() if k != 'results'}
        self._machine = machine()
        self._started, self._clock = datetime.now(timezone.utc), time.monotonic()
        self._found: dict[str, Any] = {}    # in the file that an earlier run has written

    @property
    def started(self) -> str:
        """When the run began."""
        return self._started.isoformat(timespec='seconds')

    @property
    def commit(self) -> str | None:
        """The commit that is measured; None outside of a repository."""
        commit: str | None = self._machine['commit']
        return commit

    @property
    def cpu(self) -> str:
        """The name of the CPU that runs the benchmark."""
        cpu: str = self._machine['cpu']
        return cpu

    def earlier(self, bench: str, folder: Path | None = None) -> dict[str, Any]:
        """Return the samples in the file that :meth:`write` would replace; empty if none."""
        path = self._path(bench, folder)
        if path.exists():
            self._found = json.loads(path.read_text())
        return dict(self._found.get('samples', {}))

    def origins(self, samples: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """
        Return when, where and of which commit samples were taken that :meth:`earlier` returned.

        They are recognised by their identity; those that this run has measured are left out.
        """
        if not self._found:
            return {}
        known, machine = self._found['samples'], self._found['machine']
        origin = {'started': self._found['started'],
                  **{name: machine[name] for name in ('commit', 'cpu', 'cores', 'gpu')}}
        earlier = self._found.get('earlier', {})
        return {name: earlier.get(name, origin) for name, value in samples.items()
                if value is known.get(name)}

    def _path(self, bench: str, folder: Path | None) -> Path:
        return (folder or (QUICK_FOLDER if self.quick else FOLDER)) / f'{bench}.json'

    def write(self, result: Result, folder: Path | None = None) -> Path:
        """Write ``<folder>/<bench>.json`` atomically; return its path."""
        module = f'bench.{result.bench}'
        data = {
            'bench': result.bench, 'quick': self.quick,
            'started': self.started,
            'seconds': round(time.monotonic() - self._clock, 1),
            'machine': self._machine,
            'command': shlex.join(['python', '-m', module, *sys.argv[1:]]),
            'settings': self._settings, 'earlier': self.origins(result.samples),
            'notes': result.notes,
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
    """Return JSON with one line per sample, so that a diff is readable."""
    return _dumps(plain(data), 0) + '\n'


def _dumps(data: Any, depth: int) -> str:
    inner = ' ' * (depth + 1)
    if isinstance(data, dict) and data and depth < 3:
        lines = [f'{inner}{json.dumps(k)}: {_dumps(v, depth + 1)}' for k, v in data.items()]
        return '{\n' + ',\n'.join(lines) + '\n' + ' ' * depth + '}'
    if isinstance(data, list) and any(isinstance(x, (dict, list, str)) for x in data):
        lines = [inner + json.dumps(x, allow_nan=False) for x in data]
        return '[\n' + ',\n'.join(lines) + '\n' + ' ' * depth + ']'
    return json.dumps(data, allow_nan=False)


def read(folder: Path | None = None) -> list[dict[str, Any]]:
    """Return the results in a folder, sorted by the name of the benchmark."""
    return [json.loads(path.read_text()) for path in sorted((folder or FOLDER).glob('*.json'))]
