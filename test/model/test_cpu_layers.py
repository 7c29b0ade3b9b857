# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Compiled norms and rotations have the results and gradients of plain ones, or are not used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.families import FAMILIES, relative_error, TARGETS, tiny_model, with_reference
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, LlamaRMSNorm

from mace_ros.model import cpu_layer_kernels
from mace_ros.model.attention import whole_sequences
from mace_ros.model.cpu_layers import (
    compiled_norms,
    compiled_rotary,
    CompiledRotation,
    normalize,
)
from mace_ros.model.fused_check import use_fused_layers
from mace_ros.model.lora_mapping import BASE_SLOT
from mace_ros.model.model_shell import run_layer
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.spans import Span

pytestmark = pytest.mark.usefixtures('one_thread')

# Families with norms or rotations that the kernels do not compute.
OTHER_NORMS = {'olmo', 'gpt-neox', 'starcoder2', 'opt', 'gemma', 'gemma2', 'gemma3', 'cohere',
               'cohere2'}
OTHER_ROTATIONS = {'opt', 'gpt-oss', 'cohere', 'cohere2', 'glm', 'deepseek-v2'}
dtypes = pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])


def results(function: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    """Return a function's results, and the gradients of its inputs for random ones of them."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    found = function(*leaves)
    found = [found] if isinstance(found, Tensor) else list(found)
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in found]
    return [y.detach() for y in found] + list(torch.autograd.grad(found, leaves, given))


def limit(dtype: torch.dtype) -> float:
    return 1e-6 if dtype == torch.float32 else 0.01


@dtypes
@pytest.mark.parametrize('shape', [(1, 5, 33), (1, 4, 3, 16)])
def test_norms(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = LlamaRMSNorm(shape[-1], eps=1e-3).to(dtype)
    norm.weight.data = torch.randn(shape[-1], generator=generator).to(dtype)
    x = torch.randn(shape, generator=generator).to(dtype)
    # Also of inputs that are not contiguous, such as the heads of queries beside keys.
    wider = torch.cat([x, x], -1)[..., :shape[-1]]
    exact = results(norm.float(), x.float())
    norm.to(dtype)
    for given in (x, wider):
        for ours, theirs in zip(results(lambda x: normalize(x, norm.weight, 1e-3), given), exact,
                                strict=True):
            assert ours.dtype == dtype
            assert relative_error(ours.float(), theirs) < limit(dtype)


@dtypes
def test_rotations(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 7, heads, 16, generator=generator).to(dtype).transpose(1, 2)
                  for heads in (6, 2))
    # Each of a pair's values has an angle of its own: Llama's repeat, and others need not.
    cos, sin = (torch.randn(1, 7, 16, generator=generator).to(dtype) for _ in range(2))
    rotate = CompiledRotation(apply_rotary_pos_emb)
    exact = results(lambda q, k: apply_rotary_pos_emb(q, k, cos.float(), sin.float()),
                    query.float(), key.float())
    for ours, theirs in zip(results(lambda q, k: rotate(q, k, cos, sin), query, key), exact,
                            strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours.float(), theirs) < limit(dtype)


def test_rotations_of_other_arguments_are_the_models_own() -> None:
    calls: list[tuple[Any, ...]] = []
    rotate = CompiledRotation(lambda *arguments, **_: calls.append(arguments))
    query, key = torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 3, 8)
    angles = torch.zeros(1, 3, 8)
    rotate(query, key, angles, angles)
    assert not calls
    rotate(query, key, angles[..., :4], angles[..., :4])        # of a part of each head
    rotate(query, key, angles.double(), angles.double())
    rotate(query, key, angles, angles, unsqueeze_dim=2)
    rotate(query, key, angles, angles, None)
    rotate(torch.zeros(2, 2, 3, 8), key, angles, angles)
    assert len(calls) == 5


@pytest.mark.parametrize('family', FAMILIES)
def test_families_keep_their_logits_and_gradients(family: str) -> None:
    model, _, _ = with_reference(tiny_model(family), targets=TARGETS.get(family, 'all-linear'))
    assert compiled_norms(model).applies == (family not in OTHER_NORMS)
    assert compiled_rotary(model).applies == (family not in OTHER_ROTATIONS)
    expected = logits_and_gradient(model)
    assert use_fused_layers(model) == []
    assert len(model.fused_parts) == (family not in OTHER_NORMS) + (family not in OTHER_ROTATIONS)
    for ours, theirs in zip(logits_and_gradient(model), expected, strict=True):
        assert relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize('family', ['llama', 'qwen3', 'qwen3-moe'])
def test_rounding_to_16_bits_is_no_error(family: str) -> None:
    model, _, _ = with_reference(tiny_model(family).to(torch.bfloat16))
    assert use_fused_layers(model) == []
    assert [part.name for part in model.fused_parts] == ['norms', 'rotary embeddings']


def logits_and_gradient(model: PackedModel) -> tuple[Tensor, Tensor]:
    """Return logits of a prompt, and the gradient of an input of the last layer."""
    logits = model.run([Span((5, 9, 4, 7), 0, [3], BASE_SLOT, True)]).clone()
    with model.training(whole_sequences((3, 2), model.device)):
        hidden, calls = model.shell.call_layers(
            model.tensor([[5, 9, 4, 8, 7]]), model.tensor([[0, 1, 2, 0, 1]]))
        hidden = hidden.detach().requires_grad_()
        y = run_layer(model.layers[-1], hidden, calls[-1])
        return logits, torch.autograd.grad(y.square().sum(), hidden)[0]


@pytest.mark.parametrize(('kernel', 'parts'), [
    ('normalize', ['rotary embeddings']), ('normalize_backward', ['rotary embeddings']),
    ('rotate', ['norms']), ('rotate_backward', ['norms'])])
def test_a_part_with_a_wrong_kernel_is_not_used(
        kernel: str, parts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = with_reference(tiny_model('llama'))
    own = [type(m) for m in model.model.modules()]

    def wrong(out: np.ndarray, *_: Any) -> None:
        out[...] = 1.0

    monkeypatch.setattr(cpu_layer_kernels, kernel, wrong)
    reasons = use_fused_layers(model)
    assert [part.name for part in model.fused_parts] == parts
    assert len(reasons) == 1 and 'off by' in reasons[0]
    for part in model.fused_parts:
        part.undo()
    assert [type(m) for m in model.model.modules()] == own
