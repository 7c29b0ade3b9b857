# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A node in a process of its own, for benchmarks of what a robot sees of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import json
import os
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

ROOT = Path(__file__).parents[1]
STAMPS = 'MACE_BENCH_STAMPS'      # names the file for the times of the 10 Hz timer
SYNC_S = 'MACE_BENCH_SYNC_S'      # how much longer each fsync of a file or folder takes
PERIOD_S = 0.1


def own_domain() -> None:
    """Keep this process, and the nodes that it starts, from all others on the network."""
    os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'
    # Of those above the ports that Linux gives to everybody, which robots seldom use.
    os.environ['ROS_DOMAIN_ID'] = str(215 + os.getpid() % 17)
    os.environ.setdefault('HF_HUB_OFFLINE', '1')


class NodeProcess:
    """``mace_node`` with a timer of ten calls a second in it, whose times it notes."""

    def __init__(self, folder: Path, parameters: Mapping[str, Any], *,
                 sync_s: float = 0.0) -> None:
        """Start it; its storage, on a disk that is so slow, and its log are in ``folder``."""
        self._stamps, self._log = folder / 'stamps.json', folder / 'node.log'
        values = {'storage.folder': folder / 'storage', **parameters}
        arguments = [x for name, value in values.items() for x in ('-p', f'{name}:={value}')]
        with self._log.open('w') as log:
            self._process = subprocess.Popen(
                [sys.executable, '-m', 'bench.node', '--ros-args', *arguments], cwd=ROOT,
                env={**os.environ, STAMPS: str(self._stamps), SYNC_S: str(sync_s),
                     'ROS_LOG_DIR': str(folder / 'log')},
                stdout=log, stderr=subprocess.STDOUT)

    @property
    def log(self) -> str:
        """All that it has printed."""
        return self._log.read_text()

    @property
    def pid(self) -> int:
        """The id of its process."""
        return self._process.pid

    def memory_mb(self) -> float:
        """Return its resident memory."""
        pages = Path(f'/proc/{self.pid}/statm').read_text().split()[1]
        return int(pages) * os.sysconf('SC_PAGE_SIZE') / 1e6

    def stop(self) -> list[float]:
        """End it; return when its timer was called, in seconds of time.monotonic()."""
        self._process.terminate()
        try:
            self._process.wait(30.0)
        except subprocess.TimeoutExpired:
            self.kill()
        stamps: list[float] = json.loads(self._stamps.read_text())
        return stamps

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()


def main() -> int:
    """Run the node with its timer; return its exit code."""
    from mace_ros.ros import node as room

    stamps: list[float] = []

    class TimedNode(room.MaceNode):
        """The node, and a callback beside its own."""

        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.create_timer(PERIOD_S, lambda: stamps.append(time.monotonic()))

    def slow_fsync(descriptor: int, fsync: Callable[[int], None] = os.fsync) -> None:
        time.sleep(float(os.environ[SYNC_S]))
        fsync(descriptor)

    os.fsync = slow_fsync
    room.MaceNode = TimedNode     # type: ignore[misc]
    try:
        return room.main()
    finally:
        Path(os.environ[STAMPS]).write_text(json.dumps(stamps))


if __name__ == '__main__':
    sys.exit(main())
