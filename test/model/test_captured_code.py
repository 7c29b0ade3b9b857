# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What CUDA graphs capture: no waiting, one device, one upload, and fused attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from support.device_log import DeviceLog
from support.families import (
    FAMILIES,
    fewer_layers,
    RANK,
    SHARED_EXPERTS,
    TARGETS,
    tiny_model,
)
import torch
from torch import Tensor
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.model import attention
from mace_ros.model.batch_descriptor import BatchDescriptor
from mace_ros.model.cuda_graph_runner import CudaGraphRunner
from mace_ros.model.fused_experts import fused_experts
from mace_ros.model.fused_layers import fused_norms, fused_rotary, FusedChunks, FusedLoRA
from mace_ros.model.graphed_layers import GraphedLayers
from mace_ros.model.int4 import GROUP, Int4Values, Int4Weight
from mace_ros.model.int4_kernels import Int4Kernel, TensorCoreLayout
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.lora_mapping import FIRST_SERVED_SLOT
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.packing import pack
from mace_ros.model.paged_attention import PagedAttention
from mace_ros.model.spans import PiggybackSpans, Span

pytestmark = pytest.mark.usefixtures('one_thread')

META = torch.device('meta')


UNROTATED = {'opt'}     # families without rotary embeddings
MIXED = {'qwen3-moe', 'gpt-oss'}            # with experts
CHANGED_SCORES = {'gemma2', 'gpt-oss'}      # with a softcap or sinks
# Layers of other passes than decode passes take at most 30 kernels, too, but for these families:
# with attention of chunks, which is six more, they route tokens to experts by six, have norms in
# fp32 by six, have six norms, or join keys of two parts.
MOST = {'qwen3-moe': 35, 'olmo': 35, 'gemma3': 32, 'deepseek-v2': 33}


def on_meta(family: str, layers: int = 3, *, int4: bool = False,
            fused: bool = False, **changes: Any) -> PackedModel:
    """Return a packed model without values; with ``fused``, it uses the package's kernels."""
    changes |= fewer_layers(family, layers)
    cache = pack(tiny_model(family, **changes), kv_tokens=16).kv_cache
    shapes = [(k.shape[1], k.shape[2], v.shape[2])
              for k, v in zip(cache.keys, cache.values, strict=True)]
    model = PackedModel(tiny_model(family, **changes).to(torch.bfloat16).to(META))
    model.allocate_kv_cache(shapes, 64)
    if int4:
        model.use_int4({x.name: four_bits(x.weight) for x in model.linears})
    LoRAManager(model.linears, targets=TARGETS.get(family, 'all-linear'), rank=RANK, alpha=4.0,
                slots=2)
    if fused:
        model.context.paged = PagedAttention(16)
        for part in (fused_norms, fused_rotary, fused_experts, FusedChunks, FusedLoRA):
            part(model).use()
    return model


def four_bits(weight: torch.Tensor) -> Int4Weight:
    """Return a weight of the shape of ``weight`` as CUDA's product takes it."""
    kernel = Int4Kernel(META, torch.bfloat16, TensorCoreLayout(), has_product=True)
    outputs, inputs = weight.shape
    scales = torch.zeros(outputs, inputs // GROUP, device=META)
    return Int4Weight.of(Int4Values(
        torch.zeros(outputs, inputs, dtype=torch.uint8, device=META), scales, scales), kernel)


def passes(model: PackedModel) -> dict[str, tuple[list[Span], PiggybackSpans | None]]:
    """Return a pass of each kind of shape."""
    table = range(8)
    decode = [Span((5,), 40 + i, table, FIRST_SERVED_SLOT, True) for i in range(3)]
    chunk = Span((5,) * 20, BLOCK_TOKENS, table, FIRST_SERVED_SLOT, True)
    width = model.model.config.get_text_config().hidden_size
    hidden = torch.zeros(len(model.layers) + 1, 9, width, dtype=model.dtype, device=META)
    piggyback = PiggybackSpans([Span((5,) * 9, 0, table, 0, False)], list(hidden))
    return {'decode': (decode, None), 'chunk': ([chunk], None), 'finetune': ([], piggyback),
            'beside': ([*decode, chunk], None), 'all': ([*decode, chunk], piggyback)}


@pytest.mark.parametrize('family, int4, fused', [
    *((family, False, fused) for family in FAMILIES for fused in (False, True)),
    ('llama', True, True), ('qwen2', True, False)])
def test_captured_passes_never_wait_and_attend_by_fused_kernels(
        family: str, int4: bool, fused: bool) -> None:
    model = on_meta(family, int4=int4, fused=fused)
    faults = {}
    for name, (spans, piggyback) in passes(model).items():
        runner = CudaGraphRunner(model)
        prepared = runner.prepare(BatchDescriptor.of(spans, piggyback))
        with DeviceLog() as log:
            logits = prepared.run(spans, piggyback)
        assert logits.shape[0] == len(spans)
        faults[name] = (log.uploads, log.faults)
        assert ('_weight_int4pack_mm' in log.kernels) == int4
        assert ('mace_ros::attend_paged' in log.kernels) == (
            fused and name in ('decode', 'beside', 'all'))
        assert ('mace_ros::add_lora' in log.kernels) == fused
        assert 'argmax' in log.kernels
        assert ('mace_ros::rotate_and_write' in log.kernels) == (
            fused and family not in UNROTATED)
        assert ('mace_ros::multiply_pairs' in log.kernels) == (fused and family in MIXED)
        assert ('mace_ros::attend_block' in log.kernels) == (
            fused and name != 'decode' and family in CHANGED_SCORES)
    assert faults == dict.fromkeys(faults, (1, []))


@pytest.mark.parametrize('family', FAMILIES)
def test_captured_layers_of_a_step_never_wait_and_attend_by_fused_kernels(family: str) -> None:
    model = on_meta(family)
    layers = GraphedLayers(model, 64)
    x = torch.zeros(1, 64, model.model.config.get_text_config().hidden_size, dtype=model.dtype,
                    device=META, requires_grad=True)
    with DeviceLog() as log, model.training(layers.metadata):
        for index in range(len(model.layers)):
            y = layers.run(index, x)
            y.backward(torch.zeros_like(y))
            assert layers.backward(index, x, torch.zeros_like(y)).shape == x.shape
    assert not log.uploads
    assert not log.faults


def kernels_of_a_layer(family: str, *, fused: bool, **changes: Any) -> dict[str, int]:
    """Return the kernels of a layer in a pass of each kind of shape."""
    kernels = {}
    for layers in (2, 3):
        model = on_meta(family, layers, fused=fused, **changes)
        for name, (spans, piggyback) in passes(model).items():
            prepared = CudaGraphRunner(model).prepare(BatchDescriptor.of(spans, piggyback))
            with DeviceLog() as log:
                prepared.run(spans, piggyback)
            kernels[name, layers] = len(log.kernels)
    return {name: kernels[name, 3] - kernels[name, 2] for name in passes(model)}


@pytest.mark.parametrize('fused, decode, chunk, most', [(False, 49, 53, 70), (True, 21, 25, 30)])
def test_a_pass_of_a_llama_takes_few_kernels_in_each_layer(
        fused: bool, decode: int, chunk: int, most: int) -> None:
    each = kernels_of_a_layer('llama', fused=fused)
    assert each['decode'] <= decode
    assert each['chunk'] <= chunk
    assert max(each.values()) <= most


@pytest.mark.parametrize('family', FAMILIES)
def test_a_layer_of_every_family_takes_few_kernels(family: str) -> None:
    each = kernels_of_a_layer(family, fused=True)
    assert each['decode'] <= 30
    assert max(each.values()) <= MOST.get(family, 30)


def test_a_decode_layer_with_experts_beside_shared_ones_takes_more_kernels() -> None:
    assert kernels_of_a_layer('deepseek-v2', fused=True, **SHARED_EXPERTS)['decode'] <= 42


@pytest.mark.parametrize('heads, kv_heads', [(4, 2), (6, 1), (4, 4)])
def test_folded_heads_attend_as_repeated_ones(
        heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, n, t, 16) for n, t in ((heads, 9), (kv_heads, 23),
                                                               (kv_heads, 23)))
    mask = torch.rand(9, 23) < 0.5
    mask[:, 0] = True
    expected = F.scaled_dot_product_attention(
        query, *(x.repeat_interleave(heads // kv_heads, 1) for x in (key, value)), mask)
    torch.testing.assert_close(
        attention.attend_folded(query, key, value, mask, None), expected)


def test_faults_are_found() -> None:
    query, kv = torch.zeros(1, 4, 9, 16, device=META), torch.zeros(1, 2, 9, 16, device=META)
    mask = torch.ones(9, 9, dtype=torch.bool, device=META)
    counts = torch.tensor([2, 3])
    with DeviceLog() as log:
        F.scaled_dot_product_attention(query, kv, kv, mask, enable_gqa=True)
        query.index_select(2, torch.tensor([1]))
        torch.repeat_interleave(torch.arange(2), counts)
    assert len(log.faults) == 3


class WaitingUploads(TorchFunctionMode):
    """Records copies to the device for which the host would wait, if the device were CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        """Record a call, and run it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.device == META:
            copies = func in (Tensor.to, Tensor.copy_) and any(
                isinstance(x, Tensor) and x.device.type == 'cpu' for x in args)
            if func in (torch.tensor, torch.as_tensor) or (
                    copies and not kwargs.get('non_blocking')):
                self.found.append(func.__name__)
        return result


def test_eager_passes_upload_without_waiting() -> None:
    for fused in (False, True):
        model = on_meta('llama', fused=fused)
        fresh = [Span((5,) * 20, 0, range(8), FIRST_SERVED_SLOT, True)] * 2
        for spans, piggyback in (*passes(model).values(), (fresh, None)):
            with WaitingUploads() as uploads, DeviceLog() as log:
                model.run(spans, piggyback)
            assert log.uploads > 2      # those of an eager pass
            assert (uploads.found, log.faults) == ([], [])


def test_uploads_that_wait_are_found() -> None:
    with WaitingUploads() as uploads:
        torch.tensor([1], device=META)
        torch.zeros(3).to(META)
        torch.zeros(3).to(META, non_blocking=True)
    assert uploads.found == ['tensor', 'to']
