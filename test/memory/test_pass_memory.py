# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A pass takes no more memory than the budget counts, on a CPU and, by ``meta``, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from support.families import FAMILIES, fewer_layers, TARGETS, tiny_model, with_reference
from support.peak import Peak
import torch
from torch import Tensor

from mace_ros.finetune import footprint as footprint_module
from mace_ros.finetune.footprint import (
    attended_key_bytes,
    decode_bytes,
    key_bytes,
    measure_footprint,
)
from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.memory.budget import Footprint, MemoryBudget
from mace_ros.model import attention
from mace_ros.model.attention import gathered_together
from mace_ros.model.batch_descriptor import BatchDescriptor
from mace_ros.model.cuda_graph_runner import CudaGraphRunner
from mace_ros.model.lora_mapping import FIRST_SERVED_SLOT
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.paged_attention import PagedAttention
from mace_ros.model.spans import PiggybackSpans, Span

pytestmark = pytest.mark.usefixtures('one_thread')

CONTEXT = 900                       # of the longest sequences
BLOCKS = -(-CONTEXT // BLOCK_TOKENS)
CHANGED_SCORES = ['gemma2', 'gpt-oss']      # with a softcap or sinks
BESIDE = ('consecutive', 'chunk', 'rows and a chunk')    # passes with fine-tune tokens, too
# Families whose context can't be longer than that of others.
SHORT = {'phi3-longrope'}


def scattered(sequence: int) -> range:
    """Return KV blocks that do not follow each other; no others have them."""
    return range(sequence * 2 * BLOCKS, (sequence + 1) * 2 * BLOCKS, 2)


def decode(length: int, sequence: int) -> Span:
    """Return a decode row that attends to ``length`` keys."""
    return Span((5,), length - 1, scattered(sequence), FIRST_SERVED_SLOT, True)


def chunk(tokens: int, end: int, sequence: int, attention: Tensor | None = None) -> Span:
    """Return the last tokens of ``end`` of a sequence."""
    return Span((5,) * tokens, end - tokens, scattered(sequence), FIRST_SERVED_SLOT, True,
                attention=attention)


def passes(longest: int) -> dict[str, list[Span]]:
    """Return a pass of each kind, by its name."""
    return {
        'consecutive': [Span((5,), longest - 1, range(BLOCKS), FIRST_SERVED_SLOT, True)],
        **{f'{n} rows': [decode(longest, i) for i in range(n)] for n in (1, 2, 16)},
        'uneven rows': [decode(longest if i == 7 else 40, i) for i in range(16)],
        'shared blocks': [decode(longest, 0)] * 16,
        'chunk': [chunk(80, longest, 0)],
        'short chunk': [chunk(9, longest, 0)],
        'first chunk': [chunk(80, 80, 0)],
        'chunks': [chunk(40, 100, 0), chunk(33, 33, 1), chunk(2, 90, 2)],
        'observed': [chunk(80, longest, 0, torch.zeros(longest))],
        'observed alone': [chunk(2, longest, 0, torch.zeros(longest))],
        'rows and a chunk': [decode(longest, 0), decode(longest, 1), chunk(80, longest, 2)]}


def counted(footprint: Footprint, spans: Sequence[Span], finetune_tokens: int = 0) -> float:
    """Return what a budget counts for a single pass, with the copies of keys and values."""
    blocks = {b for s in spans
              for b in s.blocks[:-(-(s.position + len(s.tokens)) // BLOCK_TOKENS)]}
    tokens = sum(len(s.tokens) for s in spans) + finetune_tokens
    return (footprint.pass_bytes(tokens, len(spans), len(blocks) * BLOCK_TOKENS)
            + footprint.kv_block * len(blocks) / footprint.layers)


def piggyback(model: PackedModel, tokens: int = 40) -> PiggybackSpans:
    """Return fine-tune tokens."""
    width = model.model.config.get_text_config().hidden_size
    hidden = torch.zeros(
        len(model.layers) + 1, tokens, width, dtype=model.dtype, device=model.device)
    return PiggybackSpans(
        [Span((5,) * tokens, 0, range(1, 2 * BLOCKS, 2), 0, False)], list(hidden))


# -- on a CPU ----------------------------------------------------------------------------


@pytest.fixture
def few_keys_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let few keys be copied at once, so that what else is counted must suffice."""
    for module in (attention, footprint_module):
        monkeypatch.setattr(module, 'GATHERED_KEYS', 2 * CONTEXT)


@pytest.mark.usefixtures('few_keys_at_once')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('family', FAMILIES)
def test_a_pass_takes_no_more_memory_than_counted(family: str, dtype: torch.dtype) -> None:
    changes = {} if family in SHORT else {'max_position_embeddings': 1024}
    model, lora, _ = with_reference(
        tiny_model(family, **changes, **fewer_layers(family, 2)).to(dtype), kv_tokens=32_000,
        targets=TARGETS.get(family, 'all-linear'))
    footprint, taken = measure_footprint(model, lora), {}
    for name, spans in passes(min(CONTEXT, model.context_length)).items():
        for saves in (False, True) if name in BESIDE else (False,):
            finetune = piggyback(model) if saves else None
            with Peak() as peak:
                model.run(spans, finetune)
            taken[name, saves] = peak.most / counted(
                footprint, spans, finetune.tokens if finetune else 0)
    assert max(taken.values()) <= 1.0, taken
    assert max(taken.values()) >= 0.4     # the budget leaves no more memory idle than it must


@pytest.mark.usefixtures('few_keys_at_once')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('rows', [1, 2, 16])
@pytest.mark.parametrize('family', CHANGED_SCORES)
def test_rows_that_copy_their_keys_take_no_more_memory_than_counted(
        family: str, rows: int, dtype: torch.dtype) -> None:
    """Where scores are changed, products copy the keys of several rows once more."""
    model, lora, _ = with_reference(
        tiny_model(family, max_position_embeddings=1024).to(dtype), kv_tokens=32_000)
    footprint = measure_footprint(model, lora)
    spans = [decode(CONTEXT, i) for i in range(rows)]
    with Peak() as peak:
        model.run(spans)
    predicted = footprint.pass_bytes(rows, rows, CONTEXT)
    # The copies of rows that attend together are counted, those of a longer one by its blocks.
    one = footprint.kv_block * CONTEXT / BLOCK_TOKENS / footprint.layers
    assert peak.most <= predicted + (one if rows == 1 else 0)
    assert rows == 1 or peak.most >= 0.2 * predicted


def test_rows_of_similar_length_copy_their_keys_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, 'GATHERED_KEYS', 100)
    for lengths, sizes in (([7], [1]), ([500], [1]), ([50, 50], [2]), ([50, 51], [1, 1]),
                           ([20, 20, 30, 90, 200, 300], [3, 1, 1, 1]), ([10] * 25, [10, 10, 5])):
        found = gathered_together(lengths)
        assert [len(lengths[rows]) for rows in found] == sizes
        assert [n for rows in found for n in lengths[rows]] == lengths


def test_the_keys_of_a_growing_cache_are_paid_by_its_blocks() -> None:
    footprint = Footprint(kv_block=900, adapters=5000, layers=9, hidden_token=10, logits_row=8,
                          graphs=((10, 1000),), attended_key=3, row_key=2, key=1)
    bare = replace(footprint, attended_key=0, row_key=0, key=0)

    def budget(of: Footprint, *, resident: bool = False) -> MemoryBudget:
        return MemoryBudget(of, 1e6, max_blocks=100, pass_tokens=10, rows=4, resident=resident)

    a_key = 10 * 3 + 4 * 2 + 1
    assert budget(footprint).fixed == budget(bare).fixed
    assert (budget(footprint).planned(7) - budget(bare).planned(7)
            == pytest.approx(7 * BLOCK_TOKENS * a_key))
    # The largest pass attends to the whole of a cache that exists from the start.
    whole = [budget(f, resident=True) for f in (footprint, bare)]
    assert whole[0].fixed - whole[1].fixed == 100 * BLOCK_TOKENS * a_key
    assert whole[0].planned(7) - whole[1].planned(7) == whole[0].fixed - whole[1].fixed


# -- on a GPU ----------------------------------------------------------------------------


def masked_attention(query: Tensor, key: Tensor, value: Tensor, *,
                     attn_mask: Tensor | None = None, **_: object) -> Tensor:
    """Take the memory that SDPA takes on CUDA behind a mask: it adds it to the scores, padded."""
    if attn_mask is not None:
        added = attn_mask.to(query.dtype)
        torch.constant_pad_nd(added, (0, -added.shape[-1] % 8))
    return query.new_empty(*query.shape[:3], value.shape[3])


@contextmanager
def on_gpu(family: str, *, paged: bool = True,
           **changes: Any) -> Iterator[tuple[PackedModel, Footprint]]:
    """Yield a model on ``meta`` and its footprint; passes take memory as they do on CUDA."""
    model, lora, _ = with_reference(
        tiny_model(family, **changes).to(torch.bfloat16), kv_tokens=32_000,
        targets=TARGETS.get(family, 'all-linear'))
    meta = PackedModel(tiny_model(family, **changes).to(torch.bfloat16).to('meta'))
    meta.allocate_kv_cache([(k.shape[1], k.shape[2], v.shape[2]) for k, v in zip(
        model.kv_cache.keys, model.kv_cache.values, strict=True)], model.kv_blocks)
    meta.context.score_arguments = model.context.score_arguments
    if paged:
        meta.context.paged = PagedAttention(16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, 'scaled_dot_product_attention', masked_attention)
        gathered = {'gathered': 0, 'gathered_key': 0, 'row_key': 0}
        yield meta, replace(
            measure_footprint(model, lora), attended_key=attended_key_bytes(meta),
            key=key_bytes(meta), **gathered | decode_bytes(meta))


@pytest.mark.usefixtures('few_keys_at_once')
@pytest.mark.parametrize('family, kv_heads, paged', [
    *((family, None, True) for family in FAMILIES), ('llama', 1, True), ('llama', 4, True),
    ('gemma2', 1, True), ('llama', None, False), ('gemma2', None, False)])
def test_a_pass_on_a_gpu_takes_no_more_memory_than_counted(
        family: str, kv_heads: int | None, paged: bool) -> None:
    """Eagerly, and where a graph would be captured of it."""
    changes: dict[str, Any] = {} if family in SHORT else {'max_position_embeddings': 1024}
    changes |= {'num_key_value_heads': kv_heads} if kv_heads else {}
    taken = {}
    with on_gpu(family, paged=paged, **fewer_layers(family, 2), **changes) as (model, footprint):
        for name, spans in passes(min(CONTEXT, model.context_length)).items():
            with Peak() as peak:
                model.run(spans, piggyback(model))
            taken[name, 'eager'] = peak.most / counted(footprint, spans, 40)
            if name in BESIDE:
                taken[name, 'captured'] = captured(model, footprint, spans)
    assert max(taken.values()) <= 1.0, taken
    assert max(taken.values()) >= 0.4


def captured(model: PackedModel, footprint: Footprint, spans: Sequence[Span]) -> float:
    """Return the memory of a pass of a descriptor over what is counted for its size."""
    finetune = piggyback(model)
    descriptor = BatchDescriptor.of(spans, finetune)
    prepared = CudaGraphRunner(model).prepare(descriptor)
    with Peak() as peak:
        prepared.run(spans, finetune)
    keys = max(descriptor.keys, descriptor.decode * descriptor.blocks * BLOCK_TOKENS)
    return peak.most / (
        footprint.pass_bytes(descriptor.tokens, descriptor.decode + 1, keys)
        + footprint.kv_block * keys / BLOCK_TOKENS / footprint.layers)


@pytest.mark.parametrize('family', ['llama', 'gemma2', 'deepseek-v2'])
def test_a_pass_of_paged_decode_rows_takes_no_more_memory_than_predicted(family: str) -> None:
    """The kernels themselves need Triton, and take no memory."""
    rows = 16
    with on_gpu(family) as (model, footprint):
        with Peak() as peak:
            model.run([decode(150 - i, i) for i in range(rows)])
        predicted = footprint.pass_bytes(rows, rows)
    assert 0.1 * predicted <= peak.most <= predicted
