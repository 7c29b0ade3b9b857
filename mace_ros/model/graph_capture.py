# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Capture CUDA graphs of passes and of training layers before the first request."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from mace_ros.memory.budget import MB
from mace_ros.model.batch_descriptor import batch_descriptors, BatchDescriptor, largest_first
from mace_ros.model.capturing import CaptureFailed, without_collections
from mace_ros.model.cuda_graph_runner import CudaGraphRunner
from mace_ros.model.graph_check import largest_error, limit
from mace_ros.model.graphed_layers import GraphedLayers
from mace_ros.model.packed_model import PackedModel

# Tokens of a fine-tune step for which layers are captured; a longer step runs eagerly.
STEP_TOKENS = (64, 128, 256, 512)
FREE_MEMORY_SHARE = 0.15    # of the device's memory that capturing leaves free for other users
MAX_FAILURES = 3            # shapes in a row that do not fit into the memory


@dataclass
class CaptureReport:
    """
    The captured graphs, their memory in bytes, and why others were not captured.

    ``stopped`` says why shapes were left out without a try.
    """

    passes: int = 0
    steps: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    stopped: str = ''
    nbytes: int = 0

    def __str__(self) -> str:
        """Return a line for the log."""
        text = f'device graphs: {self.passes} pass shapes, fine-tune steps of {self.steps} tokens'
        if self.failures:
            text += f'; {len(self.failures)} run eagerly: {self.failures[0]}'
        if self.stopped:
            text += f'; the others run eagerly: {self.stopped}'
        return text


def capture(model: PackedModel, *, max_rows: int, max_tokens: int, max_context: int,
            keeps_graphs: bool = True, may_continue: Callable[[], bool],
            free_bytes: Callable[[], float]) -> CaptureReport:
    """
    Capture graphs while ``may_continue()`` and enough of ``free_bytes()`` is left.

    Shapes that are not captured run eagerly, and all do if a graph does not compute the logits
    of an eager pass; the check overwrites the first KV blocks. Without ``keeps_graphs``, fine-tune
    steps recompute each layer in its backward, and no memory is taken for what layers keep. Call
    this after the adapter slots were allocated, since graphs replay on their addresses.
    """
    torch.cuda.empty_cache()
    report, before = CaptureReport(), torch.cuda.memory_reserved()

    def may_go_on() -> bool:
        """Note why not, for the report."""
        if not may_continue():
            report.stopped = 'the time for capturing was over'
        elif (free := free_bytes()) <= FREE_MEMORY_SHARE * torch.cuda.mem_get_info()[1]:
            report.stopped = f'only {free / MB:.0f} MB of memory were free'
        return not report.stopped

    with without_collections():
        # Passes first: a failure among steps must not cost the graphs that requests wait for.
        runner = CudaGraphRunner(model)
        intact = _capture_passes(runner, report, may_go_on, largest_first(
            batch_descriptors(max_rows, max_tokens, max_context)))
        difference = _difference(model, runner)
        if difference:
            report.failures.insert(0, difference)
        else:
            report.passes = len(runner)
        model.graphs = runner if report.passes else None
        if intact:
            _capture_steps(model, report, may_go_on, keeps_graphs)
    report.nbytes = torch.cuda.memory_reserved() - before
    return report


def _capture_passes(runner: CudaGraphRunner, report: CaptureReport,
                    may_go_on: Callable[[], bool],
                    descriptors: Iterable[BatchDescriptor]) -> bool:
    """Capture passes; return whether nothing but lack of memory or time prevented any."""
    in_a_row = 0
    for error in runner.capture(descriptors):
        in_a_row = in_a_row + 1 if error else 0
        if error is not None:
            report.failures.append(str(error))
            if not isinstance(error, torch.OutOfMemoryError):
                return False    # it would be the same for every shape
        if in_a_row == MAX_FAILURES or not may_go_on():
            break
    return True


def _difference(model: PackedModel, runner: CudaGraphRunner) -> str:
    """Return how passes under graphs differ from eager ones; empty if only by rounding."""
    try:
        error, where = largest_error(model, runner)
    except RuntimeError as failure:     # includes lack of memory
        return f'passes under graphs fail: {failure}'
    if error <= limit(model):
        return ''
    return f'{where} under a graph is off by {error:.2g} (relative)'


def _capture_steps(model: PackedModel, report: CaptureReport,
                   may_go_on: Callable[[], bool], keeps_graphs: bool) -> None:
    """Capture the layers for fine-tune steps, the shortest first, until one fails."""
    found: list[GraphedLayers] = []
    # Graphs of all lengths share memory and a stream: only one step runs at a time.
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    for tokens in STEP_TOKENS:
        if tokens > model.context_length or not may_go_on():
            break
        try:
            layers = GraphedLayers(model, tokens)
            layers.capture(model, stream, pool)
        except RuntimeError as error:    # includes lack of memory
            report.failures.append(f'steps of {tokens} tokens: {error}')
            if isinstance(error, CaptureFailed):
                return
            break
        found.append(layers)
        model.graphed_layers.append(layers)
        report.steps.append(tokens)
    if keeps_graphs:
        _capture_kept(model, report, may_go_on, found)


def _capture_kept(model: PackedModel, report: CaptureReport, may_go_on: Callable[[], bool],
                  found: Iterable[GraphedLayers]) -> None:
    """Capture forwards and backwards apart, until one fails; the others run eagerly."""
    for layers in found:
        if not may_go_on():
            return
        try:
            layers.capture_kept(model)
        except RuntimeError as error:    # includes lack of memory
            report.failures.append(f'steps of {layers.tokens} tokens that keep graphs: {error}')
            return
