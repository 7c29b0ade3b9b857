# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Matrix products on a CPU give the results of PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from mace_ros.engine.builder import best_weight_dtype
from mace_ros.model import cpu_matmul
from mace_ros.model.cpu_matmul import (
    Int8Weight,
    linear,
    multiplies_int8,
    PrepackedWeight,
    prepacks,
    SMALL_BATCH,
)

SHAPES = [(), (0,), (1,), (2,), (SMALL_BATCH,), (SMALL_BATCH + 1,), (1, 1), (1, 5), (2, 3)]


@pytest.mark.parametrize('columns', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
def test_linear_gives_the_result_of_pytorch(
        shape: tuple[int, ...], bias: bool, dtype: torch.dtype, columns: bool,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_matmul, 'prefers_columns', lambda: columns)
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, 48, dtype=dtype), torch.randn(33, 48, dtype=dtype)
    b = torch.randn(33, dtype=dtype) if bias else None
    y = linear(x, weight, b)
    assert y.is_contiguous()
    torch.testing.assert_close(y, F.linear(x, weight, b))


@pytest.mark.parametrize('plain', [0, 1, 2])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('shape', [(0,), (1,), (2,), (3,), (SMALL_BATCH + 1,), (1, 1), (2, 3)])
def test_a_prepacked_weight_gives_the_product_and_the_gradient_of_pytorch(
        shape: tuple[int, ...], bias: bool, dtype: torch.dtype, plain: int,
        monkeypatch: pytest.MonkeyPatch) -> None:
    if not prepacks(torch.device('cpu'), dtype):
        pytest.skip('this CPU multiplies plain weights')
    monkeypatch.setattr(cpu_matmul, 'plain_tokens', lambda dtype: plain)
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, 48, dtype=dtype), torch.randn(33, 48, dtype=dtype)
    b = torch.randn(33, dtype=dtype) if bias else None
    # A bias is added to the rounded product.
    rounding = {'rtol': 2e-2, 'atol': 5e-2} if dtype == torch.bfloat16 else {}
    stored, expected = PrepackedWeight(weight), F.linear(x, weight, b)
    torch.testing.assert_close(stored.linear(x, b), expected, **rounding)
    torch.testing.assert_close(stored.linear(x.requires_grad_(), b), expected, **rounding)
    gradient = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(stored.linear(x, b), x, gradient)[0],
                               torch.autograd.grad(F.linear(x, weight, b), x, gradient)[0])
    assert torch.equal(stored.dense(dtype), weight)
    assert torch._C._get_mkldnn_enabled()


@pytest.mark.parametrize('inputs', [16, 24, 40, 48, 80, 100])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_an_int8_weight_is_rounded_in_place_and_multiplied_exactly(
        dtype: torch.dtype, inputs: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(33, inputs, dtype=dtype)
    weight[5] = 0
    rounded = weight.clone()
    int8 = Int8Weight(rounded)
    steps = weight.float().abs().amax(1, keepdim=True) / 127
    assert ((rounded - weight).abs() <= 0.51 * steps + 2e-2 * weight.abs()).all()
    if dtype == torch.float32:
        values = rounded / steps.clamp_min(1e-12)
        assert (values - values.round()).abs().max() < 1e-3
    assert int8.has_kernel == (not inputs % 16 and multiplies_int8(dtype))
    if inputs % 16:
        return
    x, bias = torch.randn(1, 3, inputs, dtype=dtype), torch.randn(33, dtype=dtype)
    torch.testing.assert_close(int8.linear(x), F.linear(x, rounded), rtol=2e-2, atol=5e-2)
    torch.testing.assert_close(
        int8.linear(x, bias), F.linear(x, rounded, bias), rtol=2e-2, atol=5e-2)
    if dtype == torch.float32:
        torch.testing.assert_close(int8.linear(x), F.linear(x, rounded), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('machine, native, expected', [
    ('x86_64', {'avx2': True}, 'float32'),
    ('x86_64', {'avx512_bf16': True}, 'bfloat16'),
    ('aarch64', {}, 'int8')])
def test_the_default_weight_dtype_is_the_fastest_one_of_the_cpu(
        machine: str, native: dict[str, bool], expected: str,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('platform.machine', lambda: machine)
    monkeypatch.setattr('torch.cpu.get_capabilities', lambda: native)
    assert best_weight_dtype('cpu') == expected
    assert best_weight_dtype('cuda') == 'bfloat16'


@pytest.mark.parametrize('cpu, columns, of_float32, of_bfloat16', [
    ({'cpu_name': 'AMD EPYC', 'avx512_bf16': True}, True, 2, 1),
    ({'cpu_name': 'Intel Core i7'}, False, 1, 1),
    ({'cpu_name': 'Intel Xeon', 'amx_bf16': True}, False, 1, 0)])
def test_the_form_of_a_product_depends_on_the_kind_of_cpu_alone(
        cpu: dict[str, object], columns: bool, of_float32: int, of_bfloat16: int,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('torch.cpu.get_capabilities', lambda: cpu)
    monkeypatch.setattr('torch.backends.mkl.is_available', lambda: True)
    # Without its cache, which would keep the answers for later tests.
    monkeypatch.setattr(cpu_matmul, 'prefers_columns', cpu_matmul.prefers_columns.__wrapped__)
    assert cpu_matmul.prefers_columns() == columns
    assert cpu_matmul.plain_tokens.__wrapped__(torch.float32) == of_float32
    assert cpu_matmul.plain_tokens.__wrapped__(torch.bfloat16) == of_bfloat16
