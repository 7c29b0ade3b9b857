# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Decode passes over long contexts, by paged attention and by gathered keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.common.running import Run
from bench.systems.device_timing import reading, repeated, timed, weight_bytes

# Rows and tokens of context of each; as far as the KV cache has room.
ROWS, CONTEXTS = (1, 4, 16), (512, 4096, 16384)
TINY_CONTEXTS = (64, 256)
# How decode rows attend; the second where there is no kernel for the first.
ATTENTION = ('paged', 'gathered')
KV_BYTES = 4e9      # of the KV cache of long contexts: with 8B weights, for a card with 24 GB


def measure_contexts(name: str, model: Any, run: Run) -> list[dict[str, Any]]:
    """Time decode passes of several rows over long contexts, and reading what they read."""
    from mace_ros.memory.block_pool import BLOCK_TOKENS
    from mace_ros.model.hardware import release_memory
    from mace_ros.model.lora_mapping import FIRST_SERVED_SLOT
    from mace_ros.model.spans import Span

    cache, rows = model.kv_cache, []
    contexts = TINY_CONTEXTS if name.startswith('tiny') else CONTEXTS
    fits = int(KV_BYTES // (cache.slot_bytes * BLOCK_TOKENS))
    needed = max(ROWS) * (max(contexts) // BLOCK_TOKENS + 1)
    model.fast_passes, model.graphed_layers = None, []       # they replay on the present cache
    release_memory()
    model.allocate_kv_cache([(k.shape[1], k.shape[2], v.shape[2]) for k, v in zip(
        cache.keys, cache.values, strict=True)], min(fits, needed))
    for context in contexts:
        each = context // BLOCK_TOKENS + 1
        for count in ROWS:
            if count * each > model.kv_blocks:
                continue
            spans = [Span((7,), context, range(i * each, (i + 1) * each), FIRST_SERVED_SLOT, True)
                     for i in range(count)]
            rows += [{'shape': name, 'rows': count, 'context': context, **times}
                     for times in measure_decode(name, model, spans, run)]
    return rows


def measure_decode(name: str, model: Any, spans: list[Any],
                   run: Run) -> Iterator[dict[str, Any]]:
    """Yield the times of a decode pass by each kind of attention, and of reading what it reads."""
    from mace_ros.model.batch_descriptor import BatchDescriptor
    from mace_ros.model.cuda_graph_runner import CudaGraphRunner

    repeats = max(run.args.repeats // 3, 1)
    read = weight_bytes(model) + sum(s.position for s in spans) * model.kv_cache.slot_bytes
    floor = repeated(timed(model, reading(read, model.device)), repeats)
    paged = model.context.paged
    for attention in ATTENTION:
        if attention == 'paged' and paged is None:
            continue
        model.context.paged = paged if attention == 'paged' else None
        if run.args.device == 'cuda':
            model.fast_passes = CudaGraphRunner(model)
            run.notes += [f'{name}: {len(spans)} rows, {attention}: {failure.reason}' for failure in
                          model.fast_passes.capture([BatchDescriptor.of(spans, None)]) if failure]
        decode = repeated(timed(model, lambda: model.run(spans).argmax(-1).tolist()), repeats)
        yield from ({'attention': attention, 'ms': ms, 'floor_ms': least}
                    for ms, least in zip(decode, floor, strict=True))
        model.fast_passes = None
    model.context.paged = paged
