# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""LoRA training as in PEFT's documentation: whole steps, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from multiprocessing.synchronize import Event
import time

import torch

from bench.systems.peers.loading import load


class PeftTraining:
    """Trains an adapter in its own process, beside a server in another one."""

    def __init__(self, model: str, adapter: str, dtype: str, learning_rate: float,
                 samples: Sequence[Sequence[int]], go: Event) -> None:
        """Load ``model`` with the PEFT ``adapter``; :meth:`train` runs while ``go`` is set."""
        self._model = load(model, adapter, dtype, is_trainable=True).train()
        self._optimizer = torch.optim.AdamW(
            [p for p in self._model.parameters() if p.requires_grad], lr=learning_rate,
            weight_decay=0.0, fused=True)
        self._tokens = len(samples[0])
        self._samples = cycle([torch.tensor([list(s)]) for s in samples])
        self._go = go

    def threads(self, count: int) -> None:
        """Set the number of compute threads."""
        torch.set_num_threads(count)

    def step(self) -> float:
        """Run one step over one sample; return its seconds."""
        began = time.monotonic()
        ids = next(self._samples)
        self._model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return time.monotonic() - began

    def steps(self, count: int) -> list[float]:
        """Run ``count`` steps; return the seconds of each."""
        return [self.step() for _ in range(count)]

    def train(self) -> list[tuple[float, float, int]]:
        """Run steps while ``go`` is set; return begin, end and tokens of each step."""
        spent = []
        while self._go.is_set():
            began = time.monotonic()
            spent.append((began, began + self.step(), self._tokens))
        return spent
