# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What steps publish, score and hold, from their first segment to the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
import gc
from itertools import accumulate
import math
from pathlib import Path

from peft import PeftModel
import pytest
from support.families import (
    CONTEXT,
    gradients,
    publish,
    random_adapter,
    tiny_model,
    WINDOW,
    with_reference,
)
from support.finetuning import (
    alone,
    as_peft,
    assert_same,
    Drive,
    DRIVES,
    gradients_of,
    loss_of,
    ride,
    run_until_optimizer,
    samples,
)
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mace_ros.finetune.sample import Sample
from mace_ros.finetune.step import FinetuneStep, Trainer
from mace_ros.model.lora import BASE_SLOT, FIRST_SERVED_SLOT, LoRAManager, TRAINING_SLOT
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.spans import Span
from mace_ros.scheduling.plan import SegmentKind

pytestmark = pytest.mark.usefixtures('one_thread')


# -- the optimizer, and what is published ------------------------------------------------


def trained(family: str, batch: Sequence[Sample], steps: int, rate: float,
            ) -> tuple[PackedModel, LoRAManager, PreTrainedModel, dict[str, Tensor], FinetuneStep]:
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
    assert step.piggyback_tokens == step.tokens == 112
    assert step.kv_tokens == (40, 9, 2, 61)
    while not step.done:
        step.run_segment()
        assert step.piggyback_tokens == 0
        assert step.kv_tokens == ()


def test_no_segment_runs_before_all_tokens_rode() -> None:
    model, bank, _ = with_reference(tiny_model('llama'))
    step = FinetuneStep(model, Trainer(bank, 1e-3), samples(), head_tokens=1000)
    step.hold_blocks([[0, 1, 2], [3], [4], [5, 6, 7, 8]])
    for tokens in (45, 66, 1):
        assert len(list(step.segments())) == (8 if tokens == 45 else 0)
        with pytest.raises(ValueError, match='asked to ride'):
            step.rows(step.piggyback_tokens + 1)
        rows = step.rows(tokens)
        model.run((), rows)
        step.piggybacked(rows.tokens)
    assert step.piggyback_tokens == 0
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
