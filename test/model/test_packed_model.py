# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Packed passes compute the logits of transformers and PEFT, whatever shares a pass."""

from __future__ import annotations

from collections.abc import Sequence
import copy
from dataclasses import dataclass, field
from pathlib import Path
import random
import weakref

from hypothesis import given, settings, strategies as st
from peft import PeftModel
import pytest
from support.families import (
    ALPHA,
    CONTEXT,
    FAMILIES,
    publish,
    random_adapter,
    random_ids,
    random_model,
    RANK,
    relative_error,
    TARGETS,
    tiny_model,
    VOCABULARY,
    with_reference,
)
from support.finetuning import scattered_tables
import torch
from torch import Tensor
import transformers
from transformers import PreTrainedModel

from mace_ros.finetune.sample import Sample
from mace_ros.finetune.step import FinetuneStep
from mace_ros.finetune.trainer import Trainer
from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.model import attention, cpu_matmul
from mace_ros.model.architectures import context_length, UnsupportedModel
from mace_ros.model.batch_descriptor import batch_descriptors, BatchDescriptor
from mace_ros.model.cuda_graph_runner import CapturedPass, CudaGraphRunner, PassOutputs
from mace_ros.model.graph_capture import capture
from mace_ros.model.graphed_layers import GraphedLayers
from mace_ros.model.int4 import Int4Weight
from mace_ros.model.int4_kernels import find_kernel, plain_kernel
from mace_ros.model.loading import LoadedModel
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.lora_mapping import BASE_SLOT, FIRST_SERVED_SLOT
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.packing import pack
from mace_ros.model.spans import PiggybackSpans, Span

TOLERANCE = 1e-4
TIE = 1e-4   # logits closer than this may swap places

PROMPTS = (
    'What is the capital of France?',
    'Name three primary colours.',
    'Write one sentence about a robot that waters plants.',
    'Why is the sky blue? Answer in ten words.',
    'Translate "good morning" into Spanish.',
    'What is 17 plus 25?',
    'List the planets of the solar system that are larger than the Earth, largest first, and '
    'say for each one whether it has rings.',
    'Hi!')


pytestmark = pytest.mark.usefixtures('one_thread')


@dataclass
class Request:
    """A prompt with greedy decoding; ``logits`` holds those of each response token."""

    prompt: list[int]
    slot: int
    max_tokens: int
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    response: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.response) == self.max_tokens

    def span(self, tokens: int) -> Span:
        known = (self.prompt + self.response)[self.computed:self.computed + tokens]
        last = self.computed + len(known) == len(self.prompt) + len(self.response)
        return Span(known, self.computed, self.blocks, self.slot, last)


def serve(model: PackedModel, requests: Sequence[Request], rng: random.Random, *,
          chunks: Sequence[int], step: FinetuneStep | None = None) -> None:
    """
    Serve all requests in random passes beside a fine-tune step.

    Each pass takes some of the requests in any order, chunks of any of the given sizes, and
    some fine-tune tokens while any are left. Segments of the step run between the passes.
    """
    lengths = [len(r.prompt) + r.max_tokens for r in requests]
    tables = scattered_tables(rng, model, [*lengths, *(step.kv_tokens if step else ())])
    for request in requests:
        request.blocks = tables.pop(0)
    if step is not None:
        step.hold_blocks(tables)
    while not all(r.done for r in requests):
        batch = [r for r in requests if not r.done]
        rng.shuffle(batch)
        batch = batch[:rng.randint(1, len(batch))]
        spans = [r.span(1 if r.response else rng.choice(chunks)) for r in batch]
        finetune = None
        if step is not None and step.piggyback_tokens:
            finetune = step.piggyback_spans(min(rng.choice(chunks), step.piggyback_tokens))
        logits = iter(model.run(spans, finetune))
        if step is not None and finetune is not None:
            step.piggybacked(finetune.tokens)
        for request, span in zip(batch, spans, strict=True):
            request.computed += len(span.tokens)
            if span.wants_logits:
                request.logits.append(next(logits).clone())
                request.response.append(int(request.logits[-1].argmax()))
        assert next(logits, None) is None
        if step is not None:
            for _ in list(step.segments())[:rng.randint(0, 3)]:
                step.run_segment()
    if step is not None:
        while step.piggyback_tokens and step.holds_blocks:
            finetune = step.piggyback_spans(min(rng.choice(chunks), step.piggyback_tokens))
            model.run((), finetune)
            step.piggybacked(finetune.tokens)
        while not step.done:
            step.run_segment()


def assert_response_of(model: PreTrainedModel, request: Request) -> None:
    """Compare all logits with ``generate``, and all tokens up to a tie of the best two."""
    with torch.no_grad():
        output = model.generate(
            torch.tensor([request.prompt]), do_sample=False, max_new_tokens=request.max_tokens,
            output_logits=True, return_dict_in_generate=True)
    expected = output.sequences[0, len(request.prompt):].tolist()
    for i, (ours, theirs) in enumerate(zip(request.logits, output.logits, strict=False)):
        assert relative_error(ours, theirs[0]) < TOLERANCE
        if request.response[i] != expected[i]:
            best, second = theirs[0].topk(2).values
            assert best - second < TIE
            return   # after a tie the texts may differ
    assert request.response[:len(expected)] == expected


def random_sample(rng: random.Random, count: int) -> Sample:
    prompt = count // 2
    return Sample(tuple(random_ids(rng, count)), (0.0,) * prompt + (1.0,) * (count - prompt))


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
        model.graphs = EveryPass(model)
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
    path = publish(tmp_path, lora, random_adapter(lora, 0))
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
def test_int4_weights_give_the_logits_of_transformers_with_the_dequantised_weights(
        family: str, tmp_path: Path) -> None:
    rng = random.Random(family)
    # Dequantised in fp32: PyTorch's product has inputs in bfloat16.
    model, lora, reference = with_reference(
        tiny_model(family), int4=plain_kernel(torch.device('cpu'), torch.float32))
    assert any(isinstance(layer.stored, Int4Weight) for layer in model.linears)
    path = publish(tmp_path, lora, random_adapter(lora, 0))
    lora.write_slot(FIRST_SERVED_SLOT)
    step = FinetuneStep(model, Trainer(lora, 1e-2), [random_sample(rng, 37)])
    requests = [Request(random_ids(rng, length), slot, 6)
                for length, slot in ((41, 0), (30, FIRST_SERVED_SLOT), (1, FIRST_SERVED_SLOT))]

    serve(model, requests, rng, chunks=(1, 3, 19), step=step)

    assert_response_of(reference, requests[0])
    peft = PeftModel.from_pretrained(reference, str(path)).eval()
    assert_response_of(peft, requests[1])
    assert_response_of(peft, requests[2])


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
@settings(max_examples=40, deadline=None, derandomize=True)
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


@given(rows=st.integers(0, 16), position=st.integers(0, 1999), chunks=st.lists(
    st.tuples(st.integers(2, 256), st.integers(0, 1000)), max_size=3), piggyback=st.booleans())
@settings(deadline=None, derandomize=True)
def test_every_pass_within_the_limits_fits_one_of_the_batch_descriptors(
        rows: int, position: int, chunks: list[tuple[int, int]], piggyback: bool) -> None:
    spans = [Span((0,), position, range(200), 0, True)] * rows + [
        Span((0,) * n, first, range(200), 0, True) for n, first in chunks]
    tokens = sum(n for n, _ in chunks)
    if tokens > 256 or not (spans or piggyback):
        return
    finetune = PiggybackSpans([Span((0,) * 8, 0, [0], 0, False)], []) if piggyback else None
    padded = BatchDescriptor.of(spans, finetune)

    prepared = set(batch_descriptors(max_rows=16, max_tokens=264, max_context=2000))

    assert padded in prepared or padded.keys > 8192
    assert padded.decode >= rows and padded.decode * padded.blocks * BLOCK_TOKENS >= rows * position
    assert padded.block >= tokens and padded.keys >= sum(n + first for n, first in chunks)


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


CAPTURES = {
    'passes': (CapturedPass, 'capture'), 'their inputs': (CapturedPass, '__init__'),
    'their outputs': (PassOutputs, '__init__'),
    'fine-tune steps': (GraphedLayers, 'capture'), 'their layers': (GraphedLayers, '__init__')}


@pytest.mark.parametrize('where', CAPTURES)
def test_shapes_that_can_not_be_captured_run_eagerly(
        where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where preparing a pass stands for capturing it."""
    rng = random.Random(0)
    model, lora, reference = with_reference(tiny_model('llama'))

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError('injected')

    with monkeypatch.context() as patch:
        for captured in (CapturedPass, GraphedLayers):
            patch.setattr(captured, 'capture', lambda *_: None)
        patch.setattr(*CAPTURES[where], fails)
        patch.setattr(torch.cuda, 'mem_get_info', lambda: (1, 1))
        for name in ('synchronize', 'graph_pool_handle', 'Stream'):
            patch.setattr(torch.cuda, name, lambda: None)
        report = capture(model, max_rows=2, max_tokens=16, max_context=64,
                         may_continue=lambda: True)

    steps = where in ('fine-tune steps', 'their layers')
    assert (report.steps == []) == steps == (not model.graphed_layers)
    assert (report.passes == 0) == (not steps) == (not model.graphs)
    assert 'injected' in report.failures[0]
    assert 'run eagerly' in str(report) and 'injected' in str(report)
    request = Request(random_ids(rng, 41), BASE_SLOT, 6)
    step = FinetuneStep(model, Trainer(lora, 1e-2), [random_sample(rng, 37)])
    serve(model, [request], rng, chunks=(1, 3, 19), step=step)
    assert step.done
    assert_response_of(reference, request)


@pytest.mark.parametrize(('family', 'names'), [
    ('llama', ['down_proj', 'o_proj']), ('phi3', ['down_proj', 'o_proj']),
    ('opt', ['fc2', 'out_proj']),
    ('gpt-neox', ['dense', 'dense_4h_to_h']), ('starcoder2', ['c_proj', 'o_proj']),
    ('qwen3-moe', ['o_proj']), ('deepseek-v2', ['down_proj', 'o_proj'])])
def test_output_linear_selects_the_last_layers_of_attention_and_mlp(
        family: str, names: list[str]) -> None:
    model, lora, _ = with_reference(tiny_model(family), targets='output-linear')
    assert lora.target_modules == names
    adapted = {s.name for layer in model.linears for s in layer.adapted}
    assert adapted == {s.name for layer in model.linears for s in layer.shards
                       if s.name.rsplit('.', 1)[-1] in names}


def test_unknown_target_modules_are_rejected_by_name() -> None:
    with pytest.raises(ValueError, match=r"adapter\.target_modules: no linear layer matches 'qkv'"):
        with_reference(tiny_model('llama'), targets='qkv')


def test_the_output_of_a_shard_that_is_not_called_is_dropped_after_the_pass() -> None:
    model, _, _ = with_reference(tiny_model('llama'))
    attention = model.layers[0].self_attn
    attention.v_proj = torch.nn.Linear(64, 32)
    inputs = []
    attention.q_proj.register_forward_pre_hook(
        lambda _, args: inputs.append(weakref.ref(args[0])))

    model.run([Span([5, 6], 0, [0], BASE_SLOT, True)])

    assert inputs[0]() is None


# -- rejected models ---------------------------------------------------------------------

SSM = {'num_hidden_layers': 2, 'state_size': 8}
LINEAR = {'linear_num_key_heads': 2, 'linear_num_value_heads': 2, 'linear_key_head_dim': 16,
          'linear_value_head_dim': 16, 'num_experts': 4, 'num_experts_per_tok': 2}

REJECTED = {
    'mamba': ('Mamba', SSM, 'mamba.*attention interface'),
    'jamba': ('Jamba', {'num_experts': 2}, 'jamba.*attention interface'),
    'qwen3-next': ('Qwen3Next', LINEAR, 'qwen3_next.*attention interface'),
    'recurrent-gemma': ('RecurrentGemma', {'lru_width': 64}, 'recurrent_gemma.*recurrent or'),
    'lfm2': ('Lfm2', {'layer_types': ['conv', 'full_attention', 'conv']}, 'lfm2.*conv'),
    'bloom, with alibi': ('Bloom', {'n_head': 4}, 'bloom.*attention interface'),
    'gptj': ('GPTJ', {'n_head': 4, 'rotary_dim': 8}, 'gptj.*attention interface'),
    'llama4, chunked attention': (
        'Llama4Text', {'num_local_experts': 2, 'intermediate_size_mlp': 64,
                       'attention_chunk_size': 8}, 'llama4_text.*chunked_attention'),
    'doge, own mask': ('Doge', {}, 'doge.*attention_mask'),
    'phimoe, window not passed on': (
        'Phimoe', {'num_local_experts': 2, 'sliding_window': 99}, 'phimoe.*off by'),
    'diffllama, two attentions in a layer': ('DiffLlama', {}, 'diffllama.*off by'),
    'gemma4, layers share keys': (
        'Gemma4Text', {'num_kv_shared_layers': 1, 'hidden_size_per_layer_input': 8,
                       'vocab_size_per_layer_input': VOCABULARY, 'global_head_dim': 16,
                       'layer_types': ['full_attention'] * 3}, 'gemma4_text.*pass each other'),
    'bert, looks ahead': ('Bert', {}, 'bert.*off by'),
}


@pytest.mark.parametrize('case', REJECTED)
def test_an_unsupported_model_is_rejected_by_name(case: str) -> None:
    name, special, message = REJECTED[case]
    if not hasattr(transformers, f'{name}Config'):
        pytest.skip(f'transformers {transformers.__version__} has no {name}')
    model = random_model(name, **special)
    if message.endswith('attention interface') and model._supports_attention_backend:
        pytest.skip(f'transformers {transformers.__version__} runs {name} through its interface')
    with pytest.raises(UnsupportedModel, match=message):
        pack(model, kv_tokens=64)


@pytest.mark.parametrize('ignored', ['sliding_window', 'softcap', 'scaling'])
def test_the_self_check_finds_a_lost_attention_argument(
        ignored: str) -> None:
    def forgetful(*args: object, **kwargs: object) -> object:
        return attention.packed_attention(*args, **{**kwargs, ignored: None})

    transformers.AttentionInterface.register(attention.NAME, forgetful)
    try:
        with pytest.raises(UnsupportedModel, match=r'gemma2.*off by'):
            pack(tiny_model('gemma2'), kv_tokens=64)
    finally:
        transformers.AttentionInterface.register(attention.NAME, attention.packed_attention)


def test_a_model_with_nan_logits_is_rejected() -> None:
    model = tiny_model('llama')
    model.model.norm.weight.data[3] = float('nan')
    with pytest.raises(UnsupportedModel, match='off by inf'):
        pack(model, kv_tokens=64)


@pytest.mark.parametrize('family', ['llama', 'gemma2', 'gpt-oss', 'qwen3-moe', 'deepseek-v2'])
def test_bfloat16_models_pass_the_self_check(family: str) -> None:
    model = tiny_model(family).to(torch.bfloat16)
    assert pack(model, kv_tokens=64).dtype == torch.bfloat16


@pytest.mark.parametrize('rope, longest', [('default', CONTEXT), ('dynamic', 64)])
def test_the_context_is_limited_for_rope_variants_that_depend_on_the_longest_request(
        rope: str, longest: int) -> None:
    model = tiny_model('llama', rope_parameters={
        'rope_type': rope, 'rope_theta': 10000.0, 'factor': 2.0,
        'original_max_position_embeddings': 64})
    assert context_length(model) == longest
    assert context_length(tiny_model('phi3-longrope')) == 96
