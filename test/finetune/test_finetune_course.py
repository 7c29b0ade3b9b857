# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Optimizer, scores, segments and memory of fine-tune steps."""

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
    VOCABULARY,
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
    piggyback,
    run_until_optimizer,
    samples,
)
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mace_ros.finetune.sample import Sample
from mace_ros.finetune.step import FinetuneStep
from mace_ros.finetune.trainer import Trainer
from mace_ros.memory.budget import HEAD_ROWS, MIN_HEAD_ROWS
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.lora_mapping import BASE_SLOT, FIRST_SERVED_SLOT, TRAINING_SLOT
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.spans import Span
from mace_ros.scheduling.plan import SegmentKind

pytestmark = pytest.mark.usefixtures('one_thread')


# -- the optimizer, and published adapters ----------------------------------------------


def trained(family: str, batch: Sequence[Sample], steps: int, rate: float,
            ) -> tuple[PackedModel, LoRAManager, PreTrainedModel, dict[str, Tensor], FinetuneStep]:
    """Run whole steps; also return the adapter before them, and the last step."""
    model, lora, reference = with_reference(tiny_model(family))
    tensors = random_adapter(lora, 0)
    trainer = Trainer(lora, rate)
    for i in range(steps):
        step = FinetuneStep(model, trainer, batch, keep_graphs=i % 2 == 0)
        if i % 3 == 0:
            piggyback(23)(step)
        while not step.done:
            step.run_segment()
    return model, lora, reference, tensors, step


def test_optimizer_steps_change_the_weights_as_adamw_with_peft() -> None:
    batch = samples()
    _, lora, reference, start, _ = trained('llama', batch, steps=3, rate=1e-3)

    peft = as_peft(reference, lora, start)
    optimizer = torch.optim.AdamW(
        [p for p in peft.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(peft, batch).backward()
        optimizer.step()
    end = {name.replace('.default.', '.'): p.detach()
           for name, p in peft.named_parameters() if p.requires_grad}
    ours = lora.export()
    assert_same({n: ours[n] - start[n] for n in ours}, {n: end[n] - start[n] for n in end}, 1e-2)
    assert_same(ours, end)


@pytest.mark.parametrize('family', ['llama', 'phi3', 'gemma3', 'gpt-neox'])
def test_a_published_adapter_gives_the_same_response_in_peft(family: str, tmp_path: Path) -> None:
    batch = samples(3, (40, 25))
    model, lora, reference, _, _ = trained(family, batch, steps=2, rate=1e-2)
    lora.write_slot(FIRST_SERVED_SLOT)
    prompt = list(batch[0].tokens[:WINDOW + 5])
    answers = {}
    for slot in (FIRST_SERVED_SLOT, BASE_SLOT):
        answer: list[int] = []
        span = Span(prompt, 0, [2, 0, 1], slot, True)
        while len(answer) < 20:
            answer.append(int(model.run([span])[0].argmax()))
            span = Span(answer[-1:], len(prompt) + len(answer) - 1, [2, 0, 1], slot, True)
        answers[slot] = answer

    peft = PeftModel.from_pretrained(reference, str(publish(tmp_path, lora, lora.export())))

    output = peft.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=20)
    assert output[0, len(prompt):].tolist() == answers[FIRST_SERVED_SLOT]
    assert answers[FIRST_SERVED_SLOT] != answers[BASE_SLOT]


def test_an_adapter_of_another_shape_is_rejected() -> None:
    _, lora, _ = with_reference(tiny_model('llama'))
    tensors = lora.export()
    name = next(iter(tensors))
    with pytest.raises(ValueError, match='missing or unknown'):
        lora.load({n: t for n, t in tensors.items() if n != name})
    with pytest.raises(ValueError, match=f'{name} is'):
        lora.load(tensors | {name: tensors[name][:1]})


# -- scores ------------------------------------------------------------------------------


@pytest.mark.parametrize('drive', [alone, piggyback(7)], ids=['alone', 'piggybacked'])
def test_scores_are_the_log_probabilities_of_transformers(drive: Drive) -> None:
    batch = samples()
    model, lora, reference = with_reference(tiny_model('gemma2'))
    tensors = random_adapter(lora, 0)
    step = FinetuneStep(model, Trainer(lora, 1e-3), batch, head_tokens=6)
    drive(step)
    while not step.scored:
        step.run_segment()

    peft = as_peft(reference, lora, tensors)
    for sample, score in zip(batch, step.scores(), strict=True):
        with torch.no_grad():
            logits = peft(input_ids=torch.tensor([sample.tokens])).logits[0]
        positions = [i for i in range(1, len(sample.tokens)) if sample.weights[i]]
        log_probabilities, margins = [], []
        for i in positions:
            row, token = logits[i - 1], sample.tokens[i]
            log_probabilities.append(float(row.log_softmax(-1)[token]))
            others = torch.cat([row[:token], row[token + 1:]])
            margins.append(float(row[token] - others.max()))
        assert score.tokens == len(positions)
        assert score.log_probability == pytest.approx(
            sum(log_probabilities) / len(positions), rel=1e-4)
        assert score.margin == pytest.approx(min(margins), abs=1e-3)
        assert score.exact == (min(margins) > 0)


def test_an_exact_score_means_that_greedy_decoding_gives_the_sample() -> None:
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


# -- segments ----------------------------------------------------------------------------


def test_no_token_piggybacks_once_the_step_runs_alone() -> None:
    model, lora, _ = with_reference(tiny_model('llama'))
    step = FinetuneStep(model, Trainer(lora, 1e-3), samples())
    assert step.piggyback_tokens == step.tokens == 112
    assert step.kv_tokens == (40, 9, 2, 61)
    while not step.done:
        step.run_segment()
        assert step.piggyback_tokens == 0
        assert step.kv_tokens == ()


def test_segments_wait_until_all_tokens_have_piggybacked() -> None:
    model, lora, _ = with_reference(tiny_model('llama'))
    step = FinetuneStep(model, Trainer(lora, 1e-3), samples(), head_tokens=1000)
    step.hold_blocks([[0, 1, 2], [3], [4], [5, 6, 7, 8]])
    for tokens in (45, 66, 1):
        assert len(list(step.segments())) == (8 if tokens == 45 else 0)
        with pytest.raises(ValueError, match='requested to piggyback'):
            step.piggyback_spans(step.piggyback_tokens + 1)
        spans = step.piggyback_spans(tokens)
        model.run((), spans)
        step.piggybacked(spans.tokens)
    assert step.piggyback_tokens == 0
    assert [s.kind for s in step.segments()] == [
        SegmentKind.HEAD, *[SegmentKind.BACKWARD_RECOMPUTED] * 3, SegmentKind.OPTIMIZER]


def test_a_step_that_saves_memory_has_small_head_segments() -> None:
    model, lora, _ = with_reference(tiny_model('llama'))
    sample = Sample(tuple(range(5, 46)), (0.0,) + (1.0,) * 40)
    step = FinetuneStep(model, Trainer(lora, 1e-3), [sample])

    def head() -> list[int]:
        return [s.tokens for s in step.segments() if s.kind is SegmentKind.HEAD]

    assert head() == [HEAD_ROWS, 40 - HEAD_ROWS]
    step.save_memory(step.chunk_tokens)
    assert head() == [MIN_HEAD_ROWS, MIN_HEAD_ROWS, 40 - 2 * MIN_HEAD_ROWS]
    while not step.done:
        step.run_segment()
    saving = FinetuneStep(model, Trainer(lora, 1e-3), [sample], keep_graphs=False)
    assert [s.tokens for s in saving.segments() if s.kind is SegmentKind.HEAD] == [16, 16, 8]


def test_a_step_without_weighted_tokens_is_rejected() -> None:
    model, lora, _ = with_reference(tiny_model('llama'))
    with pytest.raises(ValueError, match='all weights are 0'):
        FinetuneStep(model, Trainer(lora, 1e-3), [Sample((5, 6, 7), (1.0, 0.0, 0.0))])


def test_gradients_that_are_not_finite_are_dropped() -> None:
    model, lora, _ = with_reference(tiny_model('llama'))
    tensors = random_adapter(lora, 0)
    step = FinetuneStep(model, Trainer(lora, 1e-3), [Sample((5, 6, 7), (0.0, 1.0, math.inf))])
    while not step.done:
        step.run_segment()
    assert all(torch.equal(t, tensors[n]) for n, t in lora.export().items())
    assert not gradients_of(lora)


def live_bytes() -> int:
    gc.collect()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in gc.get_objects() if issubclass(type(t), Tensor) and not t.is_mkldnn}
    return sum(storages.values())


@pytest.mark.parametrize('way', ['alone, graphs kept', 'alone, recomputed', 'piggybacked by 33'])
def test_a_finished_step_holds_only_its_scores(way: str) -> None:
    drive, keep_graphs = DRIVES[way]
    model, lora, _ = with_reference(tiny_model('mistral'))
    trainer = Trainer(lora, 1e-3)

    def finished() -> FinetuneStep:
        step = FinetuneStep(model, trainer, samples(), keep_graphs=keep_graphs)
        drive(step)
        while not step.done:
            step.run_segment()
        return step

    finished()   # allocates the optimizer's state
    before = live_bytes()
    steps = [finished() for _ in range(3)]
    assert live_bytes() - before < 3 * 4096
    assert all(s.scored for s in steps)


def memory_changes(compute: Callable[[], object]) -> list[int]:
    """Return what PyTorch's allocator takes (and, negative, frees) in the call, in bytes."""
    with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        compute()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    changes = sorted((e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events()
                     if e.name() == '[memory]')
    return [change for _, change in changes]


def peak_bytes(compute: Callable[[], object]) -> int:
    """Return the peak memory of PyTorch's allocator above its level before the call, in bytes."""
    return max(accumulate(memory_changes(compute)))


def test_a_head_segment_takes_fresh_memory_for_nothing_but_its_logits() -> None:
    model, lora, _ = with_reference(tiny_model('llama'))
    rows = 16
    step = FinetuneStep(model, Trainer(lora, 1e-3), samples(), head_tokens=rows)
    while next(iter(step.segments())).kind is not SegmentKind.HEAD:
        step.run_segment()
    step.run_segment()
    hidden = torch.zeros(rows, model.model.config.hidden_size, requires_grad=True)

    def large(compute: Callable[[], object]) -> int:
        return sum(change >= rows * VOCABULARY * 4 for change in memory_changes(compute))

    of_logits = large(lambda: model.shell.logits(hidden))
    assert of_logits >= 1
    assert large(step.run_segment) == of_logits


def test_recomputing_layers_takes_at_most_a_quarter_of_the_memory_of_peft() -> None:
    batch = samples(lengths=[CONTEXT])
    model, lora, reference = with_reference(tiny_model('llama', num_hidden_layers=16))
    peft = as_peft(reference, lora, random_adapter(lora, 0)).train()
    trainer = Trainer(lora, 1e-3)

    def step(keep_graphs: bool) -> None:
        trainer.zero_grad()
        run_until_optimizer(FinetuneStep(model, trainer, batch, keep_graphs=keep_graphs))

    theirs = peak_bytes(lambda: loss_of(peft, batch).backward())
    kept = peak_bytes(partial(step, True))
    kept_gradients = gradients_of(lora)
    recomputed = peak_bytes(partial(step, False))

    assert recomputed <= 0.25 * theirs
    assert recomputed < kept
    assert_same(gradients_of(lora), gradients(peft))
    for name, gradient in gradients_of(lora).items():
        assert torch.equal(gradient, kept_gradients[name])
