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
    normalize,
    Pairing,
    plain_norm,
    plain_rotation,
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
    first, pairing = rng.choice((0, size - rotary)), Pairing(*rng.choices((False, True), k=2))
    value_size, heads = rng.choice((size, 12)), kv_heads * group

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    # Parts of one product, as after a merged layer.
    merged = values(1, tokens, (heads + kv_heads) * size + kv_heads * value_size)
    query, key, value = (
        x.view(1, tokens, -1, n).transpose(1, 2) for x, n in zip(merged.split(
            [heads * size, kv_heads * size, kv_heads * value_size], -1),
            (size, size, value_size), strict=True))
    columns = rotary // 2 if pairing.shared else rotary
    cos, sin = values(1, tokens, columns, 2).unbind(-1) if rng.random() < 0.3 else (
        values(1, tokens, columns) for _ in range(2))
    keys, cached = values(64, kv_heads, size), values(64, kv_heads, value_size)
    slots = torch.randperm(64, generator=generator)[:tokens].to(DEVICE)
    expected = []
    for x in (query.float(), key.float()):
        last = first + rotary
        turned = plain_rotation(x[..., first:last], cos[:, None].float(), sin[:, None].float(),
                                pairing)
        expected.append(torch.cat([x[..., :first], turned, x[..., last:]], -1))
    expected += [keys.float().index_copy(0, slots, expected[1][0].transpose(0, 1)),
                 cached.float().index_copy(0, slots, value[0].transpose(0, 1).float())]
    rotate_and_write(query, key, value, cos, sin, keys, cached, slots, pairing=pairing, first=first)
    return max(float((found.float() - exact).norm() / exact.norm()) for found, exact in zip(
        (query, key, keys, cached), expected, strict=True))


@needs_triton
@pytest.mark.parametrize('dtype', ERRORS, ids=str)
def test_the_kernel_rotates_and_writes(dtype: torch.dtype) -> None:
    for seed in range(CASES):
        assert rotation_error(seed, dtype) < ERRORS[dtype], seed


@needs_triton
@pytest.mark.parametrize('dtype', ERRORS, ids=str)
@pytest.mark.parametrize('relative, centered', [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize('width', [16, 20, 300])
def test_the_kernel_normalizes(
        width: int, relative: bool, centered: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    weight, of_heads = values(width), values(2, width)
    heads = values(1, 3, 2 * width + 4)[:, :, 2:-2].view(1, 3, 2, width)    # of wider rows
    for x, scale in ((values(1, 3, width) * 5.0, weight), (heads, weight), (heads, of_heads),
                     (heads.transpose(1, 2), weight)):
        exact = plain_norm(x.float(), scale, 1e-3, relative=relative, centered=centered)
        found = normalize(x, scale, 1e-3, relative=relative, centered=centered)
        assert found.shape == x.shape and found.dtype == dtype
        assert float((found.float() - exact).norm() / exact.norm()) < ERRORS[dtype]
