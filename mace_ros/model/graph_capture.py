# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Capture CUDA graphs of passes and of training layers, before anybody waits for an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from mace_ros.model.cuda_graph_runner import buckets
from mace_ros.model.graphed_layers import GraphedLayers
from mace_ros.model.packed_model import PackedModel

# Tokens of a fine-tune step; a longer one runs eagerly.
STEP_TOKENS = (64, 128, 256, 512)
LEFT_FREE = 0.15    # of the device's memory, which others may share


@dataclass
class Captured:
    """What is replayed from now on, and why the rest is not."""

    passes: int = 0
    steps: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return a line for the log."""
        text = f'device graphs: {self.passes} pass shapes, fine-tune steps of {self.steps} tokens'
        if self.failures:
            text += f'; {len(self.failures)} run eagerly: {self.failures[0]}'
        return text


def capture(model: PackedModel, *, max_rows: int, max_tokens: int, max_context: int,
            steps: bool = True, may_go_on: Callable[[], bool]) -> Captured:
    """
    Capture while ``may_go_on``; what is left out, or can't be captured, runs eagerly.

    Without ``steps``, passes only: graphs of fine-tune layers hold what each layer keeps for
    its backward. A part of the device's memory stays free. Call it when the adapters have
    their slots: graphs replay on their addresses.
    """
    captured = Captured()
    for tokens in STEP_TOKENS if steps else ():
        if not may_go_on() or not _has_room() or tokens > model.context_length:
            break
        try:
            layers = GraphedLayers(model, tokens)
            layers.capture(model)
        except RuntimeError as error:    # also when memory runs out
            torch.cuda.synchronize()
            captured.failures.append(f'steps of {tokens} tokens: {error}')
            break
        model.graphed_layers.append(layers)
        captured.steps.append(tokens)
    for failure in model.static.capture(buckets(max_rows, max_tokens, max_context)):
        if failure:
            captured.failures.append(failure)
        # A family that can't be captured fails for each bucket alike.
        if not may_go_on() or not _has_room() or len(captured.failures) > 3:
            break
    captured.passes = len(model.static)
    return captured


def _has_room() -> bool:
    free, total = torch.cuda.mem_get_info()
    return free > LEFT_FREE * total
