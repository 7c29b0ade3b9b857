# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The peers of bench.colocation, each behind the same few methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
import time
from typing import Any, Protocol

from bench.colocation_checks import SPLIT
from bench.load import Arrival, block_row, request_row, Slo
from bench.peers.worker import CONTEXT, Worker
from mace_ros.api.settings import Settings

AHEAD_S = 0.2     # a block begins so much after the processes are told of it

Rows = tuple[list[dict[str, Any]], dict[str, Any]]


class Peer(Protocol):
    """A system that is compared with ours."""

    def warm_up(self, load: Sequence[Arrival], max_tokens: int) -> None:
        """Do a little of everything."""

    def run_block(self, system: str, block: int, load: Sequence[Arrival], seconds: float,
                  max_tokens: int, slo: Slo) -> Rows:
        """Serve ``load``, for at least so long; return rows of requests and of the block."""

    def close(self) -> None:
        """End its processes."""


class Server:
    """One process that answers."""

    def __init__(self, worker: Worker) -> None:
        """Take a worker that is being made."""
        self._worker = worker.ready()

    def warm_up(self, load: Sequence[Arrival], max_tokens: int) -> None:
        """Answer ``load`` once."""
        self._worker.call('run_block', time.monotonic(), load, max_tokens)

    def run_block(self, system: str, block: int, load: Sequence[Arrival], seconds: float,
                  max_tokens: int, slo: Slo) -> Rows:
        """Serve ``load``, for at least so long; return rows of requests and of the block."""
        begun = time.monotonic() + AHEAD_S
        answers, busy = self._worker.call('run_block', begun, load, max_tokens)
        time.sleep(max(begun + seconds - time.monotonic(), 0.0))
        wall = time.monotonic() - begun
        return ([request_row(system, block, begun, a, slo) for a in answers],
                block_row(system, block, wall_s=wall, busy_s=busy))

    def close(self) -> None:
        """End the process."""
        self._worker.close()


class Split:
    """Two processes with the threads divided between them: one answers, the other trains."""

    def __init__(self, server: Worker, trainer: Worker, go: Any, threads: int) -> None:
        """Take workers that are being made; ``go`` is the trainer's event."""
        self._server, self._trainer, self._go = server.ready(), trainer.ready(), go
        self._training = max(threads // 2, 1)
        self._server.call('threads', max(threads - self._training, 1))

    def whole_steps(self, count: int, threads: int) -> list[float]:
        """Return the seconds of training steps with all threads and nothing beside them."""
        self._trainer.call('threads', threads)
        spent: list[float] = self._trainer.call('steps', count)
        self._trainer.call('threads', self._training)
        return spent

    def warm_up(self, load: Sequence[Arrival], max_tokens: int) -> None:
        """Answer ``load`` once and train for two steps."""
        self._server.call('run_block', time.monotonic(), load, max_tokens)
        self.whole_steps(2, self._training)

    def run_block(self, system: str, block: int, load: Sequence[Arrival], seconds: float,
                  max_tokens: int, slo: Slo) -> Rows:
        """Serve ``load``, for at least so long, and train meanwhile."""
        self._go.set()
        self._trainer.start('train')
        begun = time.monotonic() + AHEAD_S
        try:
            answers, busy = self._server.call('run_block', begun, load, max_tokens)
            time.sleep(max(begun + seconds - time.monotonic(), 0.0))
            ended = time.monotonic()
        finally:
            self._go.clear()
            spent = self._trainer.result()
        # A step that the end of the block cuts counts by its part: none is favoured.
        done = sum(max(min(end, ended) - max(start, begun), 0.0) / (end - start)
                   for start, end, _ in spent)
        tokens = spent[0][2] if spent else 0
        trained = sum(max(min(end, ended) - max(start, begun), 0.0) for start, end, _ in spent)
        # Each process has half of the device.
        return ([request_row(system, block, begun, a, slo) for a in answers],
                block_row(system, block, wall_s=ended - begun, busy_s=(busy + trained) / 2.0,
                          finetune_tokens=round(done * tokens), finetune_steps=int(done)))

    def close(self) -> None:
        """End both processes."""
        self._server.close()
        self._trainer.close()


def make_peer(system: str, *, model: str, adapter: Path, dtype: str,
              samples: Sequence[Sequence[int]], settings: Settings, threads: int,
              folder: Path) -> Peer:
    """Load a peer; raises ``PeerFailed`` with the reason if it can't be had."""
    from bench.peers.continuous_batching import ContinuousBatching
    from bench.peers.generate import HfGenerate
    from bench.peers.training import PeftTraining

    files = {'model': model, 'adapter': str(adapter), 'dtype': dtype}
    if system == SPLIT:
        go = CONTEXT.Event()
        return Split(
            Worker(HfGenerate, **files),
            Worker(PeftTraining, **files, learning_rate=settings.finetune.learning_rate,
                   samples=samples, go=go), go, threads)
    if system == 'llama_cpp':
        from bench.peers.gguf_files import adapter as write_adapter, convert
        from bench.peers.llama import LlamaCpp
        from mace_ros.model.loading import packaged_gguf

        source = packaged_gguf()
        return Server(Worker(
            LlamaCpp, model=str(convert(source, folder / f'{dtype}.gguf', dtype)),
            adapter=str(write_adapter(source, folder / 'adapter.gguf', settings.adapter.rank,
                                      settings.adapter.alpha)), threads=threads))
    worker = Worker(HfGenerate if system == 'hf_generate' else ContinuousBatching, **files)
    server = Server(worker)
    worker.call('threads', threads)
    return server
