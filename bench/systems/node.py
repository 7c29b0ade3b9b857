# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A node in its own process, for benchmarks of what a robot sees of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
import json
import os
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

ROOT = Path(__file__).parents[2]
STAMPS = 'MACE_BENCH_STAMPS'      # file for the times of the 10 Hz timer
SYNC_S = 'MACE_BENCH_SYNC_S'      # seconds that are added to each fsync of a file or folder
PERIOD_S = 0.1
START_S = 250.0     # at most, until a node is ready


def isolate() -> None:
    """Keep the ROS traffic of this process, and of nodes that it starts, on this machine."""
    os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'
    # These domains lie above the ephemeral ports of Linux, and robots rarely use them.
    os.environ['ROS_DOMAIN_ID'] = str(215 + os.getpid() % 17)
    os.environ.setdefault('HF_HUB_OFFLINE', '1')


class NodeProcess:
    """``mace_node`` with an additional 10 Hz timer whose call times are recorded."""

    def __init__(self, folder: Path, parameters: Mapping[str, Any], *,
                 sync_s: float = 0.0) -> None:
        """Start it; storage and log are in ``folder``, and each fsync takes ``sync_s`` longer."""
        self._stamps, self._log = folder / 'stamps.json', folder / 'node.log'
        values = {'storage.folder': folder / 'storage', **parameters}
        arguments = [x for name, value in values.items() for x in ('-p', f'{name}:={value}')]
        with self._log.open('w') as log:
            self._process = subprocess.Popen(
                [sys.executable, '-m', 'bench.systems.node', '--ros-args', *arguments], cwd=ROOT,
                env={**os.environ, STAMPS: str(self._stamps), SYNC_S: str(sync_s),
                     'ROS_LOG_DIR': str(folder / 'log')},
                stdout=log, stderr=subprocess.STDOUT)

    @property
    def log(self) -> str:
        """The output of the process so far."""
        return self._log.read_text()

    @property
    def errors(self) -> Counter[str]:
        """How many lines of the log name an error of each kind."""
        return Counter(kind for line in self.log.splitlines()
                       for kind in ('ERROR', 'FATAL', 'Traceback') if kind in line)

    @property
    def error_lines(self) -> list[str]:
        """The lines of the log of this severity; others may contain the word as well."""
        return [line for line in self.log.splitlines()
                if line.startswith(('[ERROR]', '[FATAL]', 'Traceback'))]

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def memory_mb(self) -> float:
        """Return the resident memory of the process in MB."""
        pages = Path(f'/proc/{self.pid}/statm').read_text().split()[1]
        return int(pages) * os.sysconf('SC_PAGE_SIZE') / 1e6

    def stop(self) -> list[float]:
        """End the process; return the times of its timer calls, of ``time.monotonic``."""
        self._process.terminate()
        try:
            self._process.wait(30.0)
        except subprocess.TimeoutExpired:
            self.kill()
        stamps: list[float] = json.loads(self._stamps.read_text())
        return stamps

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()


def main() -> int:
    """Run the node with its timer; return its exit code."""
    from mace_ros.ros import node as node_module

    stamps: list[float] = []

    class TimedNode(node_module.MaceNode):
        """The node with a timer beside its own callbacks."""

        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.create_timer(PERIOD_S, lambda: stamps.append(time.monotonic()))

    def slow_fsync(descriptor: Any, fsync: Callable[[Any], None] = os.fsync) -> None:
        time.sleep(float(os.environ[SYNC_S]))
        fsync(descriptor)

    os.fsync = slow_fsync   # type: ignore[assignment]
    node_module.MaceNode = TimedNode     # type: ignore[misc]
    try:
        return node_module.main()
    finally:
        Path(os.environ[STAMPS]).write_text(json.dumps(stamps))


if __name__ == '__main__':
    sys.exit(main())
