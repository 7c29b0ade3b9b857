# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Capture CUDA graphs of passes and of training layers before the first request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
import gc
import math
from typing import Any

import torch

from mace_ros.memory.budget import MB
from mace_ros.model.batch_descriptor import (
    batch_descriptors,
    BatchDescriptor,
    largest_first,
    Limits,
)
from mace_ros.model.capturing import attempt, CaptureFailed, Failure, without_collections
from mace_ros.model.cuda_graph_runner import CudaGraphRunner
from mace_ros.model.graph_check import largest_error, limit
from mace_ros.model.graphed_layers import GraphedLayers
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.spans import BLOCK_TOKENS

# Tokens of a fine-tune step for which layers are captured; a longer step runs eagerly.
STEP_TOKENS = (64, 128, 256, 512)
LONGER = 2                  # times as long as the one before
STEPS_SHARE = 1 / 3         # of the time, which passes leave for the layers of steps
FREE_MEMORY_SHARE = 0.15    # of the device's memory that capturing leaves free for other users
MAX_FAILURES = 3            # shapes in a row that do not fit into the memory
NO_ROOM = 'the memory budget has no room for them'


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
    nbytes: int = 0         # of PyTorch's pools
    driver_bytes: int = 0   # of the device's memory beside them

    def __str__(self) -> str:
        """Return a line for the log."""
        text = f'device graphs: {self.passes} pass shapes, fine-tune steps of {self.steps} tokens'
        if self.failures:
            text += f'; {len(self.failures)} run eagerly: {self.failures[0]}'
        if self.stopped:
            text += f'; the others run eagerly: {self.stopped}'
        return text


@dataclass
class _Resources:
    """What capturing may use: a share of the time, 1 to 0, and memory in bytes."""

    report: CaptureReport
    time_left: Callable[[], float]
    free_bytes: Callable[[], float]
    room: float
    before: int     # reserved by PyTorch
    free_before: float
    growth: int = 0     # by the last capture

    def measure(self) -> int:
        """Return the bytes of the graphs: what PyTorch and the driver have taken since."""
        earlier = self.report.nbytes + self.report.driver_bytes
        torch.cuda.empty_cache()
        self.report.nbytes = torch.cuda.memory_reserved() - self.before
        # The driver keeps instantiated graphs outside of PyTorch's pools.
        driver = self.free_before - self.free_bytes() - self.report.nbytes
        self.report.driver_bytes = int(driver) if 0 < driver < math.inf else 0
        nbytes = self.report.nbytes + self.report.driver_bytes
        if nbytes > earlier:
            self.growth = nbytes - earlier
        return nbytes

    def suffice(self, reserved: float = 0.0, *, times: float = 1.0) -> bool:
        """
        Return whether there is memory, and more than the share ``reserved`` of the time.

        The next capture is expected to take ``times`` as much memory as the last one: graphs share
        a pool, so one that turns out too large can't be given up without the others. If there is
        too little, the report says why.
        """
        reason, nbytes = '', self.measure()
        if self.time_left() <= reserved:
            reason = 'the time for capturing was over'
        elif (free := self.free_bytes()) <= FREE_MEMORY_SHARE * torch.cuda.mem_get_info()[1]:
            reason = f'only {free / MB:.0f} MB of memory were free'
        elif nbytes + max(times * self.growth, 1) > self.room:
            reason = NO_ROOM
        self.report.stopped = self.report.stopped or reason
        return not reason


def capture(model: PackedModel, *, max_rows: int, max_tokens: int, max_context: int,
            keeps_graphs: bool = True, room: float = math.inf, time_left: Callable[[], float],
            free_bytes: Callable[[], float]) -> CaptureReport:
    """
    Capture graphs while there is time, memory of the device, and room in the budget.

    ``time_left()`` is the share of the time that is left, 1 to 0, of which passes leave a part
    for steps; ``free_bytes()`` is the free memory of the device; graphs take at most ``room``
    bytes, or are given up. Shapes that are not captured run eagerly, and all do if a graph does
    not compute the logits of an eager pass; the check overwrites the first KV blocks. Without
    ``keeps_graphs``, fine-tune steps recompute each layer in its backward, and no memory is taken
    for what layers keep. Call this after the adapter slots were allocated, since graphs replay on
    their addresses.
    """
    torch.cuda.empty_cache()
    report = CaptureReport()
    resources = _Resources(
        report, time_left, free_bytes, room, torch.cuda.memory_reserved(), free_bytes())
    limits = Limits.of(max_context, model.kv_blocks * BLOCK_TOKENS)
    with without_collections():
        # Passes first: a failure among steps must not cost the graphs that requests wait for.
        if _capture_passes(model, resources, limits, largest_first(
                batch_descriptors(max_rows, max_tokens, max_context, limits))):
            _capture_steps(model, resources, keeps_graphs)
    _keep_within(model, resources)
    return report


def _capture_passes(model: PackedModel, resources: _Resources, limits: Limits,
                    descriptors: Sequence[BatchDescriptor]) -> bool:
    """Capture passes, and use them if they are right; return whether no capture has failed."""
    report, runner = resources.report, CudaGraphRunner(model, limits)
    intact, lacking = True, 0
    for tried, failure in enumerate(runner.capture(descriptors), 1):
        if failure is None:
            lacking = 0
        else:
            report.failures.append(failure.reason)
            lacking += issubclass(failure.kind, torch.OutOfMemoryError)
            intact = not issubclass(failure.kind, CaptureFailed)
        if not intact or lacking == MAX_FAILURES or (
                tried < len(descriptors) and not resources.suffice(STEPS_SHARE)):
            break
    difference = _difference(model, runner) if len(runner) else ''
    if difference:
        report.failures.insert(0, difference)
    else:
        report.passes = len(runner)
    model.fast_passes = runner if report.passes else None
    return intact


def _difference(model: PackedModel, runner: CudaGraphRunner) -> str:
    """Return how passes under graphs differ from eager ones; empty if only by rounding."""
    found = attempt(partial(largest_error, model, runner))
    if isinstance(found, Failure):      # includes lack of memory
        return f'passes under graphs fail: {found.reason}'
    error, where = found
    if not where:
        return 'no pass under a graph could be compared'
    if error <= limit(model):
        return ''
    return f'{where} under a graph is off by {error:.2g} (relative)'


def _capture_steps(model: PackedModel, resources: _Resources, keeps_graphs: bool) -> None:
    """Capture the layers for fine-tune steps, the shortest first, until one fails."""
    report = resources.report
    found: list[GraphedLayers] = []
    # Graphs of all lengths share memory and a stream: only one step runs at a time.
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    for tokens in STEP_TOKENS:
        if tokens > model.context_length or not resources.suffice(times=LONGER):
            break
        layers = attempt(partial(_captured_layers, model, tokens, stream, pool))
        if isinstance(layers, Failure):      # includes lack of memory
            report.failures.append(f'steps of {tokens} tokens: {layers.reason}')
            if issubclass(layers.kind, CaptureFailed):
                return
            break
        found.append(layers)
        model.graphed_layers.append(layers)
        report.steps.append(tokens)
    if keeps_graphs:
        _capture_kept(model, resources, found)


def _captured_layers(model: PackedModel, tokens: int, stream: torch.cuda.Stream,
                     pool: Any) -> GraphedLayers:
    """Return captured layers for steps of a length."""
    layers = GraphedLayers(model, tokens)
    layers.capture(model, stream, pool)
    return layers


def _capture_kept(model: PackedModel, resources: _Resources,
                  found: Iterable[GraphedLayers]) -> None:
    """Capture forwards and backwards apart, until one fails; the others run eagerly."""
    for layers in found:
        if not resources.suffice(times=LONGER):
            return
        failure = attempt(partial(layers.capture_kept, model))
        if failure is not None:      # includes lack of memory
            resources.report.failures.append(
                f'steps of {layers.tokens} tokens that keep graphs: {failure.reason}')
            return


def _keep_within(model: PackedModel, resources: _Resources) -> None:
    """Give up the graphs of steps, and then those of passes, if the budget has no room for them."""
    report = resources.report
    if resources.measure() > resources.room:
        model.graphed_layers.clear()
        report.steps, report.stopped = [], NO_ROOM
        gc.collect()
    if resources.measure() > resources.room:
        model.fast_passes, report.passes = None, 0
        gc.collect()
        resources.measure()
