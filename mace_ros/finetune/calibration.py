# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A short measurement of the device, which calibrates the cost model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mace_ros.finetune.sample import Sample
from mace_ros.finetune.step import FinetuneStep
from mace_ros.finetune.trainer import Trainer
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.lora_mapping import TRAINING_SLOT
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.spans import Span
from mace_ros.model.timing import DeviceTimer
from mace_ros.scheduling.plan import PassShape, Segment

Measured = tuple[PassShape | Segment, float]

DECODE_ROWS = (1, 2, 4, 8)
CONTEXT = 64                       # tokens of each decode row
PREFILL_TOKENS = (4, 16, 64, 128, 256)     # 4: also a number of DECODE_ROWS
STEP_TOKENS = (64, 192)
REPEATS = 3


def measure(model: PackedModel, lora: LoRAManager, *, max_tokens: int,
            clock: Callable[[], float]) -> Iterator[Measured]:
    """
    Yield shapes and their measured seconds; call this while the KV cache is empty.

    Measures passes of up to ``max_tokens`` tokens under an adapter, and all segments of
    fine-tune steps. The first run of each pass is not counted, since it pays for lazy
    initialisation. Changes the master weights.

    A slow device may not have time for everything. Therefore the smaller step, whose segments
    are of every kind, comes before long prefills.
    """
    capacity = min(max_tokens, model.context_length, model.kv_blocks * model.block_tokens)
    per_row = -(-(CONTEXT + 1) // model.block_tokens)
    for rows in DECODE_ROWS:
        if rows * per_row > model.kv_blocks or model.context_length <= CONTEXT:
            break
        spans = [Span((0,), CONTEXT, range(i * per_row, (i + 1) * per_row), TRAINING_SLOT, True)
                 for i in range(rows)]
        yield from _passes(model, spans, PassShape(rows, rows * (CONTEXT + 1), 0, 0, 0), clock)
    trainer = Trainer(lora, 1e-9)
    small, *larger = sorted({min(n, model.context_length) for n in STEP_TOKENS})
    yield from _steps(model, trainer, small, clock)
    for tokens in sorted({min(n, capacity) for n in PREFILL_TOKENS}):
        blocks = range(-(-tokens // model.block_tokens))
        span = Span((0,) * tokens, 0, blocks, TRAINING_SLOT, True)
        shape = PassShape(0, 0, tokens, tokens * (tokens + 1) // 2, 0)
        yield from _passes(model, [span], shape, clock)
    for tokens in larger:
        yield from _steps(model, trainer, tokens, clock)


def _steps(model: PackedModel, trainer: Trainer, tokens: int,
           clock: Callable[[], float]) -> Iterator[Measured]:
    for keep_graphs in (True, False):
        sample = Sample((0,) * tokens, (0.0,) * (tokens // 2) + (1.0,) * (tokens - tokens // 2))
        step = FinetuneStep(model, trainer, [sample], keep_graphs=keep_graphs)
        step.begin()
        while not step.done:
            started = clock()
            segment = step.run_segment()
            model.synchronize()
            yield segment, clock() - started


def _passes(model: PackedModel, spans: list[Span], shape: PassShape,
            clock: Callable[[], float]) -> Iterator[Measured]:
    for repeat in range(REPEATS + 1):
        timer = DeviceTimer(model.device, clock)
        model.run(spans)
        timer.stop()
        seconds = timer.seconds()
        if repeat:
            yield shape, seconds
