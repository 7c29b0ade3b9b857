# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A fine-tune step that is cut into pieces computes what PEFT and autograd compute at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
import math

import pytest
from support.families import (
    gradients,
    random_adapter,
    relative_error,
    TARGETS,
    tiny_model,
    VOCABULARY,
    with_reference,
)
from support.finetuning import (
    alike,
    alone,
    as_peft,
    assert_same,
    Drive,
    DRIVES,
    gradients_of,
    loss_of,
    ride_among_requests,
    run_until_optimizer,
    samples,
    TOLERANCE,
)
import torch
from torch import Tensor

from mace_ros.finetune import step as finetune_step
from mace_ros.finetune.sample import packed_tokens, Preference, Sample, shared_tokens
from mace_ros.finetune.step import AccumulationWindow, FinetuneStep, Trainer
from mace_ros.model.graphed_layers import GraphedLayers
from mace_ros.model.lora import BASE_SLOT, FIRST_SERVED_SLOT, TRAINING_SLOT
from mace_ros.model.spans import Span
from mace_ros.scheduling.plan import SegmentKind

pytestmark = pytest.mark.usefixtures('one_thread')


def check_gradients(family: str, drive: Drive, *, keep_graphs: bool = True,
                    targets: str = 'all-linear', static: Sequence[int] = (),
                    batch: Sequence[Sample] = (), piece_tokens: int | None = None) -> None:
    batch = batch or samples()
    model, bank, reference = with_reference(tiny_model(family), targets=targets)
    model.graphed_layers += [GraphedLayers(model, tokens) for tokens in static]
    for slot in (FIRST_SERVED_SLOT, FIRST_SERVED_SLOT + 1):
        random_adapter(bank, slot)
        bank.write_slot(slot)
    tensors = random_adapter(bank, 0)
    step = FinetuneStep(model, Trainer(bank, 1e-3), batch, head_tokens=10, keep_graphs=keep_graphs,
                        piece_tokens=piece_tokens)
    assert step.tokens == packed_tokens(batch)
    if piece_tokens is not None:
        layers = [s.tokens for s in step.segments()
                  if s.kind not in (SegmentKind.HEAD, SegmentKind.OPTIMIZER)]
        assert max(layers) <= piece_tokens
        assert sum(layers) == 2 * len(model.layers) * step.tokens

    drive(step)
    run_until_optimizer(step)

    peft = as_peft(reference, bank, tensors)
    loss_of(peft, batch).backward()
    assert_same(gradients_of(bank), gradients(peft))


# -- gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize('way', DRIVES)
@pytest.mark.parametrize('family', ['llama', 'gemma3', 'gpt-oss', 'opt'])
def test_gradients_of_sequences_behind_one_mask(
        family: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 a CPU has few tokens attend so."""
    monkeypatch.setattr(finetune_step, 'are_few', lambda *_: True)
    drive, keep_graphs = DRIVES[way]

    def behind_one_mask(step: FinetuneStep) -> None:
        assert not step._row.is_plain(None)
        drive(step)

    for batch in (samples(), alike()):
        check_gradients(family, behind_one_mask, keep_graphs=keep_graphs, batch=batch,
                        targets=TARGETS.get(family, 'all-linear'))


@pytest.mark.parametrize('way', DRIVES)
def test_gradients_are_those_of_peft(way: str) -> None:
    drive, keep_graphs = DRIVES[way]
    check_gradients('llama', drive, keep_graphs=keep_graphs)


@pytest.mark.parametrize('way', ['alone, graphs kept', 'ridden among requests'])
@pytest.mark.parametrize('tokens', [112, 150])
@pytest.mark.parametrize('family', ['llama', 'gemma2', 'gemma3', 'phi3', 'opt'])
def test_gradients_of_layers_at_fixed_addresses(family: str, tokens: int, way: str) -> None:
    check_gradients(family, DRIVES[way][0], static=[16, tokens])


@pytest.mark.parametrize('way', ['alone, graphs kept', 'ridden among requests'])
@pytest.mark.parametrize('family', [
    'gemma2', 'gemma3', 'mistral', 'phi3', 'phi3-longrope', 'olmo', 'olmo2', 'granite', 'cohere2',
    'gpt-neox', 'starcoder2', 'glm', 'qwen3-moe', 'gpt-oss', 'deepseek-v2', 'opt'])
def test_gradients_are_those_of_peft_in_each_family(family: str, way: str) -> None:
    check_gradients(family, DRIVES[way][0], targets=TARGETS.get(family, 'all-linear'))


@pytest.mark.parametrize('way', DRIVES)
@pytest.mark.parametrize('family', ['llama', 'gemma2', 'gemma3', 'gpt-oss', 'opt'])
def test_gradients_of_prompts_that_begin_alike(family: str, way: str) -> None:
    """What they have in common is computed once, and learned from as often as it is there."""
    batch = alike()
    assert packed_tokens(batch) == sum(len(s.tokens) for s in batch) - 4 * 19
    drive, keep_graphs = DRIVES[way]
    check_gradients(family, drive, keep_graphs=keep_graphs, batch=batch,
                    targets=TARGETS.get(family, 'all-linear'))


@pytest.mark.parametrize('way', ['alone, graphs kept', 'ridden among requests'])
def test_gradients_of_prompts_that_begin_alike_at_fixed_addresses(way: str) -> None:
    check_gradients('gemma2', DRIVES[way][0], static=[110], batch=alike())


FAMILIES = (
    'llama', 'gemma2', 'gemma3', 'mistral', 'phi3', 'phi3-longrope', 'olmo2', 'cohere2', 'gpt-neox',
    'glm', 'qwen3-moe', 'gpt-oss', 'deepseek-v2', 'opt')
ONE = tuple(samples(lengths=(90,)))


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('batch', [ONE, tuple(samples()), tuple(alike())],
                         ids=['one', 'several', 'alike'])
def test_gradients_of_layers_in_chunks(family: str, batch: Sequence[Sample]) -> None:
    check_gradients(family, alone, batch=batch, piece_tokens=33, static=[150],
                    targets=TARGETS.get(family, 'all-linear'))


@pytest.mark.parametrize('piece_tokens', [1, 7, 45, 89])
def test_gradients_of_one_long_sample_in_chunks_of_any_size(piece_tokens: int) -> None:
    check_gradients('llama', alone, batch=ONE, piece_tokens=piece_tokens)


@pytest.mark.parametrize('after', [1, 3, 5, 11, 16, 18])
def test_a_step_in_chunks_begins_anew_wherever_it_was(after: int) -> None:
    def interrupted(step: FinetuneStep) -> None:
        for _ in range(after):
            step.run_segment()
        assert step.restart()

    check_gradients('llama', interrupted, batch=ONE, piece_tokens=33)


def test_what_is_scored_in_chunks_has_the_same_scores() -> None:
    model, bank, _ = with_reference(tiny_model('llama'))
    random_adapter(bank, 0)
    found = []
    for piece_tokens in (None, 20):
        step = FinetuneStep(model, Trainer(bank, 1e-3), samples(), learns=False,
                            piece_tokens=piece_tokens)
        while not step.done:
            step.run_segment()
        found.append(step.scores())
    for whole, chunked in zip(*found, strict=True):
        assert chunked.log_probability == pytest.approx(whole.log_probability, rel=1e-5)
        assert (chunked.tokens, chunked.exact) == (whole.tokens, whole.exact)


def test_what_begins_alike_is_known_by_its_prompts_alone() -> None:
    one, two = (1,) * 20 + (2, 3), (1,) * 20 + (2, 4)
    late, early = (0.0,) * 20 + (1.0, 1.0), (0.0,) * 12 + (1.0,) * 10
    assert shared_tokens([Sample(one, late), Sample(two, late)]) == 20
    assert shared_tokens([Sample(one, late), Sample(two, early)]) == 12
    assert shared_tokens([Sample(one, late), Sample(one, late)]) == 20
    assert shared_tokens([Sample(one, late)]) == 0
    assert shared_tokens([Sample(one, late), Sample((5, *two[1:]), late)]) == 0
    nothing = Sample((1,) * 9, (0.0,) * 9)      # one token of each is computed
    assert shared_tokens([nothing, Sample(one, late)]) == 8


@pytest.mark.parametrize('way', ['alone, recomputed', 'ridden by 7'])
@pytest.mark.parametrize('imitation', [0.0, 0.5])
def test_gradients_of_preferences(way: str, imitation: float) -> None:
    """Two couples of sequences, of which the first is preferred, beside one that is learned."""
    drive, keep_graphs = DRIVES[way]
    model, bank, reference = with_reference(tiny_model('llama'))
    tensors = random_adapter(bank, 0)
    batch = [Sample(s.tokens, tuple(float(w > 0.0) for w in s.weights))
             for s in samples(3, [20, 30, 9, 12, 25])]
    pairs = [Preference(0, 1, reference=-3.0, beta=0.3), Preference(4, 2, reference=1.0, beta=0.3)]
    step = FinetuneStep(model, Trainer(bank, 1e-3), batch, head_tokens=7, keep_graphs=keep_graphs,
                        preferences=pairs, imitation=imitation)

    drive(step)
    run_until_optimizer(step)

    peft = as_peft(reference, bank, tensors)

    def log_p(sample: Sample) -> Tensor:
        logits = peft(input_ids=torch.tensor([sample.tokens])).logits[0]
        each = torch.log_softmax(logits[:-1], 1).gather(1, torch.tensor(sample.tokens[1:])[:, None])
        return (each[:, 0] * torch.tensor(sample.weights[1:])).sum()

    values = [log_p(sample) for sample in batch]
    preferred = torch.stack([
        -torch.nn.functional.logsigmoid(p.beta * (values[p.better] - values[p.worse] - p.reference))
        for p in pairs]).mean()
    imitated = [(0, imitation), (3, 1.0), (4, imitation)]
    learned = (sum(-weight * values[i] for i, weight in imitated)
               / sum(weight * sum(batch[i].weights[1:]) for i, weight in imitated))
    (preferred + learned).backward()
    assert_same(gradients_of(bank), gradients(peft))
    assert [s.log_probability * s.tokens for s in step.scores()] == pytest.approx(
        [float(v.detach()) for v in values], rel=1e-4)


def test_gradients_of_samples_with_a_teacher() -> None:
    model, bank, reference = with_reference(tiny_model('llama'))
    random_adapter(bank, 0)
    teacher = FinetuneStep(model, Trainer(bank, 1e-3), samples(1), learns=False)
    while not teacher.done:
        teacher.run_segment()
    tensors = random_adapter(bank, 1)
    hard, soft = samples(2, [20, 9]), teacher.soft_targets()
    step = FinetuneStep(model, Trainer(bank, 1e-3), [hard[0], *soft, hard[1]], head_tokens=10)

    run_until_optimizer(step)

    peft = as_peft(reference, bank, tensors)
    loss = torch.zeros(())
    for sample in step.samples:
        logits = peft(input_ids=torch.tensor([sample.tokens])).logits[0]
        weights = torch.tensor(sample.weights[1:])
        rows = weights.nonzero()[:, 0]
        log_p = torch.log_softmax(logits[:-1][rows], 1)
        if sample.soft_targets is None:
            each = -log_p.gather(1, torch.tensor(sample.tokens[1:])[rows, None])[:, 0]
        else:
            each = -(log_p.gather(1, sample.soft_targets.tokens)
                     * sample.soft_targets.probabilities).sum(1)
        loss = loss + (each * weights[rows]).sum()
    (loss / sum(sum(s.weights[1:]) for s in step.samples)).backward()
    assert_same(gradients_of(bank), gradients(peft))


def test_a_version_learns_nothing_from_itself() -> None:
    model, bank, _ = with_reference(tiny_model('llama'))
    random_adapter(bank, 0)
    trainer = Trainer(bank, 1e-3)
    teacher = FinetuneStep(model, trainer, samples(), learns=False)
    while not teacher.done:
        teacher.run_segment()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_step, 'SOFT_TARGET_TOKENS', VOCABULARY)     # nothing is left out
        whole = FinetuneStep(model, trainer, samples(), learns=False)
        while not whole.done:
            whole.run_segment()
    norms = []
    for batch in (whole.soft_targets(), teacher.soft_targets(), samples()):
        step = FinetuneStep(model, trainer, batch)
        run_until_optimizer(step)
        norms.append(float(torch.stack([g.norm() for g in gradients_of(bank).values()]).norm()))
    assert norms[0] < 1e-4 * norms[2]
    assert norms[1] < norms[2]


@pytest.mark.parametrize('targets', ['v_proj', 'k_proj,o_proj,down_proj', 'q_proj, up_proj'])
def test_gradients_of_some_layers_only(targets: str) -> None:
    check_gradients('llama', ride_among_requests, targets=targets)


def test_other_passes_between_the_segments_change_nothing() -> None:
    model, bank, reference = with_reference(tiny_model('gemma2'))
    tensors = random_adapter(bank, 0)
    batch = samples()
    step = FinetuneStep(model, Trainer(bank, 1e-3), batch, head_tokens=7)
    ids = list(samples(5, (30,))[0].tokens)
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([ids])).logits[0, [9, 29]]

    while next(iter(step.segments())).kind is not SegmentKind.OPTIMIZER:
        step.run_segment()
        first = model.run([Span(ids[:10], 0, [4, 1], BASE_SLOT, True),
                           Span(ids[:10], 0, [2], TRAINING_SLOT, False)])
        second = model.run([Span(ids[10:], 10, [4, 1], BASE_SLOT, True)])
        assert relative_error(torch.cat([first, second]), expected) < TOLERANCE

    peft = as_peft(reference, bank, tensors)
    loss_of(peft, batch).backward()
    assert_same(gradients_of(bank), gradients(peft))


def test_a_step_given_up_halfway_leaves_nothing_behind() -> None:
    model, bank, reference = with_reference(tiny_model('llama'))
    tensors = random_adapter(bank, 0)
    trainer = Trainer(bank, 1e-3)
    run_until_optimizer(FinetuneStep(model, trainer, samples(1)))
    step = FinetuneStep(model, trainer, samples(2))

    run_until_optimizer(step)

    peft = as_peft(reference, bank, tensors)
    loss_of(peft, samples(2)).backward()
    assert_same(gradients_of(bank), gradients(peft))


@pytest.mark.parametrize('static', [(), (64,)], ids=['eager', 'at fixed addresses'])
def test_the_gradients_of_all_parts_are_those_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, static: Sequence[int],
) -> None:
    model, bank, reference = with_reference(tiny_model('llama'))
    model.graphed_layers += [GraphedLayers(model, tokens) for tokens in static]
    tensors = random_adapter(bank, 0)
    trainer, batch = Trainer(bank, 1e-3), samples()
    whole = AccumulationWindow(weight=math.fsum(w for s in batch for w in s.weights[1:]),
                  tokens=sum(len(s.tokens) for s in batch))

    def part(k: int) -> FinetuneStep:
        return FinetuneStep(model, trainer, [batch[k]], keep_graphs=k != 1, whole=replace(
            whole, begins=k == 0, ends=k == len(batch) - 1))

    def run(step: FinetuneStep) -> None:
        while not step.done:
            step.run_segment()

    run(part(0))         # of a step that was given up
    parts = [part(k) for k in range(len(batch))]
    update, gathered = torch.optim.AdamW.step, {}
    monkeypatch.setattr(torch.optim.AdamW, 'step', lambda self: (
        gathered.update(gradients_of(bank)), update(self)))
    for k, step in enumerate(parts):
        if k == 1:       # requests need its memory: it begins anew
            for _ in range(len(list(step.segments())) - 1):
                step.run_segment()
            assert step.restart()
        run(step)

    peft = as_peft(reference, bank, tensors)
    loss_of(peft, batch).backward()
    assert_same(gathered, gradients(peft))


def test_bfloat16_weights_with_float32_masters() -> None:
    model, bank, reference = with_reference(tiny_model('gemma2').to(torch.bfloat16))
    tensors = random_adapter(bank, 0)
    assert all(p.dtype == torch.float32 for p in bank.parameters())
    step = FinetuneStep(model, Trainer(bank, 1e-3), samples())

    ride_among_requests(step)
    run_until_optimizer(step)

    peft = as_peft(reference.float(), bank, tensors)
    loss_of(peft, samples()).backward()
    ours, theirs = gradients_of(bank), gradients(peft)
    assert all(g.dtype == torch.float32 for g in ours.values())
    assert_same(ours, theirs, tolerance=0.2)
    assert relative_error(*(torch.cat([x[n].flatten() for n in theirs]) for x in (ours, theirs))
                          ) < 0.05
