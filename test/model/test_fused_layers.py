# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Fused parts of layers compute what a model's own code computes, or are not used."""

from __future__ import annotations

from typing import Any

import pytest
from support.families import FAMILIES, random_adapter, TARGETS, tiny_model, with_reference
from support.kernels import DEVICE, needs_triton
import torch
from torch import nn, Tensor

from mace_ros.model import fused_check
from mace_ros.model.attention import whole_sequences
from mace_ros.model.fused_check import difference, update_error, use_fused_layers, use_if_right
from mace_ros.model.fused_layers import FusedLoRA, FusedNorms, FusedRMSNorm, FusedRotary
from mace_ros.model.graph_check import relative_error
from mace_ros.model.lora_mapping import BASE_SLOT, FIRST_SERVED_SLOT
from mace_ros.model.model_shell import run_layer
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.spans import Span

pytestmark = pytest.mark.usefixtures('one_thread')

# Families whose norms are no RMSNorm, and whose rotary embeddings are not those of Llama.
OTHER_NORMS = {'cohere', 'cohere2', 'olmo', 'gpt-neox', 'starcoder2', 'opt'}
OTHER_ROTARY = {'cohere', 'cohere2', 'glm', 'gpt-oss', 'deepseek-v2', 'opt'}


def fused_norms(model: PackedModel) -> int:
    """Return how many norms of a model are fused."""
    return sum(isinstance(m, FusedRMSNorm) for m in model.model.modules())


@pytest.mark.parametrize('family', FAMILIES)
def test_norms_of_most_families_are_one_kernel_and_compute_the_same(family: str) -> None:
    model, _, _ = with_reference(tiny_model(family), targets=TARGETS.get(family, 'all-linear'))
    norms = FusedNorms(model)
    assert difference(model, norms) < 1e-5
    assert (fused_norms(model) > len(model.layers)) == (family not in OTHER_NORMS)
    norms.undo()
    assert not fused_norms(model)


@pytest.mark.parametrize('family', ['llama', 'gemma2'])
def test_gradients_pass_fused_norms(family: str) -> None:
    model, _, _ = with_reference(tiny_model(family))
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for use in (FusedNorms.undo, FusedNorms.use):
        use(FusedNorms(model))
        with torch.no_grad(), model.training(whole_sequences((9,), model.device)):
            _, calls = model.shell.call_layers(
                model.tensor([[5] * 9]), model.tensor([list(range(9))]))
        inputs = x.clone().requires_grad_()
        with model.training(whole_sequences((9,), model.device)), torch.enable_grad():
            run_layer(model.layers[0], inputs, calls[0]).square().sum().backward()
        found.append(inputs.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('family', FAMILIES)
def test_layers_of_most_families_can_defer_the_rotation(family: str) -> None:
    model, _, _ = with_reference(tiny_model(family), targets=TARGETS.get(family, 'all-linear'))
    own = [type(m) for m in model.model.modules()]
    rotary = FusedRotary(model)
    rotary.use()
    changed = sum(a is not type(b) for a, b in zip(own, model.model.modules(), strict=True))
    assert changed == (0 if family in OTHER_ROTARY else len(model.layers))
    rotary.undo()
    assert [type(m) for m in model.model.modules()] == own


@needs_triton
@pytest.mark.parametrize('family', ['llama', 'qwen3', 'phi3', 'gpt-neox', 'smollm3', 'gemma2'])
def test_models_get_the_same_logits_from_all_kernels(family: str) -> None:
    model, lora, _ = with_reference(tiny_model(family).to(DEVICE))
    random_adapter(lora, 0)
    lora.write_slot(FIRST_SERVED_SLOT)
    spans = [[Span((5,) * 9, 0, [3], FIRST_SERVED_SLOT, True),
              Span((7,) * 5, 0, [6], BASE_SLOT, True)],
             [Span((6,), 9, [3], FIRST_SERVED_SLOT, True), Span((8,), 5, [6], BASE_SLOT, True),
              Span((9, 4, 2), 0, [1], FIRST_SERVED_SLOT, True)]]
    expected = [model.run(each).clone() for each in spans]
    for cache in (*model.kv_cache.keys, *model.kv_cache.values):
        cache.zero_()
    for part in (FusedNorms, FusedRotary, FusedLoRA):
        part(model).use()
    for each, logits in zip(spans, expected, strict=True):
        assert relative_error(model.run(each), logits) < 1e-4


@needs_triton
def test_the_check_uses_kernels_that_are_right() -> None:
    model, _, _ = with_reference(tiny_model('llama').to(DEVICE))
    assert use_if_right(model, FusedNorms(model), lambda x: difference(model, x), 1e-3) == ''
    assert use_if_right(model, FusedRotary(model), lambda x: difference(model, x), 1e-3) == ''
    assert use_if_right(model, FusedLoRA(model), lambda _: update_error(model), 1e-3) == ''
    assert model.fused_parts == ['norms', 'rotary embeddings', 'adapters']


# -- without Triton ----------------------------------------------------------------------


class WrongNorm(nn.Module):
    """Returns its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class WrongNorms(FusedNorms):
    """Replaces norms by something else."""

    def use(self) -> None:
        for parent, name, _, _ in self._norms:
            setattr(parent, name, WrongNorm())


class FailingRotary(FusedRotary):
    """Raises an error that is no RuntimeError, as Triton's compiler does."""

    def use(self) -> None:
        super().use()
        raise ValueError('injected')


@pytest.mark.parametrize('part, reason', [
    (WrongNorms, 'norms: off by'), (FailingRotary, 'rotary embeddings: ValueError: injected')])
def test_a_part_that_is_wrong_is_not_used(part: Any, reason: str) -> None:
    model, _, _ = with_reference(tiny_model('llama'))
    own = [type(m) for m in model.model.modules()]
    found = use_if_right(model, part(model), lambda x: difference(model, x), 1e-3)
    assert found.startswith(reason)
    assert [type(m) for m in model.model.modules()] == own
    assert model.fused_parts == []


@pytest.mark.parametrize('wrong', [0.0, float('nan')])
def test_an_update_that_is_wrong_is_not_used(
        wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = with_reference(tiny_model('llama'))
    monkeypatch.setattr(fused_check, 'add_update', lambda y, *_: y + wrong)
    reason = use_if_right(model, FusedLoRA(model), lambda _: update_error(model), 1e-3)
    assert reason.startswith('adapters: off by')
    assert not model.lora_mapping.fused


def test_a_kernel_that_does_not_write_the_cache_is_found_out(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Although an earlier pass by the model's own code has written the same blocks."""
    model, _, _ = with_reference(tiny_model('llama'))

    class Forgetful(FusedNorms):
        def use(self) -> None:
            monkeypatch.setattr(torch.Tensor, 'index_copy_', lambda self, *_: self)

        def undo(self) -> None:
            monkeypatch.undo()

    assert difference(model, Forgetful(model)) > 0.01
    monkeypatch.undo()


def test_a_cpu_runs_the_models_own_code() -> None:
    model, _, _ = with_reference(tiny_model('llama'))
    own = [type(m) for m in model.model.modules()]
    assert use_fused_layers(model) == []
    assert [type(m) for m in model.model.modules()] == own
    assert not model.lora_mapping.fused

