# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Fused parts of layers compute what a model's own code computes, or are not used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.families import (
    FAMILIES,
    fewer_layers,
    random_adapter,
    SHARED_EXPERTS,
    TARGETS,
    tiny_model,
    with_reference,
)
from support.kernels import DEVICE, needs_triton
import torch
from torch import nn, Tensor

from mace_ros.model import (
    attention,
    checked_passes,
    fused_check,
    fused_layers,
    graph_check,
)
from mace_ros.model.attention import whole_sequences
from mace_ros.model.fused_check import (
    difference,
    update_error,
    use_fused_layers,
    use_if_right,
    use_part,
)
from mace_ros.model.fused_experts import fused_experts
from mace_ros.model.fused_layers import (
    fused_norms,
    fused_rotary,
    FusedChunks,
    FusedLoRA,
    norm_kind,
    OtherCode,
)
from mace_ros.model.graph_check import relative_error
from mace_ros.model.graphs import FusedPart
from mace_ros.model.layer_operators import Pairing, plain_norm, plain_rotation
from mace_ros.model.lora_mapping import BASE_SLOT, FIRST_SERVED_SLOT
from mace_ros.model.model_shell import run_layer
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.spans import Span

pytestmark = pytest.mark.usefixtures('one_thread')

# Families whose norms are PyTorch's, or have no weight; without rotary embeddings; with experts.
OTHER_NORMS = {'olmo', 'gpt-neox', 'starcoder2', 'opt'}
UNROTATED = {'opt'}
MIXED = {'qwen3-moe', 'gpt-oss'}
CHANGED_SCORES = {'gemma2', 'gpt-oss'}      # with a softcap or sinks


def changed(model: PackedModel, part: FusedPart) -> list[nn.Module]:
    """Return the modules that run other code while ``part`` is in use."""
    own = [type(m) for m in model.model.modules()]
    part.use()
    found = [m for m, kind in zip(model.model.modules(), own, strict=True) if type(m) is not kind]
    part.undo()
    assert [type(m) for m in model.model.modules()] == own
    return found


@pytest.mark.parametrize('family', FAMILIES)
def test_parts_of_most_families_are_known(family: str) -> None:
    model, _, _ = with_reference(tiny_model(family), targets=TARGETS.get(family, 'all-linear'))
    norms, layers, experts = (
        changed(model, part(model)) for part in (fused_norms, fused_rotary, fused_experts))
    assert (len(norms) > len(model.layers)) == (family not in OTHER_NORMS)
    assert bool(norms) == (family not in OTHER_NORMS)
    assert len(layers) == (0 if family in UNROTATED else len(model.layers))
    assert len(experts) == (len(model.layers) if family in MIXED else 0)
    assert FusedChunks(model).applies == (family in CHANGED_SCORES)
    for norm in norms:
        assert norm_kind(norm) == {'relative': family.startswith('gemma'),
                                   'centered': family.startswith('cohere')}


@pytest.mark.parametrize('family', ['llama', 'qwen3-moe'])
def test_other_code_changes_no_name_and_no_training_pass(family: str) -> None:
    model, _, _ = with_reference(tiny_model(family))
    names = list(model.model.state_dict())
    metadata, ids = whole_sequences((9,), model.device), model.tensor([[5] * 9])

    def gradient() -> Tensor:
        with model.training(metadata):
            with torch.no_grad():
                x, calls = model.shell.call_layers(ids, model.tensor([list(range(9))]))
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                run_layer(model.layers[0], x, calls[0]).square().sum().backward()
        assert x.grad is not None
        return x.grad

    expected = gradient()
    for part in (fused_norms, fused_rotary, fused_experts):
        part(model).use()
    assert torch.equal(gradient(), expected)
    assert list(model.model.state_dict()) == names


@needs_triton
@pytest.mark.parametrize('family, changes', [
    *((family, {}) for family in ('llama', 'qwen3', 'phi3', 'gpt-neox', 'smollm3', 'gemma2',
                                  'cohere', 'glm', 'gpt-oss')),
    ('deepseek-v2', SHARED_EXPERTS)])
def test_models_get_the_same_logits_from_all_kernels(
        family: str, changes: dict[str, Any]) -> None:
    model, lora, _ = with_reference(
        tiny_model(family, **fewer_layers(family, 2), **changes).to(DEVICE),
        targets=TARGETS.get(family, 'all-linear'))
    random_adapter(lora, 0)
    lora.write_slot(FIRST_SERVED_SLOT)
    spans = [[Span((5,) * 4, 0, [3], FIRST_SERVED_SLOT, True),
              Span((7,) * 3, 0, [6], BASE_SLOT, True),
              Span((3,) * 2, 0, [1], FIRST_SERVED_SLOT, True)],
             [Span((6,), 4, [3], FIRST_SERVED_SLOT, True), Span((8,), 3, [6], BASE_SLOT, True),
              Span((9, 4, 2), 2, [1], FIRST_SERVED_SLOT, True)]]
    expected = [model.run(each).clone() for each in spans]
    for cache in (*model.kv_cache.keys, *model.kv_cache.values):
        cache.zero_()
    for part in (fused_norms, fused_rotary, fused_experts, FusedChunks, FusedLoRA):
        part(model).use()
    for each, logits in zip(spans, expected, strict=True):
        assert relative_error(model.run(each), logits) < 1e-4


@needs_triton
def test_the_check_uses_kernels_that_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few tokens, since the interpreter is slow."""
    monkeypatch.setattr(graph_check, 'SAMPLES', 1)
    monkeypatch.setattr(checked_passes, 'TOKENS', 5)
    model, _, _ = with_reference(tiny_model('llama', num_hidden_layers=1).to(DEVICE))
    for part in (fused_norms(model), fused_rotary(model)):
        assert use_if_right(model, part, lambda x: difference(model, x), 1e-3) == ''
    assert use_if_right(model, FusedLoRA(model), lambda _: update_error(model), 1e-3) == ''
    assert [part.name for part in model.fused_parts] == ['norms', 'rotary embeddings', 'adapters']


# -- without Triton ----------------------------------------------------------------------


def wrong_norms(model: PackedModel) -> FusedPart:
    """Return norms that do nothing."""
    norms = changed(model, fused_norms(model))
    kind = type('Wrong', (type(norms[0]),), {'forward': lambda self, x: x})
    return OtherCode('norms', dict.fromkeys(norms, kind))


def failing_rotary(model: PackedModel) -> FusedPart:
    """Return attention that raises an error that is no RuntimeError, as Triton's compiler does."""
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError('injected')

    layers = changed(model, fused_rotary(model))
    return OtherCode('rotary embeddings', dict.fromkeys(
        layers, type('Failing', (type(layers[0]),), {'forward': fail})))


@pytest.mark.parametrize('part, reason', [
    (wrong_norms, 'norms: off by'), (failing_rotary, 'rotary embeddings: ValueError: injected')])
def test_a_part_that_is_wrong_is_not_used(
        part: Callable[[PackedModel], FusedPart], reason: str) -> None:
    model, _, _ = with_reference(tiny_model('llama'))
    own = [type(m) for m in model.model.modules()]
    found = use_if_right(model, part(model), lambda x: difference(model, x), 1e-3)
    assert found.startswith(reason)
    assert [type(m) for m in model.model.modules()] == own
    assert model.fused_parts == []


def large_keys() -> PackedModel:
    """Return a model in 16 bits with large biases of keys, as Qwen2's are."""
    model = tiny_model('qwen2')
    with torch.no_grad():
        for name, bias in model.named_parameters():
            if name.endswith('k_proj.bias'):
                bias *= 300
    return with_reference(model.to(torch.bfloat16))[0]


def rounds_once(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, keys: Tensor,
                values: Tensor, slots: Tensor, *, pairing: Pairing, first: int) -> None:
    """Do what the kernel does."""
    assert first == 0
    for x in (query, key):
        x.copy_(plain_rotation(x.float(), *(c[:, None].float() for c in (cos, sin)), pairing))
    keys.index_copy_(0, slots, key[0].transpose(0, 1))
    values.index_copy_(0, slots, value[0].transpose(0, 1))


def test_a_rotation_that_rounds_once_is_used_where_keys_are_large(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own code rounds three times, which makes another answer of large keys."""
    monkeypatch.setattr(attention, 'rotate_and_write', rounds_once)
    assert use_part(large_keys(), fused_rotary) == ''

    def backwards(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor,
                  *others: Tensor, **options: Any) -> None:
        rounds_once(query, key, value, cos, -sin, *others, **options)

    monkeypatch.setattr(attention, 'rotate_and_write', backwards)
    for model in (large_keys(), with_reference(tiny_model('llama').to(torch.bfloat16))[0]):
        assert use_part(model, fused_rotary).startswith('rotary embeddings: off by')


def test_norms_that_round_once_are_used_where_keys_are_large(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_layers, 'normalize', plain_norm)
    assert use_part(large_keys(), fused_norms) == ''


@pytest.mark.parametrize('family', FAMILIES)
def test_parts_are_compared_with_what_the_model_computes(family: str) -> None:
    model, _, _ = with_reference(tiny_model(family), targets=TARGETS.get(family, 'all-linear'))
    spans = [Span((5, 9, 4), 0, [3], BASE_SLOT, True), Span((8, 7), 0, [6], BASE_SLOT, True)]
    expected = model.run(spans).clone()
    for part in (fused_norms, fused_rotary, fused_experts):
        part(model).use_plain()
    assert relative_error(model.run(spans), expected) < 1e-4


def test_a_part_that_can_not_be_tried_is_not_used() -> None:
    """Such as norms of an unknown family, whose code takes other arguments."""
    def unlike_others(_: PackedModel) -> FusedPart:
        raise TypeError('injected')

    model, _, _ = with_reference(tiny_model('llama'))
    assert use_part(model, unlike_others) == 'unlike_others: TypeError: injected'
    assert use_part(model, FusedChunks) == ''       # it has no such part
    assert model.fused_parts == []
    assert use_part(model, wrong_norms).startswith('norms: off by')


def test_attention_of_chunks_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = with_reference(tiny_model('gemma2'))

    def forgetful(query: Tensor, _: Tensor, values: Tensor, *__: Any, **___: Any) -> Tensor:
        return values.new_zeros(query.shape[1], query.shape[0], values.shape[2])

    monkeypatch.setattr(attention, 'attend_block', forgetful)
    reason = use_if_right(model, FusedChunks(model), lambda x: difference(model, x), 1e-3)
    assert reason.startswith('attention of chunks: off by')
    assert not model.context.block_kernel


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

    class Forgetful:
        name, applies = 'forgetful', True

        def use(self) -> None:
            monkeypatch.setattr(Tensor, 'index_copy_', lambda self, *_: self)

        def use_plain(self) -> None:
            self.undo()

        def undo(self) -> None:
            monkeypatch.undo()

    assert difference(model, Forgetful()) > 0.01


def test_a_cpu_without_numba_runs_the_models_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_check, 'find_spec', lambda _: None)
    model, _, _ = with_reference(tiny_model('llama'))
    own = [type(m) for m in model.model.modules()]
    assert use_fused_layers(model) == []
    assert [type(m) for m in model.model.modules()] == own
    assert not model.lora_mapping.fused

