# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Weights of 4 bits: their values, their products and gradients, and their files."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support.device_log import DeviceLog, FREE
from support.families import tiny_model
import torch
from torch import Tensor
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mace_ros.finetune.footprint import measure_footprint
from mace_ros.model import int4, int4_checkpoint, int4_kernels, int4_limit
from mace_ros.model.int4 import Int4Values, Int4Weight, quantize
from mace_ros.model.int4_kernels import (
    BlockedLayout,
    find_kernel,
    Int4Kernel,
    Layout,
    plain_kernel,
    TensorCoreLayout,
)
from mace_ros.model.int4_limit import (
    CALLS,
    device_seconds,
    most_tokens,
    REPEATS,
    with_measured_limit,
)
from mace_ros.model.loading import load_model, LoadedModel, weights_digest
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.packing import pack
from mace_ros.model.workspace import Workspace

pytestmark = pytest.mark.usefixtures('one_thread')

CPU, META = torch.device('cpu'), torch.device('meta')
KERNELS = {
    'found bfloat16': lambda: find_kernel(CPU, torch.bfloat16),
    'found float32': lambda: find_kernel(CPU, torch.float32),
    'plain bfloat16': lambda: plain_kernel(CPU, torch.bfloat16),
    'plain float32': lambda: plain_kernel(CPU, torch.float32),
    'plain on CUDA': lambda: Int4Kernel(CPU, torch.bfloat16, TensorCoreLayout(), False),
}


def random_values(outputs: int = 128, inputs: int = 256, group: int = 32) -> Int4Values:
    torch.manual_seed(0)
    shape = outputs, inputs // group
    return Int4Values(torch.randint(16, (outputs, inputs), dtype=torch.uint8),
                      torch.rand(shape) * 0.02 + 0.01, torch.randn(shape) * 0.01)


def gguf_weight(kind: str) -> Tensor:
    """Return a weight as it is dequantised from a GGUF file."""
    kind = getattr(gguf.GGMLQuantizationType, kind)
    rng = np.random.default_rng(0)
    if kind == gguf.GGMLQuantizationType.Q4_K:      # gguf has no quantiser for it
        raw = rng.integers(0, 256, (64, 2, 144), dtype=np.uint8)
        raw[..., :4] = rng.uniform(1e-4, 2e-4, (64, 2, 2)).astype(np.float16).view(np.uint8)
        data = raw.reshape(64, -1)
    else:
        values = rng.normal(0, 0.05, (64, 512)).astype(np.float32)
        values[3, :32] = 0.0
        values[4, :32] = 0.25
        values[5, 32:64] = np.abs(values[5, 32:64])
        data = gguf.quants.quantize(values, kind)
    return torch.from_numpy(gguf.quants.dequantize(data, kind).astype(np.float32))


# -- values ------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['Q4_0', 'Q4_1', 'Q4_K'])
def test_a_weight_of_a_gguf_file_in_4_bits_keeps_its_values(kind: str) -> None:
    weight = gguf_weight(kind)
    values = quantize(weight)
    assert not values.rounded
    assert len(weight[0].unique()) > 16
    largest = weight.view(64, -1, 32).abs().amax(2, keepdim=True)
    error = (values.dequantized() - weight).view(64, -1, 32).abs()
    assert (error <= 1e-6 * largest).all()
    if kind == 'Q4_0':
        assert not values.zeros[6:].any()       # none is lost in bfloat16


@pytest.mark.parametrize('kind', ['Q4_0', 'Q4_1', 'Q4_K'])
def test_in_bfloat16_only_scales_and_zeros_are_rounded(kind: str) -> None:
    weight = gguf_weight(kind)
    values = quantize(weight, dtype=torch.bfloat16)
    served = Int4Weight.of(values, plain_kernel(CPU, torch.bfloat16)).dense(torch.float32)
    steps = (values.q.float() - 8).abs() * values.scales.abs().repeat_interleave(32, 1)
    bound = 2.0 ** -8 * (steps + values.zeros.abs().repeat_interleave(32, 1))
    assert ((served - weight).abs() <= bound + 1e-7).all()
    assert (served - weight).norm() < 2.5e-3 * weight.norm()


def test_other_weights_are_rounded_to_the_nearest_of_16_levels() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    values = quantize(weight, dtype=torch.bfloat16)
    assert values.rounded == 64 * 8
    assert torch.equal(values.scales, values.scales.bfloat16().float())
    assert torch.equal(values.zeros, values.zeros.bfloat16().float())
    groups = weight.view(64, 8, 32)
    # Within the range of the levels, the error is at most half a step.
    off = (values.dequantized() - weight).view(64, 8, 32).abs() / values.scales[..., None]
    assert off.median() < 0.3
    plain = ((groups - groups.amin(2, True)) / ((groups.amax(2, True) - groups.amin(2, True)) / 15))
    plain_error = (plain.round() - plain) * (groups.amax(2, True) - groups.amin(2, True)) / 15
    assert (values.dequantized() - weight).norm() < plain_error.norm()


@pytest.mark.parametrize('group', [32, 64, 128])
def test_a_weight_is_quantized_in_parts_and_in_groups(
        group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    whole = quantize(weight, group=group)
    monkeypatch.setattr(int4, 'QUANTIZED_AT_ONCE', 1000)
    parts = quantize(weight, group=group)
    assert whole.group == parts.group == group
    assert torch.equal(whole.dequantized(), parts.dequantized())


# -- layouts -----------------------------------------------------------------------------


LAYOUTS: list[Layout] = [BlockedLayout(64), BlockedLayout(32), BlockedLayout(16, paired=True),
                         TensorCoreLayout()]


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('inputs', [256, 96, 64])
def test_parts_of_a_packed_weight_are_those_of_the_weight(layout: Layout, inputs: int) -> None:
    values = random_values(inputs=inputs)
    packed = layout.pack(values.q)
    assert packed.nbytes * 2 == values.q.numel()
    scales = torch.stack([values.scales.t(), values.zeros.t()], 2)
    weight = values.dequantized()
    for outputs in (slice(0, 128), slice(64, 128)):
        assert torch.equal(layout.unpack(packed, outputs), values.q[outputs])
        torch.testing.assert_close(
            layout.dequantize(packed, scales, outputs, torch.float32, Workspace()),
            weight[outputs])


class Traffic(TorchDispatchMode):
    """Counts the bytes that kernels read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name().removeprefix('aten::').split('.')[0] not in FREE:
            self.nbytes += sum(x.nbytes for x in (*args, result) if isinstance(x, Tensor))
        return result


def test_weights_are_written_out_on_cuda_in_few_kernels_and_rounded_once() -> None:
    values, layout = random_values(), TensorCoreLayout()
    scales = torch.stack([values.scales.t(), values.zeros.t()], 2).bfloat16()
    scale, zero = scales.permute(2, 1, 0).repeat_interleave(32, 2)
    packed = layout.pack(values.q)
    with Traffic() as traffic:
        found = layout.dequantize(packed, scales, slice(0, 128), torch.bfloat16, Workspace())
    assert torch.equal(found, torch.addcmul(zero, (values.q - 8.0).bfloat16(), scale))
    assert traffic.nbytes / values.q.numel() < 9.5


def test_the_layout_of_tensor_cores_is_that_of_the_cuda_kernel() -> None:
    """Compare with the loops of matrix_to_m16n8k16_Bint4_layout in ATen's int4mm.cu."""
    q = random_values(outputs=16, inputs=256).q.to(torch.int64)
    tiles = 8
    expected = torch.zeros(2, 2, 32, tiles // 2, dtype=torch.int64)
    for n_tile in range(2):
        for outer in range(2):
            for lane in range(32):
                for inner in range(0, tiles, 2):
                    row = q[n_tile * 8 + lane // 4]
                    first = (outer * tiles + inner) * 16 + lane % 4 * 2
                    even = [first, first + 8, first + 16, first + 24]
                    order = [*even, *(k + 1 for k in even)]      # from the lowest bits
                    expected[n_tile, outer, lane, inner // 2] = sum(
                        int(row[k]) << 4 * i for i, k in enumerate(order))
    packed = TensorCoreLayout().pack(q.to(torch.uint8))
    assert torch.equal(packed.to(torch.int64) & 0xffffffff, expected)


# -- products ----------------------------------------------------------------------------


@pytest.mark.parametrize('kernel', KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize('group', [32, 64, 128])
@pytest.mark.parametrize('tile', [2 ** 22, 64 * 256])
def test_products_and_gradients_are_those_of_the_dequantised_weight(
        kernel: object, group: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4, 'TILE_VALUES', tile)
    found: Int4Kernel = kernel()    # type: ignore[operator]
    values = random_values(group=group)
    weight = Int4Weight.of(values, found)
    exact = found.dtype == torch.float32
    dense = weight.dense(torch.float32)
    rounding = {'rtol': 1e-5, 'atol': 1e-5} if exact else {'rtol': 2e-2, 'atol': 2e-2}
    torch.testing.assert_close(dense, values.dequantized(), **rounding)
    assert weight.nbytes < (1.3 if found.has_rows else 0.7) * dense.numel() or exact
    bias = torch.randn(128)
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16:
            rounding = {'rtol': 3e-2, 'atol': 3e-2}
        for shape in ((), (1,), (3,), (1, 5), (1, 70), (0,)):
            x = torch.randn(*shape, 256).to(dtype).requires_grad_()
            y = weight.linear(x, bias.to(dtype))
            expected = F.linear(x.float(), dense, bias)
            torch.testing.assert_close(y.float(), expected, **rounding)
            gradient = torch.randn_like(y)
            y.backward(gradient)
            assert x.grad is not None
            torch.testing.assert_close(x.grad.float(), gradient.float() @ dense, **rounding)
            with torch.no_grad():
                torch.testing.assert_close(weight.linear(x).float(), expected - bias, **rounding)


def test_a_kernel_that_computes_something_else_is_not_used(
        monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_kernel(torch.device('meta'), torch.float32).has_product is False
    monkeypatch.setattr(Int4Kernel, 'multiply', lambda self, x, packed, group, scales: (
        x.new_zeros(len(x), scales.shape[1])))
    kernel = find_kernel(CPU, torch.bfloat16)
    assert not kernel.has_product


@pytest.mark.parametrize('wrong', [0, 160, 192])
def test_a_kernel_is_compared_in_every_form_of_its_layout(
        wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form of CUDA's depends on the number of inputs."""
    layout = TensorCoreLayout()
    packed = [layout.pack(torch.zeros(8, n, dtype=torch.uint8)) for n in layout.probes]
    assert {2 * p.shape[3] for p in packed} == {2, 4, 8}

    def multiply(_: Int4Kernel, x: Tensor, packed: Tensor, group: int, scales: Tensor) -> Tensor:
        weight = layout.dequantize(
            packed, scales, slice(0, scales.shape[1]), x.dtype, Workspace())
        return x @ weight.t() * (1.1 if x.shape[1] == wrong else 1.0)

    monkeypatch.setattr(int4_kernels, 'CPU_LAYOUTS', (layout,))
    monkeypatch.setattr(int4_kernels, 'packed_by_torch', layout.pack)
    monkeypatch.setattr(Int4Kernel, 'operand', lambda _, packed, outputs: packed)
    monkeypatch.setattr(Int4Kernel, 'multiply', multiply)
    assert find_kernel(CPU, torch.bfloat16).has_product == (not wrong)


def test_cuda_without_a_product_dequantises_on_the_device() -> None:
    """With ``meta`` in its place."""
    weight = Int4Weight.of(random_values(), plain_kernel(META, torch.bfloat16))
    x = torch.zeros(3, 256, dtype=torch.bfloat16, device=META, requires_grad=True)
    with DeviceLog() as log:
        weight.linear(x).sum().backward()
        assert weight.dense(torch.bfloat16).device == META
    assert not log.faults
    assert x.grad is not None


def test_without_the_operators_weights_are_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(q: Tensor) -> Tensor:
        raise AttributeError('no such operator')

    monkeypatch.setattr(int4_kernels, 'packed_by_torch', missing)
    assert find_kernel(CPU, torch.float32) == plain_kernel(CPU, torch.float32)


@pytest.fixture
def small_probe(monkeypatch: pytest.MonkeyPatch) -> Int4Kernel:
    """Return a kernel whose product, here that of the dequantised weight, is soon measured."""
    for name in ('OUTPUTS', 'INPUTS'):
        monkeypatch.setattr(int4_limit, name, 128)
    monkeypatch.setattr(Int4Weight, 'packed_product',
                        lambda weight, rows: weight.written_out_product(rows))
    return Int4Kernel(CPU, torch.float32, TensorCoreLayout(), has_product=True)


@pytest.mark.parametrize('written_out, most', [(3.5, 32), (10.0, 128), (0.0, 0), (1e9, 1024)])
def test_the_faster_way_is_taken_up_to_the_number_of_tokens_that_was_measured(
        small_probe: Int4Kernel, written_out: float, most: int,
        monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(call: Any) -> float:
        [rows] = call.args
        # The product takes a second for every 16 tokens.
        return written_out if call.func.__name__ == 'written_out_product' else len(rows) / 16

    assert most_tokens(small_probe, seconds) == most
    weight = Int4Weight.of(random_values(), replace(small_probe, max_tokens=most))
    used: list[int] = []
    monkeypatch.setattr(Int4Weight, 'packed_product', lambda weight, rows: used.append(len(rows)))
    for tokens in (1, 32, 33, 128, 129):
        weight.product(torch.zeros(tokens, 256))
    # Without a limit, the default of a CPU.
    assert used == [n for n in (1, 32, 33, 128, 129) if n <= (most or int4.MAX_CPU_TOKENS)]


def test_a_product_that_is_wrong_for_many_tokens_is_not_taken_for_them(
        small_probe: Int4Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Int4Weight, 'packed_product', lambda weight, rows: (
        weight.written_out_product(rows) * (1.0 if len(rows) <= 64 else 1.1)))
    assert most_tokens(small_probe, lambda call: float(
        call.func.__name__ == 'written_out_product')) == 64


def test_calls_are_timed_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single call on a GPU takes as long as its launches, if those take longer."""
    events: list[str] = []

    class Timer:
        def __init__(self, *_: object) -> None:
            events.append('start')

        def stop(self) -> None:
            events.append('stop')

        def seconds(self) -> float:
            return 1.0

    monkeypatch.setattr(int4_limit, 'DeviceTimer', Timer)
    assert device_seconds(CPU, lambda: events.append('call')) == 1.0 / CALLS
    assert events == ['start', *['call'] * CALLS, 'stop'] * REPEATS


def test_without_a_choice_no_limit_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4_limit, 'most_tokens', None)
    for kernel in (find_kernel(CPU, torch.bfloat16), plain_kernel(CPU, torch.float32)):
        assert with_measured_limit(kernel) is kernel


# -- files -------------------------------------------------------------------------------


def test_a_checkpoint_on_disk_gives_the_same_model(tmp_path: Path) -> None:
    model = tiny_model('llama-tied-biased')
    model.save_pretrained(tmp_path)
    kernel = plain_kernel(CPU, torch.float32)
    made = int4_checkpoint.checkpoint_of(copy.deepcopy(model), kernel, torch.float32)
    path = int4_checkpoint.file_for(tmp_path, kernel, torch.float32)
    assert int4_checkpoint.read(path, kernel) is None
    int4_checkpoint.save(made, path)
    read = int4_checkpoint.read(path, kernel)
    assert read is not None
    assert read.rounded == made.rounded == 1.0
    state = made.state_dict(torch.float32)
    assert {n: t.shape for n, t in state.items()} == {
        n: t.shape for n, t in model.state_dict().items() if n != 'lm_head.weight'}
    ids = torch.arange(2, 30)[None]
    logits = [int4_checkpoint.model_of(c, str(tmp_path), torch.float32).eval()(ids).logits
              for c in (made, read)]
    assert torch.equal(*logits)
    assert 1e-3 < (logits[0] - model(ids).logits).norm() / logits[0].norm() < 0.5
    path.write_bytes(path.read_bytes()[:-100])
    assert int4_checkpoint.read(path, kernel) is None


def test_the_packaged_model_keeps_its_4_bits(base_model: LoadedModel) -> None:
    """It is in Q4_1, and so is what is served."""
    kernel = plain_kernel(CPU, torch.float32)
    made = int4_checkpoint.checkpoint_of(
        copy.deepcopy(base_model.model), kernel, torch.float32)
    assert not made.rounded
    assert len(made.linears) == 4 * 30
    dense = base_model.model.state_dict()
    for name, tensor in made.state_dict(torch.float32).items():
        torch.testing.assert_close(tensor, dense[name], rtol=1e-5, atol=1e-7)


def test_the_budget_counts_what_dequantising_takes() -> None:
    kernel = plain_kernel(CPU, torch.float32)
    footprints, sizes = [], []
    for weights in ({}, int4_checkpoint.checkpoint_of(
            tiny_model('llama'), kernel, torch.float32).linears):
        packed = pack(tiny_model('llama'), kv_tokens=64, int4=weights)
        sizes.append(packed.weights_nbytes)
        lora = LoRAManager(packed.linears, targets='all-linear', rank=4, alpha=4.0, slots=1)
        footprints.append(measure_footprint(packed, lora))
    plain, four_bits = footprints
    largest = 192 * 64      # gate and up
    assert largest * 4 < four_bits.kernels - plain.kernels < largest * 8
    assert four_bits.graphs == plain.graphs
    assert sizes[1] < sizes[0] / 2


@pytest.mark.parametrize('targets', ['all-linear', 'output-linear'])
def test_adapters_need_no_dense_weights(
        targets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dequantising all layers takes seconds of a start, and memory beside those in 4 bits."""
    packed = pack(tiny_model('llama'), kv_tokens=64, int4=int4_checkpoint.checkpoint_of(
        tiny_model('llama'), plain_kernel(CPU, torch.float32), torch.float32).linears)
    monkeypatch.setattr(Int4Weight, 'dense', None)
    lora = LoRAManager(
        packed.linears, targets=targets, rank=4, alpha=4.0, slots=1, protected_directions=2)
    assert lora.null_space_nbytes > 0


def test_models_with_other_weights_in_4_bits_have_other_digests(model_folder: Path) -> None:
    kernel = plain_kernel(CPU, torch.float32)
    digests = set()
    for factor in (1.0, 1.0, 1.5):
        loaded = load_model(str(model_folder), device='cpu', dtype='float32', int4=kernel)
        for weight in loaded.int4.values():
            weight.scales_and_zeros.mul_(factor)
        digests.add(weights_digest(pack(loaded.model, kv_tokens=64, int4=loaded.int4).model))
    assert len(digests) == 2


def test_a_model_that_is_not_in_4_bits_is_rounded(model_folder: Path) -> None:
    kernel = plain_kernel(CPU, torch.float32)
    lines: list[str] = []
    loaded = load_model(str(model_folder), device='cpu', int4=kernel, progress=lines.append)
    assert len(loaded.int4) == 4 * 2
    assert any('rounded to 4' in line for line in lines)
