# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A fine-tune step that is cut into pieces computes what PEFT and autograd compute at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import copy
from dataclasses import replace
from functools import partial
import gc
from itertools import accumulate
import math
from pathlib import Path
import random

from families import (
    CONTEXT,
    gradients,
    lora_config,
    publish,
    random_adapter,
    relative_error,
    TARGETS,
    tiny_model,
    VOCABULARY,
    WINDOW,
    with_reference,
)
from peft import get_peft_model, PeftModel
from peft.utils import set_peft_model_state_dict
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mace_ros.execution import finetune
from mace_ros.execution.finetune import FinetuneStep, Trainer, Whole
from mace_ros.execution.hybrid import HybridModel
from mace_ros.execution.lora import AdapterBank, BASE_SLOT, FIRST_SERVED_SLOT, TRAINING_SLOT
from mace_ros.execution.sample import packed_tokens, Preference, Sample, shared_tokens
from mace_ros.execution.spans import Span
from mace_ros.execution.static_layers import StaticLayers
from mace_ros.memory.block_pool import BLOCK_TOKENS, BlockPool
from mace_ros.scheduling.plan import SegmentKind

TOLERANCE = 1e-4

Drive = Callable[[FinetuneStep], None]   # does a step's forward in some way


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products are slower on more threads, and very slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def samples(seed: int = 0, lengths: Sequence[int] = (40, 9, 2, 61)) -> list[Sample]:
    """Return samples of several lengths, unweighted at first, then of different weights."""
    rng = random.Random(seed)
    result = []
    for length in lengths:
        prompt = length // 3
        weights = [0.0] * prompt + [rng.choice((0.5, 1.0, 2.0)) for _ in range(length - prompt)]
        result.append(Sample(tuple(rng.randrange(VOCABULARY) for _ in range(length)),
                             tuple(weights)))
    return result


def alike(*, shared: int = 19) -> list[Sample]:
    """Return samples that begin with the same tokens, some of them with no other prompt."""
    begin = tuple(random.Random(7).randrange(VOCABULARY) for _ in range(shared))
    return [Sample((*begin, *s.tokens), (*(0.0 for _ in begin), *s.weights))
            for s in samples(lengths=(30, 9, 2, 41, 2))]


def as_peft(reference: PreTrainedModel, bank: AdapterBank, tensors: dict[str, Tensor],
            ) -> PeftModel:
    """Return PEFT's model with the same adapter, ready to be trained."""
    peft = get_peft_model(copy.deepcopy(reference), lora_config(bank))
    loaded = set_peft_model_state_dict(peft, tensors)
    assert not loaded.unexpected_keys
    return peft


def loss_of(peft: PeftModel, batch: Sequence[Sample]) -> Tensor:
    """Return the weighted mean cross-entropy, one sample at a time."""
    total, normaliser = torch.zeros(()), 0.0
    for sample in batch:
        logits = peft(input_ids=torch.tensor([sample.tokens])).logits[0].float()
        losses = torch.nn.functional.cross_entropy(
            logits[:-1], torch.tensor(sample.tokens[1:]), reduction='none')
        weights = torch.tensor(sample.weights[1:])
        total, normaliser = total + (losses * weights).sum(), normaliser + float(weights.sum())
    return total / normaliser


def gradients_of(bank: AdapterBank) -> dict[str, Tensor]:
    """Return the gradients that the master weights hold."""
    return {name: parameter.grad for name, parameter
            in zip(bank.export(), bank.parameters(), strict=True) if parameter.grad is not None}


def run_until_optimizer(step: FinetuneStep) -> None:
    while next(iter(step.segments())).kind is not SegmentKind.OPTIMIZER:
        step.run_segment()


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor],
                tolerance: float = TOLERANCE) -> None:
    assert ours.keys() == theirs.keys()
    errors = {name: relative_error(ours[name], theirs[name]) for name in theirs}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < tolerance, f'{worst}: {errors[worst]:.2g}'


# -- ways to do a step's forward ---------------------------------------------------------


def alone(step: FinetuneStep) -> None:
    """Leave it all to the segments."""


def ride(*sizes: int) -> Drive:
    """Ride alone, in chunks of these sizes by turns."""
    def drive(step: FinetuneStep) -> None:
        pool = BlockPool(step.model.kv_blocks, BLOCK_TOKENS)
        step.hold_blocks([pool.allocate(n) for n in step.kv_tokens])
        turn = 0
        while step.ridable_tokens:
            rows = step.rows(min(sizes[turn % len(sizes)], step.ridable_tokens))
            step.model.run((), rows)
            step.rode(rows.tokens)
            turn += 1
        step.take_blocks()
    return drive


def ride_among_requests(step: FinetuneStep) -> None:
    """Ride beside prefill chunks and decode rows of requests under other adapters."""
    rng = random.Random(2)
    pool = BlockPool(step.model.kv_blocks, BLOCK_TOKENS)
    rng.shuffle(pool._empty)
    step.hold_blocks([pool.allocate(n) for n in step.kv_tokens])
    texts = [[rng.randrange(VOCABULARY) for _ in range(60)] for _ in range(3)]
    tables, computed = [pool.allocate(60) for _ in texts], [0, 0, 0]
    while step.ridable_tokens:
        spans = []
        for i, slot in enumerate((BASE_SLOT, FIRST_SERVED_SLOT, FIRST_SERVED_SLOT + 1)):
            tokens = texts[i][computed[i]:computed[i] + rng.choice((1, 1, 9))]
            if tokens:
                spans.append(Span(tokens, computed[i], tables[i], slot, True))
                computed[i] += len(tokens)
        rng.shuffle(spans)
        rows = step.rows(min(rng.choice((1, 7, 15)), step.ridable_tokens))
        step.model.run(spans, rows)
        step.rode(rows.tokens)
    step.take_blocks()


DRIVES: dict[str, tuple[Drive, bool]] = {
    'alone, graphs kept': (alone, True),
    'alone, recomputed': (alone, False),
    'ridden by 1': (ride(1), True),
    'ridden by 7': (ride(7), True),
    'ridden by 33': (ride(33), True),
    'ridden whole': (ride(1000), True),
    'ridden by 50, 1, 8': (ride(50, 1, 8), False),
    'ridden among requests': (ride_among_requests, True),
}


def check_gradients(family: str, drive: Drive, *, keep_graphs: bool = True,
                    targets: str = 'all-linear', static: Sequence[int] = (),
                    batch: Sequence[Sample] = (), piece_tokens: int | None = None) -> None:
    batch = batch or samples()
    model, bank, reference = with_reference(tiny_model(family), targets=targets)
    model.static_layers += [StaticLayers(model, tokens) for tokens in static]
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
    hard, soft = samples(2, [20, 9]), teacher.taught()
    step = FinetuneStep(model, Trainer(bank, 1e-3), [hard[0], *soft, hard[1]], head_tokens=10)

    run_until_optimizer(step)

    peft = as_peft(reference, bank, tensors)
    loss = torch.zeros(())
    for sample in step.samples:
        logits = peft(input_ids=torch.tensor([sample.tokens])).logits[0]
        weights = torch.tensor(sample.weights[1:])
        rows = weights.nonzero()[:, 0]
        log_p = torch.log_softmax(logits[:-1][rows], 1)
        if sample.teacher is None:
            each = -log_p.gather(1, torch.tensor(sample.tokens[1:])[rows, None])[:, 0]
        else:
            each = -(log_p.gather(1, sample.teacher.tokens)
                     * sample.teacher.probabilities).sum(1)
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
        patch.setattr(finetune, 'TEACHER_TOKENS', VOCABULARY)     # nothing is left out
        whole = FinetuneStep(model, trainer, samples(), learns=False)
        while not whole.done:
            whole.run_segment()
    norms = []
    for batch in (whole.taught(), teacher.taught(), samples()):
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
    model.static_layers += [StaticLayers(model, tokens) for tokens in static]
    tensors = random_adapter(bank, 0)
    trainer, batch = Trainer(bank, 1e-3), samples()
    whole = Whole(weight=math.fsum(w for s in batch for w in s.weights[1:]),
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


# -- the optimizer, and what is published ------------------------------------------------


def trained(family: str, batch: Sequence[Sample], steps: int, rate: float,
            ) -> tuple[HybridModel, AdapterBank, PreTrainedModel, dict[str, Tensor], FinetuneStep]:
    """Run whole steps; return also the adapter at their beginning, and the last step."""
    model, bank, reference = with_reference(tiny_model(family))
    tensors = random_adapter(bank, 0)
    trainer = Trainer(bank, rate)
    for i in range(steps):
        step = FinetuneStep(model, trainer, batch, keep_graphs=i % 2 == 0)
        if i % 3 == 0:
            ride(23)(step)
        while not step.done:
            step.run_segment()
    return model, bank, reference, tensors, step


def test_three_steps_move_the_weights_as_adamw_moves_those_of_peft() -> None:
    batch = samples()
    _, bank, reference, start, _ = trained('llama', batch, steps=3, rate=1e-3)

    peft = as_peft(reference, bank, start)
    optimizer = torch.optim.AdamW(
        [p for p in peft.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(peft, batch).backward()
        optimizer.step()
    end = {name.replace('.default.', '.'): p.detach()
           for name, p in peft.named_parameters() if p.requires_grad}
    ours = bank.export()
    assert_same({n: ours[n] - start[n] for n in ours}, {n: end[n] - start[n] for n in end}, 1e-2)
    assert_same(ours, end)


@pytest.mark.parametrize('family', ['llama', 'phi3', 'gemma3', 'gpt-neox'])
def test_published_adapter_answers_in_peft_as_here(family: str, tmp_path: Path) -> None:
    batch = samples(3, (40, 25))
    model, bank, reference, _, _ = trained(family, batch, steps=2, rate=1e-2)
    bank.write_slot(FIRST_SERVED_SLOT)
    prompt = list(batch[0].tokens[:WINDOW + 5])
    answers = {}
    for slot in (FIRST_SERVED_SLOT, BASE_SLOT):
        answer: list[int] = []
        span = Span(prompt, 0, [2, 0, 1], slot, True)
        while len(answer) < 20:
            answer.append(int(model.run([span])[0].argmax()))
            span = Span(answer[-1:], len(prompt) + len(answer) - 1, [2, 0, 1], slot, True)
        answers[slot] = answer

    peft = PeftModel.from_pretrained(reference, str(publish(tmp_path, bank, bank.export())))

    output = peft.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=20)
    assert output[0, len(prompt):].tolist() == answers[FIRST_SERVED_SLOT]
    assert answers[FIRST_SERVED_SLOT] != answers[BASE_SLOT]


def test_adapter_of_another_shape_is_refused() -> None:
    _, bank, _ = with_reference(tiny_model('llama'))
    tensors = bank.export()
    name = next(iter(tensors))
    with pytest.raises(ValueError, match='missing or unknown'):
        bank.load({n: t for n, t in tensors.items() if n != name})
    with pytest.raises(ValueError, match=f'{name} is'):
        bank.load(tensors | {name: tensors[name][:1]})


# -- scores ------------------------------------------------------------------------------


@pytest.mark.parametrize('drive', [alone, ride(7)], ids=['alone', 'ridden'])
def test_scores_are_log_probabilities_by_transformers(drive: Drive) -> None:
    batch = samples()
    model, bank, reference = with_reference(tiny_model('gemma2'))
    tensors = random_adapter(bank, 0)
    step = FinetuneStep(model, Trainer(bank, 1e-3), batch, head_tokens=6)
    drive(step)
    while not step.scored:
        step.run_segment()

    peft = as_peft(reference, bank, tensors)
    for sample, score in zip(batch, step.scores(), strict=True):
        with torch.no_grad():
            logits = peft(input_ids=torch.tensor([sample.tokens])).logits[0]
        places = [i for i in range(1, len(sample.tokens)) if sample.weights[i]]
        log_probabilities, margins = [], []
        for i in places:
            row, token = logits[i - 1], sample.tokens[i]
            log_probabilities.append(float(row.log_softmax(-1)[token]))
            others = torch.cat([row[:token], row[token + 1:]])
            margins.append(float(row[token] - others.max()))
        assert score.tokens == len(places)
        assert score.log_probability == pytest.approx(
            sum(log_probabilities) / len(places), rel=1e-4)
        assert score.margin == pytest.approx(min(margins), abs=1e-3)
        assert score.exact == (min(margins) > 0)


def test_what_is_learned_is_exact_and_is_what_greedy_decoding_gives() -> None:
    sample = samples(4, (12,))[0]
    model, _, _, _, step = trained('qwen3', [sample], steps=40, rate=1e-2)
    score = step.scores()[0]
    assert score.exact
    assert score.margin > 0
    prompt = len(sample.tokens) // 3
    answer: list[int] = []
    for i in range(prompt, len(sample.tokens)):
        known = [*sample.tokens[:prompt], *answer]
        logits = model.run([Span(known, 0, [0], TRAINING_SLOT, True)])
        answer.append(int(logits[0].argmax()))
        assert len(known) == i
    assert tuple(answer) == sample.tokens[prompt:]


# -- a step's course ---------------------------------------------------------------------


def test_nothing_rides_once_the_step_runs_alone() -> None:
    model, bank, _ = with_reference(tiny_model('llama'))
    step = FinetuneStep(model, Trainer(bank, 1e-3), samples())
    assert step.ridable_tokens == step.tokens == 112
    assert step.kv_tokens == (40, 9, 2, 61)
    while not step.done:
        step.run_segment()
        assert step.ridable_tokens == 0
        assert step.kv_tokens == ()


def test_no_segment_runs_before_all_tokens_rode() -> None:
    model, bank, _ = with_reference(tiny_model('llama'))
    step = FinetuneStep(model, Trainer(bank, 1e-3), samples(), head_tokens=1000)
    step.hold_blocks([[0, 1, 2], [3], [4], [5, 6, 7, 8]])
    for tokens in (45, 66, 1):
        assert len(list(step.segments())) == (8 if tokens == 45 else 0)
        with pytest.raises(ValueError, match='asked to ride'):
            step.rows(step.ridable_tokens + 1)
        rows = step.rows(tokens)
        model.run((), rows)
        step.rode(rows.tokens)
    assert step.ridable_tokens == 0
    assert [s.kind for s in step.segments()] == [
        SegmentKind.HEAD, *[SegmentKind.BACKWARD_RECOMPUTED] * 3, SegmentKind.OPTIMIZER]


def test_a_step_without_anything_to_learn_is_refused() -> None:
    model, bank, _ = with_reference(tiny_model('llama'))
    with pytest.raises(ValueError, match='all weights are 0'):
        FinetuneStep(model, Trainer(bank, 1e-3), [Sample((5, 6, 7), (1.0, 0.0, 0.0))])


def test_gradients_that_are_not_finite_change_nothing() -> None:
    model, bank, _ = with_reference(tiny_model('llama'))
    tensors = random_adapter(bank, 0)
    step = FinetuneStep(model, Trainer(bank, 1e-3), [Sample((5, 6, 7), (0.0, 1.0, math.inf))])
    while not step.done:
        step.run_segment()
    assert all(torch.equal(t, tensors[n]) for n, t in bank.export().items())
    assert not gradients_of(bank)


def live_bytes() -> int:
    gc.collect()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in gc.get_objects() if issubclass(type(t), Tensor)}
    return sum(storages.values())


@pytest.mark.parametrize('way', ['alone, graphs kept', 'alone, recomputed', 'ridden by 33'])
def test_a_finished_step_holds_no_tensors_but_its_scores(way: str) -> None:
    drive, keep_graphs = DRIVES[way]
    model, bank, _ = with_reference(tiny_model('mistral'))
    trainer = Trainer(bank, 1e-3)

    def finished() -> FinetuneStep:
        step = FinetuneStep(model, trainer, samples(), keep_graphs=keep_graphs)
        drive(step)
        while not step.done:
            step.run_segment()
        return step

    finished()   # the optimizer allocates its state
    before = live_bytes()
    steps = [finished() for _ in range(3)]
    assert live_bytes() - before < 3 * 4096
    assert all(s.scored for s in steps)


def peak_bytes(compute: Callable[[], object]) -> int:
    """Return the most memory that PyTorch's allocator held at once beyond what it held before."""
    with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        compute()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    changes = sorted((e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events()
                     if e.name() == '[memory]')
    return max(accumulate(change for _, change in changes))


def test_recomputing_takes_a_quarter_of_the_memory_that_peft_takes() -> None:
    batch = samples(lengths=[CONTEXT])
    model, bank, reference = with_reference(tiny_model('llama', num_hidden_layers=16))
    peft = as_peft(reference, bank, random_adapter(bank, 0)).train()
    trainer = Trainer(bank, 1e-3)

    def step(keep_graphs: bool) -> None:
        trainer.start_backward()
        run_until_optimizer(FinetuneStep(model, trainer, batch, keep_graphs=keep_graphs))

    theirs = peak_bytes(lambda: loss_of(peft, batch).backward())
    kept = peak_bytes(partial(step, True))
    kept_gradients = gradients_of(bank)
    recomputed = peak_bytes(partial(step, False))

    assert recomputed <= 0.25 * theirs
    assert recomputed < kept
    assert_same(gradients_of(bank), gradients(peft))
    for name, gradient in gradients_of(bank).items():
        assert torch.equal(gradient, kept_gradients[name])
