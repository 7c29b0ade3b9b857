# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""LoRA training as PEFT's users write it: whole steps, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from multiprocessing.synchronize import Event
import time

import torch

from bench.peers.loading import load


class PeftTraining:
    """Trains the adapter on in a process of its own."""

    def __init__(self, model: str, adapter: str, dtype: str, learning_rate: float,
                 samples: Sequence[Sequence[int]], go: Event) -> None:
        """Load ``model`` with the PEFT ``adapter``; training goes on while ``go`` is set."""
        self._model = load(model, adapter, dtype, is_trainable=True).train()
        self._optimizer = torch.optim.AdamW(
            [p for p in self._model.parameters() if p.requires_grad], lr=learning_rate,
            weight_decay=0.0, fused=True)
        self._tokens = len(samples[0])
        self._samples = cycle([torch.tensor([list(s)]) for s in samples])
        self._go = go

    def threads(self, count: int) -> None:
        """Compute with so many threads from now on."""
        torch.set_num_threads(count)

    def step(self) -> float:
        """Take one step over one sample; return its seconds."""
        began = time.monotonic()
        ids = next(self._samples)
        self._model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return time.monotonic() - began

    def steps(self, count: int) -> list[float]:
        """Take so many steps; return the seconds of each."""
        return [self.step() for _ in range(count)]

    def train(self) -> list[tuple[float, float, int]]:
        """Take steps while ``go`` is set; return when each began and ended, and its tokens."""
        spent = []
        while self._go.is_set():
            began = time.monotonic()
            spent.append((began, began + self.step(), self._tokens))
        return spent
