# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The peers of the colocation benchmark behind one interface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
import time
from typing import Any, Protocol

from bench.colocation.checks import SPLIT
from bench.common.load import Arrival, block_row, request_row, Slo
from bench.systems.peers.worker import CONTEXT, Worker
from mace_ros.api.settings import Settings

LEAD_S = 0.2     # a block starts this long after the processes receive it

Rows = tuple[list[dict[str, Any]], dict[str, Any]]


class Peer(Protocol):
    """A system that mace_ros is compared with."""

    def warm_up(self, load: Sequence[Arrival], max_tokens: int) -> None:
        """Serve and, if the system trains, train a little."""

    def run_block(self, system: str, block: int, load: Sequence[Arrival], seconds: float,
                  max_tokens: int, slo: Slo) -> Rows:
        """Serve ``load`` for at least ``seconds``; return samples of requests and block."""

    def close(self) -> None:
        """Stop its processes."""


class Server:
    """One process that serves."""

    def __init__(self, worker: Worker) -> None:
        """Wait until the worker is ready."""
        self._worker = worker.ready()

    def warm_up(self, load: Sequence[Arrival], max_tokens: int) -> None:
        """Serve ``load`` once."""
        self._worker.call('run_block', time.monotonic(), load, max_tokens)

    def run_block(self, system: str, block: int, load: Sequence[Arrival], seconds: float,
                  max_tokens: int, slo: Slo) -> Rows:
        """Serve ``load`` for at least ``seconds``; return samples of requests and block."""
        begun = time.monotonic() + LEAD_S
        served, busy = self._worker.call('run_block', begun, load, max_tokens)
        time.sleep(max(begun + seconds - time.monotonic(), 0.0))
        wall = time.monotonic() - begun
        return ([request_row(system, block, begun, times, slo) for times in served],
                block_row(system, block, wall_s=wall, busy_s=busy))

    def close(self) -> None:
        """Stop the process."""
        self._worker.close()


class Split:
    """Two processes that share the threads: one serves, the other trains."""

    def __init__(self, server: Worker, trainer: Worker, go: Any, threads: int) -> None:
        """Wait until the workers are ready; ``go`` is the event of the trainer."""
        self._server, self._trainer, self._go = server.ready(), trainer.ready(), go
        self._training = max(threads // 2, 1)
        self._server.call('threads', max(threads - self._training, 1))

    def whole_steps(self, count: int, threads: int) -> list[float]:
        """Return the seconds of training steps that run alone with all ``threads``."""
        self._trainer.call('threads', threads)
        seconds: list[float] = self._trainer.call('steps', count)
        self._trainer.call('threads', self._training)
        return seconds

    def warm_up(self, load: Sequence[Arrival], max_tokens: int) -> None:
        """Serve ``load`` once and train for two steps."""
        self._server.call('run_block', time.monotonic(), load, max_tokens)
        self.whole_steps(2, self._training)

    def run_block(self, system: str, block: int, load: Sequence[Arrival], seconds: float,
                  max_tokens: int, slo: Slo) -> Rows:
        """Serve ``load`` for at least ``seconds``, and train at the same time."""
        self._go.set()
        self._trainer.start('train')
        begun = time.monotonic() + LEAD_S
        try:
            served, busy = self._server.call('run_block', begun, load, max_tokens)
            time.sleep(max(begun + seconds - time.monotonic(), 0.0))
            ended = time.monotonic()
        finally:
            self._go.clear()
            steps = self._trainer.result()
        # A step that crosses the end of the block counts by the part inside, as in mace_ros.
        done = sum(max(min(end, ended) - max(start, begun), 0.0) / (end - start)
                   for start, end, _ in steps)
        tokens = steps[0][2] if steps else 0
        trained = sum(max(min(end, ended) - max(start, begun), 0.0) for start, end, _ in steps)
        # Each process has half of the threads.
        return ([request_row(system, block, begun, times, slo) for times in served],
                block_row(system, block, wall_s=ended - begun, busy_s=(busy + trained) / 2.0,
                          finetune_tokens=round(done * tokens), finetune_steps=int(done)))

    def close(self) -> None:
        """Stop both processes."""
        self._server.close()
        self._trainer.close()


def make_peer(system: str, *, model: str, adapter: Path, dtype: str,
              samples: Sequence[Sequence[int]], settings: Settings, threads: int,
              folder: Path) -> Peer:
    """Load a peer; raises ``PeerFailed`` with the reason if that fails."""
    from bench.systems.peers.continuous_batching import ContinuousBatching
    from bench.systems.peers.generate import HfGenerate
    from bench.systems.peers.training import PeftTraining

    files = {'model': model, 'adapter': str(adapter), 'dtype': dtype}
    if system == SPLIT:
        go = CONTEXT.Event()
        return Split(
            Worker(HfGenerate, **files),
            Worker(PeftTraining, **files, learning_rate=settings.finetune.learning_rate,
                   samples=samples, go=go), go, threads)
    if system == 'llama_cpp':
        from bench.systems.peers.gguf_files import adapter as write_adapter, convert
        from bench.systems.peers.llama import LlamaCpp
        from mace_ros.model.loading import packaged_gguf

        source = packaged_gguf()
        return Server(Worker(
            LlamaCpp, model=str(convert(source, folder / f'{dtype}.gguf', dtype)),
            adapter=str(write_adapter(source, folder / 'adapter.gguf', adapter)),
            threads=threads))
    worker = Worker(HfGenerate if system == 'hf_generate' else ContinuousBatching, **files)
    server = Server(worker)
    worker.call('threads', threads)
    return server
