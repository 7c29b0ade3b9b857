# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Capture CUDA graphs of passes and of training layers before the first request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from mace_ros.model.batch_descriptor import batch_descriptors
from mace_ros.model.cuda_graph_runner import CudaGraphRunner
from mace_ros.model.graphed_layers import GraphedLayers
from mace_ros.model.packed_model import PackedModel

# Tokens of a fine-tune step for which layers are captured; a longer step runs eagerly.
STEP_TOKENS = (64, 128, 256, 512)
FREE_MEMORY_SHARE = 0.15    # of the device's memory that capturing leaves free for other users


@dataclass
class CaptureReport:
    """The captured graphs, and why others were not captured."""

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
            steps: bool = True, may_continue: Callable[[], bool]) -> CaptureReport:
    """
    Capture graphs while ``may_continue()`` and enough device memory is free.

    Shapes that are not captured run eagerly. Without ``steps``, only passes are captured:
    graphs of training layers hold what each layer keeps for its backward. Call this after the
    adapter slots were allocated, since graphs replay on their addresses.
    """
    report = CaptureReport()
    for tokens in STEP_TOKENS if steps else ():
        if not may_continue() or not _has_free_memory() or tokens > model.context_length:
            break
        try:
            layers = GraphedLayers(model, tokens)
            layers.capture(model)
        except RuntimeError as error:    # includes lack of memory
            torch.cuda.synchronize()
            report.failures.append(f'steps of {tokens} tokens: {error}')
            break
        model.graphed_layers.append(layers)
        report.steps.append(tokens)
    runner = CudaGraphRunner(model)
    for failure in runner.capture(batch_descriptors(max_rows, max_tokens, max_context)):
        if failure:
            report.failures.append(failure)
        # A model family that can't be captured fails for every descriptor.
        if not may_continue() or not _has_free_memory() or len(report.failures) > 3:
            break
    report.passes = len(runner)
    model.graphs = runner if report.passes else None
    return report


def _has_free_memory() -> bool:
    free, total = torch.cuda.mem_get_info()
    return free > FREE_MEMORY_SHARE * total
