# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The check, on the device itself, that passes on fixed addresses compute what eager ones compute.

A wrong kernel or driver may cost speed, but never an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from mace_ros.model.graphs import PassGraphs
from mace_ros.model.lora_mapping import BASE_SLOT, FIRST_SERVED_SLOT
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.spans import BLOCK_TOKENS, Span

SAMPLES = 3     # rounding may route a token to another expert, but not in every sample
TOKENS = 24     # of a chunk
# Of logits and gradients, relative: in 16 bits, sums differ with the shape of a product.
MAX_ERROR, MAX_ERROR_FP32 = 0.1, 1e-3

# Computes a pass as PackedModel.run() does, or returns None for one that it does not cover.
Compute: TypeAlias = Callable[[Sequence[Span]], Tensor | None]


def largest_error(model: PackedModel, graphs: PassGraphs) -> tuple[float, str]:
    """
    Return the largest relative error of logits that ``graphs`` compute, and in which pass.

    Passes that it does not cover are left out. Overwrites the first KV blocks. Raises
    ``RuntimeError`` if ``graphs`` does not find the best tokens.
    """
    def plain(spans: Sequence[Span]) -> Tensor:
        kept, model.graphs = model.graphs, None
        logits = model.run(spans)
        model.graphs = kept
        return logits

    def captured(spans: Sequence[Span]) -> Tensor | None:
        logits = graphs.run(spans, None)
        if logits is None:
            return None
        if graphs.best_tokens is None or not torch.equal(logits.argmax(-1), graphs.best_tokens):
            raise RuntimeError('the best tokens are not those of the largest logits')
        return logits

    return largest_difference(lambda seed: checked_passes(model, seed), plain, captured)


def largest_difference(passes: Callable[[int], Iterable[tuple[str, list[Span]]]],
                       plain: Callable[[Sequence[Span]], Tensor],
                       fast: Compute) -> tuple[float, str]:
    """
    Return the largest relative difference of logits, and the name of its pass.

    ``passes`` maps a seed to named passes. A name counts by the best of its seeds.
    """
    best: dict[str, float] = {}
    for seed in range(SAMPLES):
        for name, spans in passes(seed):
            expected = plain(spans).clone()
            found = fast(spans)
            if found is not None:
                best[name] = min(relative_error(found, expected), best.get(name, torch.inf))
    return max(((error, name) for name, error in best.items()), default=(0.0, ''))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return ‖found - expected‖ / ‖expected‖; infinite if it is not a number."""
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    return error if error == error else torch.inf


def limit(model: PackedModel) -> float:
    """Return the largest error that rounding explains."""
    return MAX_ERROR_FP32 if model.dtype == torch.float32 else MAX_ERROR


def checked_passes(model: PackedModel, seed: int = 0) -> Iterator[tuple[str, list[Span]]]:
    """Yield passes of each kind, in this order, of two sequences; none if memory is short."""
    count = min(TOKENS, (model.context_length - 1) // 2)
    each = 2 * count // BLOCK_TOKENS + 1
    if count < 2 or model.kv_blocks < 2 * each:
        return
    one, two = range(each), range(each, 2 * each)
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (2 * count + 1,),
                        generator=torch.Generator().manual_seed(seed)).tolist()
    yield 'prefill', [Span(ids[:count], 0, one, FIRST_SERVED_SLOT, True)]
    yield 'chunks', [Span(ids[count:-1], count, one, FIRST_SERVED_SLOT, True),
                     Span(ids[:count], 0, two, BASE_SLOT, True)]
    yield 'decode', [Span(ids[-1:], 2 * count, one, FIRST_SERVED_SLOT, True),
                     Span(ids[count:count + 1], count, two, BASE_SLOT, True)]
