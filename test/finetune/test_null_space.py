# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Learning changes nothing along the directions in which most inputs of a layer lie."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.families import ALPHA, RANK, tiny_model
from support.finetuning import samples
import torch
from torch import Tensor

from mace_ros.finetune.null_space import InputSubspace
from mace_ros.finetune.step import FinetuneStep, Trainer
from mace_ros.model.lora import LoRAManager, MergedLinear, TRAINING_SLOT
from mace_ros.model.packed_model import PackedModel

SPARED = 3


@pytest.fixture
def model() -> PackedModel:
    return PackedModel(tiny_model('llama'), kv_tokens=1024)


@pytest.fixture
def bank(model: PackedModel) -> LoRAManager:
    return LoRAManager(model.groups, targets='all-linear', rank=RANK, alpha=ALPHA, slots=1,
                       spared=SPARED)


def run(step: FinetuneStep) -> None:
    while not step.done:
        step.run_segment()


def found(model: PackedModel, bank: LoRAManager,
          piece_tokens: int | None = None) -> dict[MergedLinear, Tensor]:
    """Return the main directions of the inputs that some samples make."""
    bank.reset()
    directions = InputSubspace(bank.spared)
    run(FinetuneStep(model, Trainer(bank, 1e-2), samples(5), learns=False,
                     directions=directions, piece_tokens=piece_tokens))
    return dict(directions.found())


def learn(model: PackedModel, bank: LoRAManager) -> None:
    trainer = Trainer(bank, 1e-2)
    for seed in range(3):
        run(FinetuneStep(model, trainer, samples(seed)))


def changes(groups: Iterator[MergedLinear]) -> dict[MergedLinear, Tensor]:
    """Return what the adapter adds to each group's weights."""
    return {group: b.t() @ a for group in groups for a, b in [group.slot(TRAINING_SLOT)]}


def test_they_are_those_of_all_inputs_at_once(model: PackedModel, bank: LoRAManager) -> None:
    """A singular value decomposition finds the same ones."""
    group, width = model.groups[0], model.groups[0].weight.shape[1]
    torch.manual_seed(0)
    inputs = (torch.randn(300, SPARED) * torch.tensor([9.0, 7.0, 5.0])) @ torch.randn(SPARED, width)
    inputs += 0.01 * torch.randn(300, width)
    directions = InputSubspace(bank.spared)
    for part in inputs.split(70):
        directions.watch(group, part[None])
    (of, basis), = directions.found()
    main = torch.linalg.svd(inputs, full_matrices=False).Vh[:SPARED]
    assert of is group and basis.shape == (width, SPARED)
    torch.testing.assert_close(basis.t() @ basis, torch.eye(SPARED), atol=1e-5, rtol=0.0)
    assert float((main @ basis).square().sum()) == pytest.approx(SPARED, rel=1e-3)


def test_learning_changes_nothing_along_them(model: PackedModel, bank: LoRAManager) -> None:
    directions = found(model, bank)
    assert set(directions) == {g for g in model.groups if g.adapted}
    for group, basis in directions.items():
        bank.spare(group, basis)
    bank.reset()
    learn(model, bank)
    for group, change in changes(iter(directions)).items():
        assert float((change @ directions[group]).norm()) < 1e-3 * float(change.norm())


def test_layers_in_chunks_show_the_same(model: PackedModel, bank: LoRAManager) -> None:
    whole, chunks = found(model, bank), found(model, bank, piece_tokens=16)
    for group, basis in whole.items():
        torch.testing.assert_close(chunks[group].abs(), basis.abs(), atol=1e-3, rtol=1e-3)


def test_a_version_of_before_keeps_what_it_knows(model: PackedModel, bank: LoRAManager) -> None:
    """It goes on looking along them as it did, and no more than that."""
    learn(model, bank)
    version = bank.export()
    directions = found(model, bank)
    for group, basis in directions.items():
        bank.spare(group, basis)
    bank.load(version)
    bank.project_update()
    for name, tensor in bank.export().items():
        torch.testing.assert_close(tensor, version[name], atol=1e-6, rtol=1e-5)
    before = {g: [m.a @ basis for m in g.adapted if m.a is not None]
              for g, basis in directions.items()}
    learn(model, bank)
    assert any(not torch.equal(t, version[n]) for n, t in bank.export().items() if 'lora_A' in n)
    for group, basis in directions.items():
        for member, look in zip(group.adapted, before[group], strict=True):
            assert member.a is not None
            torch.testing.assert_close(member.a @ basis, look, atol=1e-5, rtol=1e-4)


def test_never_too_many_are_spared() -> None:
    """A sixteenth of an input's directions at most; the memory that they take is known before."""
    model = PackedModel(tiny_model('llama'), kv_tokens=1024)
    bank = LoRAManager(model.groups, targets='down_proj', rank=RANK, alpha=ALPHA, slots=1,
                       spared=4096)
    directions = found(model, bank)
    assert directions.keys() == {g for g in bank.groups if g.adapted}
    assert all(basis.shape == (g.weight.shape[1], g.weight.shape[1] // 16)
               for g, basis in directions.items())
    assert bank.spared_nbytes == sum(basis.nbytes for basis in directions.values())
