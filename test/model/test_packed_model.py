# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Packed passes compute the logits of transformers and PEFT, whatever shares a pass."""

from __future__ import annotations

from collections.abc import Sequence
import copy
from dataclasses import dataclass
from pathlib import Path
import random
import weakref

from hypothesis import given, settings, strategies as st
from peft import PeftModel
import pytest
from support.families import (
    ALPHA,
    FAMILIES,
    publish,
    random_adapter,
    random_ids,
    RANK,
    relative_error,
    TARGETS,
    tiny_model,
    with_reference,
)
from support.finetuning import scattered_tables
from support.serving import assert_response_of, random_sample, Request, serve, TOLERANCE
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mace_ros.finetune.sample import Sample
from mace_ros.finetune.step import FinetuneStep
from mace_ros.finetune.trainer import Trainer
from mace_ros.model import cpu_matmul
from mace_ros.model.batch_descriptor import BatchDescriptor
from mace_ros.model.cuda_graph_runner import CudaGraphRunner
from mace_ros.model.int4 import Int4Weight
from mace_ros.model.int4_kernels import find_kernel, plain_kernel
from mace_ros.model.loading import LoadedModel
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.lora_mapping import BASE_SLOT, FIRST_SERVED_SLOT
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.packing import pack
from mace_ros.model.spans import PiggybackSpans, Span

PROMPTS = (
    'What is the capital of France?',
    'Write one sentence about a robot that waters plants.',
    'List the planets of the solar system that are larger than the Earth, largest first, and '
    'say for each one whether it has rings.',
    'Hi!')

pytestmark = pytest.mark.usefixtures('one_thread')


# -- the same as transformers and PEFT ---------------------------------------------------


class EveryPass(CudaGraphRunner):
    """Pads every pass to its batch descriptor, as if a device graph were replayed."""

    def run(self, spans: Sequence[Span], piggyback: PiggybackSpans | None) -> Tensor | None:
        descriptor = BatchDescriptor.of(spans, piggyback)
        if descriptor not in self:
            self.prepare(descriptor)
        return super().run(spans, piggyback)


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('family', FAMILIES)
def test_packed_requests_get_the_logits_of_transformers_and_peft(
        family: str, padded: bool, tmp_path: Path) -> None:
    rng = random.Random(family)
    model, lora, reference = with_reference(
        tiny_model(family), targets=TARGETS.get(family, 'all-linear'))
    if padded:
        model.fast_passes = EveryPass(model)
    adapters = {}
    for slot in (FIRST_SERVED_SLOT, FIRST_SERVED_SLOT + 1):
        adapters[slot] = publish(tmp_path / f'v{slot}', lora, random_adapter(lora, slot))
        lora.write_slot(slot)
    random_adapter(lora, 0)
    step = FinetuneStep(
        model, Trainer(lora, 1e-2), [random_sample(rng, n) for n in (5, 37, 18)], head_tokens=8)
    slots = (BASE_SLOT, *adapters)
    requests = [Request(random_ids(rng, length), slots[i % 3], 6)
                for i, length in enumerate((41, 30, 23, 1, 58, 16))]

    serve(model, requests, rng, chunks=(1, 3, 8, 19), step=step)

    assert step.done
    for slot, path in adapters.items():
        peft = PeftModel.from_pretrained(copy.deepcopy(reference), str(path)).eval()
        for request in requests:
            if request.slot == slot:
                assert_response_of(peft, request)
    for request in requests:
        if request.slot == BASE_SLOT:
            assert_response_of(reference, request)


@pytest.mark.parametrize('family', ['llama', 'gemma2', 'gemma3', 'gpt-oss', 'gpt-neox'])
def test_the_place_of_blocks_in_the_cache_changes_no_logits(family: str) -> None:
    """The keys of a single decode row are read in place if its blocks are consecutive."""
    rng = random.Random(family)
    model, _, _ = with_reference(tiny_model(family))
    ids = random_ids(rng, 40)
    logits = []
    for blocks in ([3, 4, 5], [9, 2, 7]):
        model.run([Span(ids[:38], 0, blocks, BASE_SLOT, True)])
        logits.append(torch.cat([model.run([Span(ids[i:i + 1], i, blocks, BASE_SLOT, True)])
                                 .clone() for i in (38, 39)]))
    assert relative_error(*logits) < 1e-5


def assert_served_as(reference: PreTrainedModel, model: PackedModel, lora: LoRAManager,
                     rng: random.Random, folder: Path) -> None:
    """Serve requests with and without an adapter beside a fine-tune step; compare their logits."""
    path = publish(folder, lora, random_adapter(lora, 0))
    lora.write_slot(FIRST_SERVED_SLOT)
    step = FinetuneStep(model, Trainer(lora, 1e-2), [random_sample(rng, 37)])
    requests = [Request(random_ids(rng, length), slot, 6)
                for length, slot in ((41, 0), (30, FIRST_SERVED_SLOT), (1, FIRST_SERVED_SLOT))]

    serve(model, requests, rng, chunks=(1, 3, 19), step=step)

    assert_response_of(reference, requests[0])
    peft = PeftModel.from_pretrained(reference, str(path)).eval()
    assert_response_of(peft, requests[1])
    assert_response_of(peft, requests[2])


@pytest.mark.parametrize('family', ['llama', 'gpt-neox', 'gemma2', 'opt'])
def test_int8_weights_give_the_logits_of_transformers_with_rounded_weights(
        family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_matmul, 'multiplies_int8', lambda dtype: True)    # slow in fp32
    rng = random.Random(family)
    model, lora, reference = with_reference(tiny_model(family), int8=True)
    assert all(layer.int8 is not None for layer in model.linears)
    with torch.no_grad():
        for name, linear in reference.named_modules():
            if type(linear) is not torch.nn.Linear or 'project_' in name:   # around the layers
                continue
            scale = linear.weight.abs().amax(1, keepdim=True) / 127
            linear.weight.copy_((linear.weight / scale).round() * scale)
    assert_served_as(reference, model, lora, rng, tmp_path)


@pytest.mark.parametrize('family', ['llama', 'gpt-neox', 'gemma2', 'opt'])
def test_int4_weights_give_the_logits_of_transformers_with_the_dequantised_weights(
        family: str, tmp_path: Path) -> None:
    rng = random.Random(family)
    # Dequantised in fp32: PyTorch's product has inputs in bfloat16.
    model, lora, reference = with_reference(
        tiny_model(family), int4=plain_kernel(torch.device('cpu'), torch.float32))
    assert any(isinstance(layer.stored, Int4Weight) for layer in model.linears)
    assert_served_as(reference, model, lora, rng, tmp_path)


def test_the_product_of_4_bits_gives_nearly_the_logits_of_the_dequantised_weights() -> None:
    rng = random.Random(0)
    model, _, reference = with_reference(
        tiny_model('llama'), int4=find_kernel(torch.device('cpu'), torch.float32))
    ids = random_ids(rng, 40)
    blocks = list(range(3))
    model.run([Span(ids[:36], 0, blocks, BASE_SLOT, True)])
    for i in range(36, 40):
        logits = model.run([Span(ids[i:i + 1], i, blocks, BASE_SLOT, True)])
        with torch.no_grad():
            expected = reference(torch.tensor([ids[:i + 1]])).logits[0, -1]
        assert relative_error(logits[0], expected) < 3e-2


def test_smollm2_gets_the_logits_of_transformers(base_model: LoadedModel) -> None:
    rng = random.Random(0)
    reference, tokenizer = base_model.model, base_model.tokenizer
    model = pack(copy.deepcopy(reference), kv_tokens=1024)
    lora = LoRAManager(model.linears, targets='q_proj,v_proj', rank=RANK, alpha=ALPHA, slots=1)
    random_adapter(lora, 0)
    sample = tokenizer('My name is Rover.').input_ids * 2
    step = FinetuneStep(model, Trainer(lora, 1e-3), [Sample(tuple(sample), (1.0,) * len(sample))])
    requests = [
        Request(tokenizer.apply_chat_template(
            [{'role': 'user', 'content': text}], add_generation_prompt=True).input_ids,
            BASE_SLOT, 8)
        for text in PROMPTS]

    serve(model, requests, rng, chunks=(11, 32, 100), step=step)

    for request in requests:
        assert_response_of(reference, request)


@st.composite
def schedules(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """Passes over four sequences: the sequences of each, and their tokens."""
    return draw(st.lists(st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from((1, 1, 2, 5, 13, 40))),
        min_size=1, max_size=4, unique_by=lambda part: part[0]), max_size=12))


@dataclass(frozen=True)
class Expected:
    """A packed model, sequences, and the expected logits by slot and sequence."""

    model: PackedModel
    texts: list[list[int]]
    logits: dict[int, list[Tensor]]


@pytest.fixture(scope='module')
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    rng = random.Random(1)
    model, lora, reference = with_reference(tiny_model('mistral'))
    path = publish(tmp_path_factory.mktemp('adapter'), lora, random_adapter(lora, 0))
    lora.write_slot(FIRST_SERVED_SLOT)
    texts = [random_ids(rng, n) for n in (40, 7, 33, 21)]

    def logits(plain: torch.nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return [plain(input_ids=torch.tensor([ids])).logits[0] for ids in texts]

    base = logits(reference)
    adapted = logits(PeftModel.from_pretrained(reference, str(path)))
    return Expected(model, texts, {BASE_SLOT: base, FIRST_SERVED_SLOT: adapted})


@given(schedule=schedules(),
       slots=st.tuples(*[st.sampled_from((BASE_SLOT, FIRST_SERVED_SLOT))] * 4))
@settings(max_examples=40, derandomize=True)
def test_logits_do_not_depend_on_the_schedule(
    expected: Expected, schedule: list[list[tuple[int, int]]], slots: tuple[int, ...],
) -> None:
    model, texts = expected.model, expected.texts
    tables = scattered_tables(random.Random(0), model, [len(ids) for ids in texts])
    computed = [0] * len(texts)
    for parts in [*schedule, *([(i, 100)] for i in range(len(texts)))]:
        taken = [(i, min(tokens, len(texts[i]) - computed[i])) for i, tokens in parts]
        taken = [(i, tokens) for i, tokens in taken if tokens]
        if not taken:
            continue
        logits = model.run([
            Span(texts[i][computed[i]:computed[i] + tokens], computed[i], tables[i], slots[i], True)
            for i, tokens in taken])
        for (i, tokens), row in zip(taken, logits, strict=True):
            computed[i] += tokens
            assert relative_error(row, expected.logits[slots[i]][i][computed[i] - 1]) < TOLERANCE
    assert computed == [len(ids) for ids in texts]


# -- isolation and memory ----------------------------------------------------------------


def test_nan_in_blocks_of_other_sequences_does_not_reach_a_sequence() -> None:
    model, _, reference = with_reference(tiny_model('llama'))
    for tensor in model.kv_cache.keys + model.kv_cache.values:
        tensor.fill_(float('nan'))
    ids = random_ids(random.Random(0), 40)
    model.run([Span(ids[:9], 0, [3], BASE_SLOT, False),
               Span(ids[:39], 0, [5, 7, 2], BASE_SLOT, False)])

    logits = model.run([Span(ids[9:10], 9, [3], BASE_SLOT, True),
                        Span(ids[39:], 39, [5, 7, 2], BASE_SLOT, True)])

    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([ids])).logits[0, [9, 39]]
    assert relative_error(logits, expected) < TOLERANCE


def test_the_output_of_a_shard_that_is_not_called_is_dropped_after_the_pass() -> None:
    model, _, _ = with_reference(tiny_model('llama'))
    attention = model.layers[0].self_attn
    attention.v_proj = torch.nn.Linear(64, 32)
    inputs = []
    attention.q_proj.register_forward_pre_hook(
        lambda _, args: inputs.append(weakref.ref(args[0])))

    model.run([Span([5, 6], 0, [0], BASE_SLOT, True)])

    assert inputs[0]() is None
