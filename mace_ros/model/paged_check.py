# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The check, on the device itself, that paged attention computes what gathered keys give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from mace_ros.model.checked_passes import CheckedPass, fill_blocks
from mace_ros.model.graph_check import kernel_limit, largest_difference
from mace_ros.model.lora_mapping import BASE_SLOT
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.paged_attention import find, PagedAttention
from mace_ros.model.spans import BLOCK_TOKENS, PiggybackSpans, Span

# Tokens of the rows of a pass: within a block and a window, at a block's end, and of several
# splits. Shorter ones if the context or the cache is shorter. One more row is longer than the
# model's windows, if the cache has room. A second pass has the first rows only, since other
# kernels run where no row is split.
LENGTHS, BEYOND_WINDOW, SHORT = (5, 32, 300, 1500), 300, 2


def use_paged_attention(model: PackedModel) -> str:
    """
    Let decode rows attend without gathering their keys, if the device can.

    Returns why not, or an empty string. Overwrites KV blocks, so call it before the first
    request, and before graphs are captured.
    """
    if model.device.type != 'cuda':
        return ''
    paged = find(model.device)
    return 'Triton is not installed' if paged is None else use_if_right(model, paged)


def use_if_right(model: PackedModel, paged: PagedAttention) -> str:
    """Use ``paged`` if its logits are those of gathered keys; return why not."""
    try:
        error = difference(model, paged)
    except Exception as failure:    # of Triton's compilers: no C compiler, no kernel for a GPU
        return f'{type(failure).__name__}: {failure}'
    if error > kernel_limit(model):
        return f'its logits are off by {error:.2g} (relative)'
    model.context.paged = paged
    return ''


def difference(model: PackedModel, paged: PagedAttention) -> float:
    """Return the relative difference of logits by ``paged`` from those of gathered keys."""
    def run(spans: Sequence[Span], piggyback: PiggybackSpans | None, *,
            used: PagedAttention | None) -> Tensor:
        kept, model.context.paged = model.context.paged, used
        try:
            return model.run_plainly(spans, piggyback)
        finally:
            model.context.paged = kept

    return largest_difference(model, lambda seed: _passes(model, seed),
                              partial(run, used=None), partial(run, used=paged))[0]


def _passes(model: PackedModel, seed: int) -> Iterator[CheckedPass]:
    """Yield passes of decode rows whose keys and values are random, in scattered blocks."""
    generator = torch.Generator(model.device).manual_seed(seed)
    lengths = _lengths(model)
    counts = list(map(_blocks, lengths))
    blocks = torch.randperm(model.kv_blocks, generator=generator, device=model.device).tolist()
    fill_blocks(model, blocks[:sum(counts)], generator)
    spans = [Span((7 + i,), n - 1, blocks[sum(counts[:i]):sum(counts[:i + 1])], BASE_SLOT, True)
             for i, n in enumerate(lengths)]
    yield CheckedPass('long', spans)
    yield CheckedPass('short', spans[:SHORT])


def _lengths(model: PackedModel) -> list[int]:
    """Return the tokens of the rows, for which the cache has room."""
    rows = min(len(LENGTHS), model.kv_blocks)
    most = min(model.context_length, model.kv_blocks // rows * BLOCK_TOKENS)
    lengths = [min(n, most) for n in LENGTHS[-rows:]]
    beyond = min(model.window + BEYOND_WINDOW, model.context_length)
    if model.window and sum(map(_blocks, [*lengths, beyond])) <= model.kv_blocks:
        lengths.append(beyond)
    return lengths


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)
