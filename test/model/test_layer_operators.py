# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The kernels of norms and rotary embeddings compute what PyTorch's operations compute.

Without a GPU, Triton's interpreter runs the kernels; a GPU compiles them.
"""

from __future__ import annotations

import random

import pytest
from support.kernels import DEVICE, needs_triton
import torch
from torch import Tensor

from mace_ros.model.layer_operators import (
    plain_rms_norm,
    plain_rotation,
    rms_norm,
    rotate_and_write,
)

pytestmark = pytest.mark.usefixtures('one_thread')

CASES = 70      # of each precision
ERRORS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def rotation_error(seed: int, dtype: torch.dtype) -> float:
    """Return the largest relative error of queries, keys, and what the cache holds."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    tokens, kv_heads, group = rng.randint(1, 5), rng.randint(1, 3), rng.choice((1, 2, 3, 4))
    size = rng.choice((8, 16, 20, 32))
    rotary = rng.choice((size, size, size // 2))
    value_size, heads = rng.choice((size, 12)), kv_heads * group

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    # Parts of one product, as after a merged layer.
    merged = values(1, tokens, (heads + kv_heads) * size + kv_heads * value_size)
    query, key, value = (
        x.view(1, tokens, -1, n).transpose(1, 2) for x, n in zip(merged.split(
            [heads * size, kv_heads * size, kv_heads * value_size], -1),
            (size, size, value_size), strict=True))
    cos, sin = values(1, tokens, rotary), values(1, tokens, rotary)
    keys, cached = values(64, kv_heads, size), values(64, kv_heads, value_size)
    slots = torch.randperm(64, generator=generator)[:tokens].to(DEVICE)
    expected = []
    for x in (query.float(), key.float()):
        turned = plain_rotation(x[..., :rotary], cos[:, None].float(), sin[:, None].float())
        expected.append(torch.cat([turned, x[..., rotary:]], -1))
    expected += [keys.float().index_copy(0, slots, expected[1][0].transpose(0, 1)),
                 cached.float().index_copy(0, slots, value[0].transpose(0, 1).float())]
    rotate_and_write(query, key, value, cos, sin, keys, cached, slots)
    return max(float((found.float() - exact).norm() / exact.norm()) for found, exact in zip(
        (query, key, keys, cached), expected, strict=True))


@needs_triton
@pytest.mark.parametrize('dtype', ERRORS, ids=str)
def test_the_kernel_rotates_and_writes(dtype: torch.dtype) -> None:
    for seed in range(CASES):
        assert rotation_error(seed, dtype) < ERRORS[dtype], seed


@needs_triton
@pytest.mark.parametrize('dtype', ERRORS, ids=str)
@pytest.mark.parametrize('relative', [False, True])
@pytest.mark.parametrize('width', [16, 20, 300])
def test_the_kernel_normalizes(width: int, relative: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    weight = values(width)
    heads = values(1, 3, 2 * width + 4)[:, :, 2:-2].view(1, 3, 2, width)    # of wider rows
    for x in (values(1, 3, width) * 5.0, heads, heads.transpose(1, 2)):
        exact = plain_rms_norm(x.float(), weight, 1e-3, relative=relative)
        found = rms_norm(x, weight, 1e-3, relative=relative)
        assert found.shape == x.shape and found.dtype == dtype
        assert float((found.float() - exact).norm() / exact.norm()) < ERRORS[dtype]
