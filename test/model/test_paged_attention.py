# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Paged attention computes what attention over gathered keys computes, or is not used.

Without a GPU, Triton's interpreter runs the kernels; a GPU compiles them.
"""

from __future__ import annotations

from dataclasses import dataclass
import json
import os
from pathlib import Path
import random
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from support.families import tiny_model, with_reference
from support.kernels import DEVICE, needs_triton
import torch
from torch import Tensor

from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.model import paged_attention
from mace_ros.model.attention import (
    attend_gathered,
    AttentionMetadata,
    ForwardContext,
    GatheredRows,
    packed_attention,
)
from mace_ros.model.batch_descriptor import BatchDescriptor
from mace_ros.model.cuda_graph_runner import CudaGraphRunner
from mace_ros.model.kv_cache import KVCache
from mace_ros.model.lora_mapping import BASE_SLOT
from mace_ros.model.paged_attention import find, PagedAttention
from mace_ros.model.paged_check import use_if_right, use_paged_attention
from mace_ros.model.spans import Span

pytestmark = pytest.mark.usefixtures('one_thread')

ROOT = Path(__file__).resolve().parents[2]
CASES = 70      # of each precision
# Relative errors: half a unit in the last place of a result, and of the weights in a product.
ERRORS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    """A pass of decode rows over one layer."""

    seed: int
    dtype: torch.dtype
    lengths: tuple[int, ...]
    kv_heads: int
    group: int
    key_size: int
    value_size: int
    window: int | None
    softcap: float | None
    sinks: bool
    scaling: float | None
    processors: int

    @staticmethod
    def random(seed: int, dtype: torch.dtype) -> Case:
        """Return a case that the interpreter computes in some tens of milliseconds."""
        rng = random.Random(seed)
        size = rng.choice((8, 16, 16, 20, 32))
        return Case(
            seed, dtype, tuple(rng.randint(1, 60) for _ in range(rng.choice((1, 1, 2)))),
            rng.choice((1, 1, 1, 2)), rng.choice((1, 2, 3, 4, 7, 17)), size,
            rng.choice((size, size, 12)), rng.choice((None, None, 1, 7, 33)),
            rng.choice((None, None, 2.0)), rng.random() < 0.4, rng.choice((None, 0.3)),
            rng.choice((1, 8)))

    def attend(self, paged: PagedAttention | None, dtype: torch.dtype) -> Tensor:
        """
        Return the output of the layer, ``[1, rows, heads, value size]``.

        Slots to which no row attends hold NaN.
        """
        generator = torch.Generator().manual_seed(self.seed)

        def values(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype).to(DEVICE, dtype)

        rows, heads = len(self.lengths), self.kv_heads * self.group
        blocks = [-(-n // BLOCK_TOKENS) for n in self.lengths]
        slots = (sum(blocks) + 2) * BLOCK_TOKENS
        scattered = torch.randperm(sum(blocks) + 2, generator=generator)
        tables = torch.zeros(rows, max(blocks) + 1, dtype=torch.long)
        used = torch.zeros(slots, dtype=torch.bool)
        for row, (count, length) in enumerate(zip(blocks, self.lengths, strict=True)):
            own, scattered = scattered[:count], scattered[count:]
            tables[row], tables[row, :count] = own[0], own
            visible = (own[:, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)).view(-1)[:length]
            used[visible[-(self.window or length):]] = True
        lengths, last = torch.tensor(self.lengths), torch.tensor(self.lengths) - 1
        write = (tables.gather(1, last[:, None] // BLOCK_TOKENS)[:, 0] * BLOCK_TOKENS
                 + last % BLOCK_TOKENS).to(DEVICE)
        context = ForwardContext()
        context.paged = paged
        context.kv_cache = KVCache(
            [(self.kv_heads, self.key_size, self.value_size)], slots, dtype, DEVICE)
        for cache in (context.kv_cache.keys[0], context.kv_cache.values[0]):
            cache.copy_(values(*cache.shape))
            cache[~used.to(DEVICE)] = float('nan') if paged is not None else 0.0
        context.metadata = AttentionMetadata(write_slots=write)
        lengths = lengths.to(DEVICE)
        if paged is not None:
            context.metadata.decode_tables = tables.to(DEVICE)
            context.metadata.decode_lengths = lengths
        else:
            all_slots = (tables[:, :, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)).view(
                rows, -1)
            context.metadata.decode_rows = [GatheredRows(all_slots.to(DEVICE), lengths)]
        layer: Any = SimpleNamespace(mace_attention=context, layer_idx=0)
        query, key = values(1, rows, heads, self.key_size), values(
            1, rows, self.kv_heads, self.key_size)
        value, sinks = values(1, rows, self.kv_heads, self.value_size), values(heads)
        return packed_attention(
            layer, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
            scaling=self.scaling, sliding_window=self.window, softcap=self.softcap,
            s_aux=sinks if self.sinks else None)[0]

    def error(self) -> float:
        """Return the relative error of paged attention, against the reference in fp32."""
        exact = self.attend(None, torch.float32)
        found = self.attend(PagedAttention(self.processors), self.dtype)
        assert found.dtype == self.dtype
        return float((found.float() - exact).norm() / exact.norm())


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make tiles and splits as short as they may be, so that few keys fill several."""
    from mace_ros.model import paged_kernels

    monkeypatch.setattr(paged_kernels, 'MAX_TILE', paged_kernels.MIN_TILE)
    monkeypatch.setattr(paged_attention, 'SPLIT_TOKENS', paged_kernels.MIN_TILE)


@needs_triton
@pytest.mark.usefixtures('short_splits')
@pytest.mark.parametrize('dtype', ERRORS, ids=str)
def test_the_kernel_computes_attention_over_gathered_keys(dtype: torch.dtype) -> None:
    """And it reads no slot to which a row does not attend, since those hold NaN."""
    for seed in range(CASES):
        case = Case.random(seed, dtype)
        assert case.error() < ERRORS[dtype], case


@needs_triton
@pytest.mark.parametrize('window', [None, 700])
def test_the_kernel_splits_a_long_row_beside_a_short_one(window: int | None) -> None:
    case = Case(0, torch.bfloat16, (1100, 3), 1, 2, 16, 16, window, None, True, None, 8)
    assert case.error() < ERRORS[torch.bfloat16]


@needs_triton
@pytest.mark.parametrize('family', ['gemma2', 'gpt-oss', 'deepseek-v2'])
def test_models_get_the_same_logits_from_the_kernel(family: str) -> None:
    model, _, _ = with_reference(tiny_model(family).to(DEVICE))
    span = Span((5,), 20, [3, 9], BASE_SLOT, True)
    expected = model.run([span]).clone()
    model.context.paged = PagedAttention(1)
    torch.testing.assert_close(model.run([span]), expected, rtol=1e-4, atol=1e-4)


@needs_triton
def test_the_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    """The interpreter takes code that the compiler refuses. None needs too much shared memory."""
    environment = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    done = subprocess.run(
        [sys.executable, '-m', 'support.compiled_kernels'], capture_output=True, text=True,
        env=environment | {'TRITON_CACHE_DIR': str(tmp_path), 'PYTHONPATH': os.pathsep.join(
            [str(ROOT), str(ROOT / 'test'), *sys.path])}, check=False)
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout)
    # One split needs no second kernel.
    assert {name.split()[0]: len(sizes) for name, sizes in shared.items()} == {
        'llama': 2, 'fp32': 2, 'gemma2': 1, 'gpt-oss': 2, 'phi': 2,
        'adapters': 2, 'fp32-adapters': 2, 'wide-adapters': 2, 'rotary': 1, 'partial-rotary': 1,
        'late-rotary': 1, 'norm': 1, 'head-norm': 1, 'chunk': 1, 'fp32-chunk': 1, 'experts': 1,
        'transposed-experts': 1}


# -- without Triton ----------------------------------------------------------------------


class Gathered(PagedAttention):
    """Computes the same from the same block tables, without a kernel of its own."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, tables: Tensor,
               lengths: Tensor, *, scaling: float | None = None, window: int | None = None,
               softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
        slots = (tables[:, :, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)).view(
            len(tables), -1)
        return attend_gathered(query, keys, values, GatheredRows(slots, lengths), scaling,
                               window, softcap, sinks)


class WithoutWindow(Gathered):
    """Attends to keys before the window."""

    def attend(self, *args: Tensor, **kwargs: Any) -> Tensor:
        return super().attend(*args, **kwargs | {'window': None})


class Failing(PagedAttention):
    """Raises an error that is no RuntimeError, as Triton's compiler does."""

    def attend(self, *args: Tensor, **kwargs: Any) -> Tensor:
        raise ValueError('injected')


@pytest.mark.parametrize('family', ['llama', 'gemma2', 'gpt-oss', 'deepseek-v2', 'gpt-neox'])
def test_passes_pass_block_tables_to_paged_attention(family: str) -> None:
    model, _, _ = with_reference(tiny_model(family))
    assert use_if_right(model, Gathered(1)) == ''
    assert model.context.paged == Gathered(1)
    spans = [Span((5,), position, blocks, BASE_SLOT, True)
             for position, blocks in ((40, [7, 3, 9]), (2, [4]), (15, [5]), (16, [6, 8]))]
    spans.append(Span((5,) * 6, 20, [10, 11], BASE_SLOT, True))
    eager = model.run(spans).clone()
    fixed = CudaGraphRunner(model).prepare(BatchDescriptor.of(spans, None)).run(spans, None)
    model.context.paged = None
    expected = model.run(spans)
    torch.testing.assert_close(eager, expected)
    torch.testing.assert_close(fixed, expected)


@pytest.mark.parametrize('wrong, reason', [
    (WithoutWindow(1), 'its logits are off by'), (Failing(1), 'ValueError: injected')])
def test_paged_attention_that_fails_is_not_used(wrong: PagedAttention, reason: str) -> None:
    model, _, _ = with_reference(tiny_model('mistral'))
    assert use_if_right(model, wrong).startswith(reason)
    assert model.context.paged is None


def test_a_window_longer_than_other_rows_is_compared() -> None:
    model, _, _ = with_reference(tiny_model(
        'mistral', sliding_window=1600, max_position_embeddings=2400), kv_tokens=4096)
    assert use_if_right(model, WithoutWindow(1)).startswith('its logits are off by')
    assert use_if_right(model, Gathered(1)) == ''


def test_a_cpu_gathers_keys_without_a_reason() -> None:
    model, _, _ = with_reference(tiny_model('llama'))
    assert find(torch.device('cpu')) is None
    assert use_paged_attention(model) == ''
    assert model.context.paged is None


@pytest.mark.parametrize('processors', [1, 16, 132])
def test_splits_depend_on_shapes_and_fill_a_device(processors: int) -> None:
    paged = PagedAttention(processors)
    for rows in (1, 4, 16):
        for kv_heads in (1, 3, 8):
            for blocks in (8, 64, 256, 1024):
                splits = paged.splits(rows, kv_heads, blocks)
                assert 1 <= splits <= paged_attention.MAX_SPLITS
                tokens = blocks * BLOCK_TOKENS
                assert splits == 1 or tokens / splits > paged_attention.SPLIT_TOKENS / 2
                most = -(-tokens // paged_attention.SPLIT_TOKENS)
                assert (rows * kv_heads * splits >= processors
                        or splits in (most, paged_attention.MAX_SPLITS))
