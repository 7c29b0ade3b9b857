# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Updates have no component along the protected input directions of a layer."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from support.families import ALPHA, RANK, tiny_model
from support.finetuning import samples
import torch
from torch import Tensor

from mace_ros.finetune.null_space import InputSubspace
from mace_ros.finetune.step import FinetuneStep
from mace_ros.finetune.trainer import Trainer
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.lora_mapping import TRAINING_SLOT
from mace_ros.model.merged_linear import MergedLinear
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.packing import pack

DIRECTIONS = 3


@pytest.fixture
def model() -> PackedModel:
    return pack(tiny_model('llama'), kv_tokens=1024)


@pytest.fixture
def lora(model: PackedModel) -> LoRAManager:
    return LoRAManager(model.linears, targets='all-linear', rank=RANK, alpha=ALPHA, slots=1,
                       protected_directions=DIRECTIONS)


def run(step: FinetuneStep) -> None:
    while not step.done:
        step.run_segment()


def input_bases(model: PackedModel, lora: LoRAManager,
                chunk_tokens: int | None = None) -> dict[MergedLinear, Tensor]:
    """Return the main input directions of each layer for some samples."""
    lora.reset()
    subspace = InputSubspace(lora.direction_count)
    run(FinetuneStep(model, Trainer(lora, 1e-2), samples(5), learns=False,
                     observer=subspace, chunk_tokens=chunk_tokens))
    return dict(subspace.bases())


def learn(model: PackedModel, lora: LoRAManager) -> None:
    trainer = Trainer(lora, 1e-2)
    for seed in range(3):
        run(FinetuneStep(model, trainer, samples(seed)))


def updates(layers: Iterable[MergedLinear]) -> dict[MergedLinear, Tensor]:
    """Return what the adapter adds to each layer's weights."""
    return {layer: b.t() @ a for layer in layers for a, b in [layer.slot(TRAINING_SLOT)]}


def test_the_basis_spans_the_main_singular_vectors_of_all_inputs(
        model: PackedModel, lora: LoRAManager) -> None:
    layer, width = model.linears[0], model.linears[0].weight.shape[1]
    torch.manual_seed(0)
    inputs = (torch.randn(300, DIRECTIONS) * torch.tensor([9.0, 7.0, 5.0])
              ) @ torch.randn(DIRECTIONS, width)
    inputs += 0.01 * torch.randn(300, width)
    subspace = InputSubspace(lora.direction_count)
    for part in inputs.split(70):
        subspace.observe(layer, part[None])
    (of, basis), = subspace.bases()
    main = torch.linalg.svd(inputs, full_matrices=False).Vh[:DIRECTIONS]
    assert of is layer and basis.shape == (width, DIRECTIONS)
    torch.testing.assert_close(basis.t() @ basis, torch.eye(DIRECTIONS), atol=1e-5, rtol=0.0)
    assert float((main @ basis).square().sum()) == pytest.approx(DIRECTIONS, rel=1e-3)


def test_updates_have_no_component_along_protected_directions(
        model: PackedModel, lora: LoRAManager) -> None:
    bases = input_bases(model, lora)
    assert set(bases) == {layer for layer in model.linears if layer.adapted}
    for layer, basis in bases.items():
        lora.protect(layer, basis)
    for lora.protecting in (True, False):
        lora.reset()
        learn(model, lora)
        along = [float((update @ bases[layer]).norm() / update.norm())
                 for layer, update in updates(bases).items()]
        assert max(along) < 1e-3 if lora.protecting else min(along) > 1e-3


def test_chunked_layers_give_the_same_basis(model: PackedModel, lora: LoRAManager) -> None:
    whole, chunks = input_bases(model, lora), input_bases(model, lora, chunk_tokens=16)
    for layer, basis in whole.items():
        torch.testing.assert_close(chunks[layer].abs(), basis.abs(), atol=1e-3, rtol=1e-3)


def test_a_loaded_version_keeps_its_components_along_protected_directions(
        model: PackedModel, lora: LoRAManager) -> None:
    learn(model, lora)
    version = lora.export()
    bases = input_bases(model, lora)
    for layer, basis in bases.items():
        lora.protect(layer, basis)
    lora.protecting = True
    lora.load(version)
    lora.project_update()
    for name, tensor in lora.export().items():
        torch.testing.assert_close(tensor, version[name], atol=1e-6, rtol=1e-5)
    before = {layer: [s.a @ basis for s in layer.adapted if s.a is not None]
              for layer, basis in bases.items()}
    learn(model, lora)
    assert any(not torch.equal(t, version[n]) for n, t in lora.export().items() if 'lora_A' in n)
    for layer, basis in bases.items():
        for shard, component in zip(layer.adapted, before[layer], strict=True):
            assert shard.a is not None
            torch.testing.assert_close(shard.a @ basis, component, atol=1e-5, rtol=1e-4)


def test_at_most_a_sixteenth_of_the_directions_is_protected() -> None:
    """Their memory is known before they are found."""
    model = pack(tiny_model('llama'), kv_tokens=1024)
    lora = LoRAManager(model.linears, targets='down_proj', rank=RANK, alpha=ALPHA, slots=1,
                       protected_directions=4096)
    bases = input_bases(model, lora)
    assert bases.keys() == {layer for layer in lora.linears if layer.adapted}
    assert all(basis.shape == (layer.weight.shape[1], layer.weight.shape[1] // 16)
               for layer, basis in bases.items())
    assert lora.null_space_nbytes == sum(basis.nbytes for basis in bases.values())
