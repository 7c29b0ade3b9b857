# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Steps whose layers CUDA graphs replay have the gradients of eager ones; with fake graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import math
from typing import Any

import pytest
from support.fake_graphs import fake_graph, Results, use_fake_graphs
from support.families import random_adapter, tiny_model, with_reference
from support.finetuning import (
    assert_same,
    DRIVES,
    gradients_of,
    prefixes_of,
    run_until_optimizer,
    samples,
    samples_with_prefixes,
)
import torch
from torch import Tensor

from mace_ros.finetune.sample import Sample
from mace_ros.finetune.step import FinetuneStep
from mace_ros.finetune.trainer import AccumulationWindow, Trainer
from mace_ros.model import graphed_layers
from mace_ros.model.graph_capture import capture
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.packed_model import PackedModel
from mace_ros.scheduling.plan import SegmentKind

pytestmark = pytest.mark.usefixtures('one_thread')

BATCHES: tuple[Sequence[Sample], ...] = (samples(), samples(1, (20, 30)), samples_with_prefixes())


@pytest.fixture
def model_and_lora() -> tuple[PackedModel, LoRAManager]:
    model, lora, _ = with_reference(tiny_model('gemma2'))
    random_adapter(lora, 0)
    return model, lora


def capture_steps(model: PackedModel, monkeypatch: pytest.MonkeyPatch,
                  captured: Callable[..., Any] = fake_graph) -> None:
    use_fake_graphs(monkeypatch)
    monkeypatch.setattr(graphed_layers, 'captured', captured)
    report = capture(model, max_rows=1, max_tokens=16, max_context=16,
                     time_left=lambda: 1.0, free_bytes=lambda: 1.0)
    assert (report.steps, report.failures) == ([64, 128], [])


@pytest.mark.parametrize('way', DRIVES)
def test_captured_layers_have_the_gradients_of_eager_ones(
        model_and_lora: tuple[PackedModel, LoRAManager], way: str,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after other steps and other layers, since they all use the same memory."""
    model, lora = model_and_lora
    drive, keep_graphs = DRIVES[way]
    trainer = Trainer(lora, 1e-3)

    def gradients(batch: Sequence[Sample]) -> dict[str, Tensor]:
        step = FinetuneStep(model, trainer, batch, keep_graphs=keep_graphs,
                            prefixes=prefixes_of(model, batch))
        drive(step)
        run_until_optimizer(step)
        return {name: x.clone() for name, x in gradients_of(lora).items()}

    expected = [gradients(batch) for batch in BATCHES]
    capture_steps(model, monkeypatch)
    for _ in range(2):
        for batch, theirs in zip(BATCHES, expected, strict=True):
            assert_same(gradients(batch), theirs)


@pytest.mark.parametrize('keep_graphs', [False, True])
def test_captured_layers_update_the_weights_as_eager_ones_do(
        model_and_lora: tuple[PackedModel, LoRAManager], keep_graphs: bool,
        monkeypatch: pytest.MonkeyPatch) -> None:
    model, lora = model_and_lora
    before = lora.export()

    def updates_of_two_steps() -> dict[str, Tensor]:
        lora.load(before)
        trainer = Trainer(lora, 1e-2)
        for batch in BATCHES[:2]:
            step = FinetuneStep(model, trainer, batch, keep_graphs=keep_graphs)
            while not step.done:
                step.run_segment()
        return {name: x - before[name] for name, x in lora.export().items()}

    expected = updates_of_two_steps()
    capture_steps(model, monkeypatch)
    # AdamW makes a large update of a gradient that is 0 but for rounding.
    assert_same(updates_of_two_steps(), expected, tolerance=0.05)


def test_gradients_of_parts_accumulate_although_each_replay_overwrites_its_own(
        model_and_lora: tuple[PackedModel, LoRAManager],
        monkeypatch: pytest.MonkeyPatch) -> None:
    model, lora = model_and_lora
    trainer, batch = Trainer(lora, 1e-3), samples()
    run_until_optimizer(FinetuneStep(model, trainer, batch, keep_graphs=False))
    expected = {name: x.clone() for name, x in gradients_of(lora).items()}
    capture_steps(model, monkeypatch)
    weight = math.fsum(w for s in batch for w in s.weights[1:])
    found: dict[str, Tensor] = {}
    monkeypatch.setattr(torch.optim.AdamW, 'step', lambda self: found.update(gradients_of(lora)))
    for k, sample in enumerate(batch):
        step = FinetuneStep(model, trainer, [sample], keep_graphs=k % 2 == 1, window=(
            AccumulationWindow(weight, sum(len(s.tokens) for s in batch), begins=k == 0,
                               ends=k == len(batch) - 1)))
        while not step.done:
            step.run_segment()
    assert_same(found, expected)


@pytest.mark.parametrize('learns', [False, True])
def test_a_step_amid_the_backward_of_another_changes_no_gradients(
        model_and_lora: tuple[PackedModel, LoRAManager], learns: bool,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """It overwrites masks, and what captured layers have kept."""
    model, lora = model_and_lora
    trainer = Trainer(lora, 1e-3)
    run_until_optimizer(FinetuneStep(model, trainer, samples()))
    expected = {name: x.clone() for name, x in gradients_of(lora).items()}
    capture_steps(model, monkeypatch)
    step = FinetuneStep(model, trainer, samples())
    while next(step.segments()).kind is not SegmentKind.BACKWARD:
        step.run_segment()
    step.run_segment()
    other = FinetuneStep(model, trainer, samples(1, (50, 30, 11)), learns=learns)
    for _ in range(2):
        other.run_segment()
    run_until_optimizer(step)
    assert_same(gradients_of(lora), expected)


def test_a_recomputed_layer_is_one_replay(
        model_and_lora: tuple[PackedModel, LoRAManager],
        monkeypatch: pytest.MonkeyPatch) -> None:
    model, lora = model_and_lora
    replays: list[object] = []

    def counted(compute: Callable[[], Results], *places: Any) -> Any:
        replay, result = fake_graph(compute, *places)
        return lambda: (replays.append(compute), replay()), result

    capture_steps(model, monkeypatch, counted)
    step = FinetuneStep(model, Trainer(lora, 1e-3), samples())
    DRIVES['piggybacked whole'][0](step)
    replays.clear()
    run_until_optimizer(step)
    assert len(replays) == len(set(replays)) == len(model.layers)
