# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Compiled operations of decode rows compute what PyTorch's operations compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
import torch.nn.functional as F

from mace_ros.model import cpu_kernels
from mace_ros.model.attention import attend_gathered, GatheredRows
from mace_ros.model.cpu_decode import array
from mace_ros.model.layer_operators import plain_norm, plain_rotation

EPS = 1e-5
dtypes = pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
rows = pytest.mark.parametrize('count', [1, 3])


@pytest.fixture
def values(dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(dtype)


def assert_rounded(found: Tensor, exact: Tensor) -> None:
    """Compare with fp32 values, of which ``found`` are the nearest of their dtype."""
    tolerance = 2 ** -8 if found.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.float(), exact, rtol=tolerance, atol=1e-5)


@dtypes
def test_each_row_gets_the_update_of_its_own_slot(values: Callable[..., Tensor]) -> None:
    y, x, slots = values(3, 40), values(3, 24), torch.tensor([2, 0, 1])
    a, b = torch.randn(3, 5, 24), torch.randn(3, 5, 40)
    update = torch.einsum('ri,rki,rko->ro', x.float(), a[slots], b[slots])
    expected = y.float() + torch.where(slots[:, None] > 0, update, 0.0)
    cpu_kernels.add_update(array(y), array(x), array(a), array(b), array(slots))
    tolerance = 2 ** -8 if y.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=1e-4)


@dtypes
@rows
def test_norms(values: Callable[..., Tensor], count: int) -> None:
    x, y, weight = values(count, 48), values(count, 48), values(48)
    out, hidden = torch.empty_like(x), x.clone()
    cpu_kernels.normalize(array(out), array(x), array(weight), EPS)
    assert_rounded(out, plain_norm(x.float(), weight, EPS, relative=False, centered=False))
    cpu_kernels.add_and_normalize(array(out), array(hidden), array(y), array(weight), EPS)
    assert torch.equal(hidden, x + y)
    assert_rounded(out, plain_norm(hidden.float(), weight, EPS, relative=False, centered=False))


@dtypes
def test_norms_of_heads_leave_other_heads_alone(values: Callable[..., Tensor]) -> None:
    y, weight = values(2, 5 * 8), values(8)
    expected = y.float().view(2, 5, 8)
    expected[:, 1:3] = plain_norm(
        expected[:, 1:3], weight, EPS, relative=False, centered=False)
    cpu_kernels.normalize_heads(array(y), 8, array(weight), EPS, 2)
    assert_rounded(y, expected.view(2, -1))


@dtypes
@rows
@pytest.mark.parametrize('rotated', [16, 8, 0])     # values of a head
def test_rotation_and_write(values: Callable[..., Tensor], count: int, rotated: int) -> None:
    heads, kv_heads, size = 6, 2, 16
    y = values(count, (heads + 2 * kv_heads) * size)
    cos, sin = values(count, rotated), values(count, rotated)
    cache = [values(40, kv_heads, size) for _ in range(2)]
    slots = torch.tensor([7, 39, 0])[:count]
    query, key, value = y.clone().view(count, -1, size).split([heads, kv_heads, kv_heads], 1)
    before = [x.clone() for x in cache]

    cpu_kernels.rotate_and_write(array(y), array(cos), array(sin), *map(array, cache), array(slots))

    def turned(x: Tensor) -> Tensor:
        if not rotated:
            return x.float()
        first = plain_rotation(
            x[..., :rotated].float(), cos[:, None].float(), sin[:, None].float())
        return torch.cat([first, x[..., rotated:].float()], -1)

    assert_rounded(y.view(count, -1, size)[:, :heads], turned(query))
    assert_rounded(cache[0][slots], turned(key))
    assert torch.equal(cache[1][slots], value)
    for x, old in zip(cache, before, strict=True):
        others = torch.ones(len(x), dtype=torch.bool)
        others[slots] = False
        assert torch.equal(x[others], old[others])


@dtypes
@rows
def test_gates(values: Callable[..., Tensor], count: int) -> None:
    y = values(count, 2 * 33)
    out = y.new_empty(count, 33)
    cpu_kernels.multiply_gate(array(out), array(y))
    gate, up = y.float().chunk(2, 1)
    assert_rounded(out, F.silu(gate) * up)


@dtypes
@pytest.mark.parametrize('heads, kv_heads', [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize('window', [None, 1, 5])
@pytest.mark.parametrize('scaling', [None, 0.4])
def test_attention(values: Callable[..., Tensor], heads: int, kv_heads: int, window: int | None,
                   scaling: float | None) -> None:
    size, lengths = 16, torch.tensor([1, 4, 23])
    y = values(3, (heads + 2 * kv_heads) * size)
    keys, values_ = values(64, kv_heads, size), values(64, kv_heads, size)
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(1))[:23].repeat(3, 1)
    out = y.new_empty(3, heads * size)
    cpu_kernels.attend(
        array(out), array(y), array(keys), array(values_), array(slots), array(lengths),
        100 if window is None else window, size ** -0.5 if scaling is None else scaling)
    query = y[:, :heads * size].view(3, heads, size)
    expected = attend_gathered(
        query.float(), keys.float(), values_.float(), GatheredRows(slots, lengths), scaling,
        window, None, None)
    assert_rounded(out, expected.view(3, -1))


@dtypes
def test_numbers_that_are_none_stay_what_they_are(values: Callable[..., Tensor]) -> None:
    """Sums in any order must not make an answer of a broken weight."""
    x, weight = values(2, 16), values(16)
    x[0, 3] = torch.nan
    out = torch.zeros_like(x)
    cpu_kernels.normalize(array(out), array(x), array(weight), EPS)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
    y = values(2, 32)
    y[0, 2], y[1, 20] = torch.nan, torch.inf
    cpu_kernels.multiply_gate(array(out), array(y))
    assert out[0, 2].isnan()
    assert out[1, 4].isinf()
