# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The stages of a compiled pass compute what PyTorch's operations compute, in any threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import hashlib
from pathlib import Path
from typing import Any

from numba import njit
import numpy as np
import pytest
import torch
from torch import Tensor
import torch.nn.functional as F

from mace_ros.model import cpu_instructions, cpu_kernels, cpu_layer_kernels
from mace_ros.model.attention import attend_gathered, GatheredRows
from mace_ros.model.cpu_decode import array
from mace_ros.model.cpu_kernels import DENSE, INT4, INT8, LAYER, MODEL, NORM
from mace_ros.model.cpu_matmul import Int8Weight
from mace_ros.model.int4 import quantize
from mace_ros.model.int4_rows import pack_rows
from mace_ros.model.layer_operators import plain_norm, plain_rotation
from mace_ros.model.spans import BLOCK_TOKENS, cache_slots

EPS = 1e-5
dtypes = pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
rows = pytest.mark.parametrize('count', [1, 3])


@pytest.fixture
def values(dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(dtype)


def counters(stages: int = 1) -> np.ndarray:
    return np.zeros((2, stages), np.int64)


def record(kind: np.dtype[Any], **fields: Any) -> Any:
    """Return a record whose other fields are 0."""
    result = np.zeros(1, kind)
    for name, value in fields.items():
        result[name] = value
    return result[0]


def norm(weight: Tensor) -> tuple[int, float]:
    return weight.data_ptr(), EPS


def in_threads(stage: Callable[..., None], *arguments: Any) -> None:
    """Call a function in three threads at once, each with a scratch of its own, if it has one."""
    with ThreadPoolExecutor(3) as executor:
        for each in [executor.submit(stage, *(x() if callable(x) else x for x in arguments))
                     for _ in range(3)]:
            each.result()


def multiply(y: Tensor, x: Tensor, slots: np.ndarray, **fields: Any) -> None:
    """Multiply in three threads by a product with these fields."""
    layers = np.zeros(1, LAYER)
    for name, value in fields.items():
        layers['qkv'][name] = value
    model = record(MODEL, heads=1, kv_heads=1, size=1)
    in_threads(
        cpu_kernels.multiply, array(y), array(x), layers[0]['qkv'], slots,
        lambda: cpu_kernels.new_scratch(layers, model, slots)[0], counters(), 0)


def assert_rounded(found: Tensor, exact: Tensor) -> None:
    """Compare with fp32 values, of which ``found`` are the nearest of their dtype."""
    tolerance = 2 ** -8 if found.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.float(), exact, rtol=tolerance, atol=1e-5)


# -- products ----------------------------------------------------------------------------


def weight_of(form: int, weight: Tensor) -> tuple[tuple[int, int], Tensor, Any]:
    """Return the addresses of a weight in a form, its values in fp32, and what owns them."""
    if form == INT8:
        rounded = Int8Weight(weight.clone())
        found, scales = rounded.tensors
        exact = found.float() * scales.float()[:, None]
        return (found.data_ptr(), scales.data_ptr()), exact, rounded
    if form == INT4:
        quantized = quantize(weight.float(), dtype=torch.float16)
        packed = pack_rows(quantized.q, quantized.scales, quantized.zeros)
        scale, lowest = packed[:, -4:].contiguous().view(torch.float16).float().unbind(1)
        exact = quantized.q.view(len(packed), -1) * scale[:, None] + lowest[:, None]
        return (packed.data_ptr(), 0), exact.view(weight.shape), packed
    return (weight.data_ptr(), 0), weight.float(), weight


@dtypes
@pytest.mark.parametrize('form', [DENSE, INT8, INT4])
@pytest.mark.parametrize('count', [1, 2, 4, 5, 8])
@pytest.mark.parametrize('wide', [False, True])     # outputs in fp32, and buffers that are longer
def test_products(values: Callable[..., Tensor], form: int, count: int, wide: bool) -> None:
    inputs, outputs = 96, 128
    addresses, weight, owner = weight_of(form, values(outputs, inputs))
    x, y = values(count, inputs + 7 * wide), values(count, outputs + 9 * wide)
    y = y.float() if wide else y
    multiply(y, x, np.zeros(count, np.int64), form=form, weight=addresses[0],
             scales=addresses[1], inputs=inputs, outputs=outputs, part=13)
    expected = x[:, :inputs].double() @ weight.double().t()
    tolerance = 2 ** -8 if y.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        y[:, :outputs].double(), expected, rtol=tolerance, atol=1e-4)
    assert owner is not None


@dtypes
@pytest.mark.parametrize('form', [DENSE, INT8, INT4])
def test_each_row_gets_the_bias_and_the_update_of_its_own_slot(
        values: Callable[..., Tensor], form: int) -> None:
    addresses, weight, owner = weight_of(form, values(64, 32))
    x, bias, slots = values(3, 32), values(64), torch.tensor([2, 0, 1])
    y = x.new_empty(3, 64)
    a, b = values(3, 5, 32).float(), values(3, 5, 64).float()
    multiply(y, x, array(slots), form=form, weight=addresses[0], scales=addresses[1],
             bias=bias.data_ptr(), inputs=32, outputs=64, part=10, a=a.data_ptr(),
             b=b.data_ptr(), width=5)
    update = torch.einsum('ri,rki,rko->ro', x.float(), a[slots], b[slots])
    expected = x.float() @ weight.t() + bias.float() + torch.where(slots[:, None] > 0, update, 0.0)
    # The product, the bias and the update are rounded one after the other.
    tolerance = 2 ** -6 if y.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=20 * tolerance)
    assert owner is not None


# -- norms and gates ---------------------------------------------------------------------


@dtypes
@rows
def test_norms(values: Callable[..., Tensor], count: int) -> None:
    x, y, weight = values(count, 48), values(count, 60), values(48)
    out, hidden = torch.empty_like(x), x.clone()
    of_weight = record(NORM, weight=weight.data_ptr(), eps=EPS)
    in_threads(cpu_kernels.normalize_rows, array(out), array(hidden), array(y), False, of_weight,
               counters(), 0)
    assert torch.equal(hidden, x)
    assert_rounded(out, plain_norm(x.float(), weight, EPS, relative=False, centered=False))
    in_threads(cpu_kernels.normalize_rows, array(out), array(hidden), array(y), True, of_weight,
               counters(), 0)
    assert torch.equal(hidden, x + y[:, :48])
    assert_rounded(out, plain_norm(hidden.float(), weight, EPS, relative=False, centered=False))


@dtypes
@rows
def test_gates(values: Callable[..., Tensor], count: int) -> None:
    y = values(count, 2 * 33 + 5)
    out = y.new_empty(count, 33)
    in_threads(cpu_kernels.multiply_gates, array(out), array(y), counters(), 0)
    gate, up = y[:, :66].float().chunk(2, 1)
    assert_rounded(out, F.silu(gate) * up)


@dtypes
def test_nan_and_infinity_stay_what_they_are(values: Callable[..., Tensor]) -> None:
    """Sums in any order must not make an answer of a broken weight."""
    x, weight = values(2, 16), values(16)
    x[0, 3] = torch.nan
    out = torch.zeros_like(x)
    of_weight = record(NORM, weight=weight.data_ptr(), eps=EPS)
    cpu_kernels.normalize_rows(array(out), array(x), array(x), False, of_weight, counters(), 0)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
    y = values(2, 32)
    y[0, 2], y[1, 20] = torch.nan, torch.inf
    cpu_kernels.multiply_gates(array(out), array(y), counters(), 0)
    assert out[0, 2].isnan()
    assert out[1, 4].isinf()


# -- attention ---------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize('heads, kv_heads', [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize('window', [None, 1, 5])
@pytest.mark.parametrize('rotated', [0, 8, 16])      # values of a head
@pytest.mark.parametrize('norms', [False, True])
def test_attention(values: Callable[..., Tensor], heads: int, kv_heads: int, window: int | None,
                   rotated: int, norms: bool) -> None:
    size, lengths, scale = 16, np.array([1, 20, 37]), 0.4
    tables = np.array([[5, 0, 0], [2, 7, 0], [6, 1, 3]])
    y = values(3, (heads + 2 * kv_heads) * size)
    cos, sin = values(3, max(rotated, 2)), values(3, max(rotated, 2))
    weights = values(2, size)
    cache = [values(8 * BLOCK_TOKENS, kv_heads, size) for _ in range(2)]
    before = [x.clone() for x in cache]
    query, key, value = y.clone().view(3, -1, size).split([heads, kv_heads, kv_heads], 1)
    out = y.new_empty(3, heads * size)
    layer = record(
        LAYER, keys=cache[0].data_ptr(), values=cache[1].data_ptr(), rotates=rotated > 0,
        window=1000 if window is None else window, scale=scale,
        **({'query_norm': norm(weights[0]), 'key_norm': norm(weights[1])} if norms else {}))
    model = record(
        MODEL, heads=heads, kv_heads=kv_heads, size=size, cache_slots=8 * BLOCK_TOKENS)
    in_threads(
        cpu_kernels.attend_rows, array(out), array(y), layer, model, array(cos), array(sin),
        tables, lengths, lambda: cpu_kernels.new_scratch(np.zeros(0, LAYER), model, lengths)[1],
        counters(), 0)

    def prepared(x: Tensor, weight: Tensor) -> Tensor:
        if norms:
            x = plain_norm(x, weight, EPS, relative=False, centered=False)
        if not rotated:
            return x
        turned = plain_rotation(x[..., :rotated].float(), cos[:, None].float(),
                                sin[:, None].float()).to(x.dtype)
        return torch.cat([turned, x[..., rotated:]], -1)

    written = [cache_slots(table, length) for table, length in zip(tables, lengths, strict=True)]
    own = torch.tensor([slots[-1] for slots in written])
    close = {'rtol': 1e-5, 'atol': 1e-5} if y.dtype == torch.float32 else {
        'rtol': 2 ** -6, 'atol': 3e-2}
    torch.testing.assert_close(cache[0][own], prepared(key, weights[1]), **close)
    assert torch.equal(cache[1][own], value)
    for x, old in zip(cache, before, strict=True):
        others = torch.ones(len(x), dtype=torch.bool)
        others[own] = False
        assert torch.equal(x[others], old[others])
    slots = np.stack([np.pad(x, (0, lengths.max() - len(x)), mode='edge') for x in written])
    expected = attend_gathered(
        prepared(query, weights[0]).float(), *(x.float() for x in cache),
        GatheredRows(torch.from_numpy(slots), torch.from_numpy(lengths)), scale, window, None,
        None)
    torch.testing.assert_close(out.float(), expected.view(3, -1), **close)


# -- threads -----------------------------------------------------------------------------


@njit(nogil=True)
def add_parts(counts: np.ndarray, seen: np.ndarray, thread: int, counters: np.ndarray) -> None:
    """Count each part of some stages, and what is counted once each stage is over."""
    for stage in range(counts.shape[0]):
        part = cpu_kernels.take(counters, stage)
        while part < counts.shape[1]:
            counts[stage, part] += 1
            part = cpu_kernels.finish_and_take(counters, stage)
        cpu_kernels.wait(counters, stage, counts.shape[1])
        seen[thread, stage] = counts[stage].sum()


def test_each_part_is_taken_once_and_no_thread_goes_on_before_all_are_done() -> None:
    counts, seen, shared = np.zeros((200, 31), int), np.zeros((4, 200), int), counters(200)
    with ThreadPoolExecutor(4) as executor:
        for each in [executor.submit(add_parts, counts, seen, i, shared) for i in range(4)]:
            each.result()
    assert (counts == 1).all()
    assert (seen == 31).all()


# -- the files ---------------------------------------------------------------------------


def test_kernels_are_compiled_again_when_an_instruction_changes() -> None:
    """Numba looks at the file of the kernels only."""
    content = Path(cpu_instructions.__file__).read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:16]
    for module in (cpu_kernels, cpu_layer_kernels):
        assert digest == module.INSTRUCTIONS, (
            f'cpu_instructions.py has changed: set INSTRUCTIONS in {module.__file__} to '
            f'{digest!r}')


def test_blocks_are_those_of_the_kv_cache() -> None:
    assert cpu_kernels.BLOCK == BLOCK_TOKENS
