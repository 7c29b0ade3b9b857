# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The kernel of chunks with a softcap or sinks computes what plain operations compute.

Without a GPU, Triton's interpreter runs the kernel; a GPU compiles it.
"""

from __future__ import annotations

import random

import pytest
from support.kernels import DEVICE, needs_triton
import torch
from torch import Tensor

from mace_ros.model.attention import attend, AttentionMetadata
from mace_ros.model.block_attention import attend_block

pytestmark = pytest.mark.usefixtures('one_thread')

CASES = 35      # of each precision
ERRORS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def attention_error(seed: int, dtype: torch.dtype) -> float:
    """Return the relative error of chunks of random sequences, whose keys are scattered."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    kv_heads, group, size = rng.choice((1, 2)), rng.choice((1, 2, 3)), rng.choice((8, 16, 20))
    value_size, window = rng.choice((size, 12)), rng.choice((None, None, 1, 7))
    softcap, scaling = rng.choice((None, 2.0)), rng.choice((None, 0.3))
    lengths = [rng.randint(1, 40) for _ in range(rng.randint(1, 3))]
    chunks = [rng.randint(1, n) for n in lengths]

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).to(DEVICE)

    keys, cached = values(128, kv_heads, size), values(128, kv_heads, value_size)
    slots = torch.randperm(128, generator=generator)[:sum(lengths)].to(DEVICE)
    others = torch.ones(128, dtype=torch.bool, device=DEVICE).index_fill(0, slots, False)
    keys[others], cached[others] = torch.nan, torch.nan
    metadata = AttentionMetadata(
        query_sequence=joined([torch.full((n,), i) for i, n in enumerate(chunks)]),
        query_position=joined([torch.arange(n)[n - c:] for n, c in zip(
            lengths, chunks, strict=True)]),
        key_sequence=joined([torch.full((n,), i) for i, n in enumerate(lengths)]),
        key_position=joined([torch.arange(n) for n in lengths]))
    query = values(sum(chunks) + 1, kv_heads * group, size)[1:].transpose(0, 1)
    sinks = values(kv_heads * group) if rng.random() < 0.5 or softcap is None else None
    k, v = (x[slots].float().transpose(0, 1)[None] for x in (keys, cached))
    exact = attend(query.float()[None], k, v, metadata.block_mask(window), scaling, softcap,
                   None if sinks is None else sinks.float())[0].transpose(0, 1)
    found = attend_block(query, keys, cached, slots, *metadata.places(), scaling=scaling,
                         window=window, softcap=softcap, sinks=sinks)
    assert found.shape == exact.shape and found.dtype == dtype
    return float((found.float() - exact).norm() / exact.norm())


@needs_triton
@pytest.mark.parametrize('dtype', ERRORS, ids=str)
def test_the_kernel_attends_as_plain_operations(dtype: torch.dtype) -> None:
    for seed in range(CASES):
        assert attention_error(seed, dtype) < ERRORS[dtype], seed


@needs_triton
def test_a_token_without_keys_gets_zeros() -> None:
    query, cache = torch.ones(1, 1, 16, device=DEVICE), torch.ones(4, 1, 16, device=DEVICE)
    zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    out = attend_block(query, cache, cache, zero, (zero + 1, zero), (zero, zero))
    assert torch.equal(out, torch.zeros_like(out))
