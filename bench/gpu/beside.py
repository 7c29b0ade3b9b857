# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""An engine at several loads, with fine-tuning always pending and without any."""

from __future__ import annotations

from collections.abc import Iterator
import math
import statistics
from typing import Any

from bench.common.load import arrivals, prose, training_sequences
from bench.common.running import Run
from bench.gpu.models import random_model
from bench.gpu.passes import STEP_TOKENS

# Device time that the requests would take one at a time, as a share of the block's time. At the
# last load the device never rests: requests overlap, and take less time than one at a time.
LOADS = (0.0, 0.5, 1.0)
BLOCKS = 4              # of each load; blocks of all loads take turns
IDLE_STEPS = 20         # undivided steps that fit into a block without requests
PROMPT_TOKENS = OUTPUT_TOKENS = 64
# For everything but the weights, of which half at most is the KV cache.
BUDGET_MB = 6000.0


def measure_beside(shape: str, run: Run) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the blocks of an engine, and the peak of its memory."""
    from bench.systems.engine_under_load import EngineUnderLoad
    from mace_ros.api.settings import Settings
    from mace_ros.model.hardware import release_memory
    from mace_ros.model.loading import load_model

    release_memory()        # of the models before, whose peak this would be
    packaged = load_model('', device='cpu')
    folder = run.folder / 'model'
    packaged.tokenizer.save_pretrained(folder)
    base = random_model(shape, 'cpu')
    base.save_pretrained(folder)
    weights = sum(p.nbytes for p in base.parameters())
    del base
    settings = Settings().updated({
        'model.source': str(folder), 'model.device': run.args.device,
        'memory.budget_mb': BUDGET_MB})
    ids = training_sequences(packaged.tokenizer.encode(prose()), STEP_TOKENS)
    served = EngineUnderLoad(settings, run.folder / 'storage', ids, print)
    try:
        with PeakMemory(run.args.device) as peak:
            rows = list(Loads(served, run).blocks())
        memory = served.engine.parts.memory.budget
        kv_cache = served.engine.model.kv_cache.nbytes
        return rows, [{
            'shape': shape, 'weights_bytes': weights, 'peak_bytes': peak.nbytes,
            'budget_bytes': memory.total, 'graphs_bytes': memory.graphs,
            'kv_cache_bytes': kv_cache}]
    finally:
        served.close()


class PeakMemory:
    """The most memory that torch has reserved on a GPU while this was open; NaN on a CPU."""

    def __init__(self, device: str) -> None:
        """Measure on ``device``."""
        self.nbytes = math.nan
        self._on_gpu = device == 'cuda'

    def __enter__(self) -> PeakMemory:
        """Forget earlier peaks."""
        import torch

        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *args: object) -> None:
        """Note the peak."""
        import torch

        if self._on_gpu:
            self.nbytes = float(torch.cuda.max_memory_reserved())


class Loads:
    """The blocks of an engine under load."""

    def __init__(self, served: Any, run: Run) -> None:
        """Warm up, and measure what a request takes alone."""
        self._served, self._run = served, run
        served.run_block('mace', -1, self._arrivals('warm up', 2, 1.0), 1.0, OUTPUT_TOKENS)
        self._request_s = served.request_seconds(self._arrivals('alone', 3, 0.0), OUTPUT_TOKENS)

    def blocks(self) -> Iterator[dict[str, Any]]:
        """Yield blocks of three requests at once, then those of all loads."""
        for i in range(3):
            found = self._served.run_block(
                'inference_only', i, self._arrivals(f'busy {i}', 3, 0.0), 0.0, OUTPUT_TOKENS)
            yield {**found.block, 'system': 'busy', 'load': None}
        for block in range(BLOCKS):
            undivided_s = statistics.median(self._served.undivided_steps(3))
            for load in LOADS:
                self._run.say(f'block {block + 1} of {BLOCKS}: load {load:.0%}')
                yield from self._at(load, block, undivided_s)

    def _at(self, load: float, block: int, undivided_s: float) -> Iterator[dict[str, Any]]:
        """Yield a block of each system; without load, only of the one that learns."""
        count = max(self._run.args.requests // BLOCKS, 1) if load else 0
        seconds = count * self._request_s / load if load else IDLE_STEPS * undivided_s
        requests = self._arrivals(f'{load} {block}', count, seconds)
        systems = ('inference_only', 'mace')[::1 if block % 2 else -1] if load else ('mace',)
        for system in systems:
            found = self._served.run_block(system, block, requests, seconds, OUTPUT_TOKENS)
            yield {**found.block, 'load': load, 'undivided_s': undivided_s,
                   **{column: [r[column] for r in found.requests]
                      for column in ('ttft_ms', 'tpot_ms')}}

    def _arrivals(self, seed: str, count: int, seconds: float) -> Any:
        chat = self._served.engine.chat
        return arrivals(lambda text: chat.prompt([{'role': 'user', 'content': text}]), seed,
                        count=count, seconds=seconds, tokens=PROMPT_TOKENS)
