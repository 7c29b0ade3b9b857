# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Compiled passes of decode rows compute what a model's own code computes, or are not used."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
import copy
import importlib.util
from pathlib import Path
import random
import sys
import threading
from typing import Any

import numpy as np
from peft import PeftModel
import pytest
from support.families import (
    FAMILIES,
    publish,
    random_adapter,
    random_ids,
    random_model,
    relative_error,
    TARGETS,
    tiny_model,
    with_reference,
)
from support.serving import assert_response_of, Request, serve
import torch

from mace_ros.model import cpu_decode_check, cpu_kernels, int4_kernels
from mace_ros.model.cpu_decode import CpuDecode
from mace_ros.model.cpu_decode_check import use_cpu_decode
from mace_ros.model.cpu_matmul import multiplies_int8, SMALL_BATCH
from mace_ros.model.graph_check import kernel_limit
from mace_ros.model.int4_kernels import find_kernel
from mace_ros.model.lora_mapping import BASE_SLOT, FIRST_SERVED_SLOT
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.spans import BLOCK_TOKENS, PiggybackSpans, Span

pytestmark = pytest.mark.usefixtures('one_thread')

# Families of Llama's form, and one that has its modules, but multiplies residuals.
COVERED = {'llama', 'llama-tied-biased', 'llama3-rope', 'qwen2', 'qwen3', 'mistral', 'smollm3'}
SIMILAR = {'granite'}


def decode_spans(contexts: tuple[int, ...], **others: Any) -> list[Span]:
    """Return decode rows, each in KV blocks of its own, under the base model and an adapter."""
    blocks, first = [], 0
    for context in contexts:
        count = context // BLOCK_TOKENS + 1
        blocks.append(range(first, first + count))
        first += count
    return [Span((5 + i,), context, own, (FIRST_SERVED_SLOT, BASE_SLOT)[i % 2], True, **others)
            for i, (context, own) in enumerate(zip(contexts, blocks, strict=True))]


def filled(model: PackedModel, blocks: int) -> PackedModel:
    """Return the model, with keys and values of random prompts in its first KV blocks."""
    rng = random.Random(0)
    for block in range(blocks):
        model.run([Span(random_ids(rng, BLOCK_TOKENS), 0, [block], BASE_SLOT, False)])
    return model


@pytest.mark.parametrize('family', FAMILIES)
def test_layers_of_llamas_form_are_known(family: str) -> None:
    model, _, _ = with_reference(tiny_model(family), targets=TARGETS.get(family, 'all-linear'))
    reason = use_cpu_decode(model)
    assert (model.fast_passes is not None) == (family in COVERED)
    assert reason.startswith('its logits are off by') == (family in SIMILAR)
    assert bool(reason) == (family in SIMILAR)


@pytest.mark.parametrize('family', sorted(COVERED))
def test_requests_get_the_logits_of_transformers_and_peft(family: str, tmp_path: Path) -> None:
    rng = random.Random(family)
    model, lora, reference = with_reference(tiny_model(family))
    assert use_cpu_decode(model) == ''
    path = publish(tmp_path / 'adapter', lora, random_adapter(lora, 1))
    lora.write_slot(FIRST_SERVED_SLOT)
    requests = [Request(random_ids(rng, length), slot, 6) for length, slot in zip(
        (41, 30, 9, 3), (BASE_SLOT, FIRST_SERVED_SLOT) * 2, strict=True)]

    serve(model, requests, rng, chunks=(8, 19))

    peft = PeftModel.from_pretrained(copy.deepcopy(reference), str(path)).eval()
    for request in requests:
        assert_response_of(reference if request.slot == BASE_SLOT else peft, request)


@pytest.mark.parametrize('weights', ['float32', 'bfloat16', 'int8', 'int4'])
@pytest.mark.parametrize('contexts', [(40,), (3, 40, 17), (1,) * SMALL_BATCH])
def test_all_precisions(weights: str, contexts: tuple[int, ...]) -> None:
    dtype = torch.float32 if weights == 'float32' else torch.bfloat16
    if weights == 'int8' and not multiplies_int8(dtype):
        pytest.skip('this CPU multiplies no 8-bit weights')
    model, lora, _ = with_reference(
        tiny_model('qwen2').to(dtype), int8=weights == 'int8',
        int4=find_kernel(torch.device('cpu'), dtype) if weights == 'int4' else None)
    random_adapter(lora, 0)
    lora.write_slot(FIRST_SERVED_SLOT)
    assert use_cpu_decode(model) == ''
    assert model.fast_passes is not None
    filled(model, 16)
    spans = decode_spans(contexts)
    expected = model.run_plainly(spans).clone()
    found = model.fast_passes.run(spans, None)
    assert found is not None
    assert found.dtype == torch.float32
    assert model.fast_passes.best_tokens is not None
    assert torch.equal(model.fast_passes.best_tokens, found.argmax(1))
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < kernel_limit(model)


def test_tokens_whose_neighbours_were_pruned_and_logits_that_are_not_wanted() -> None:
    model, _, _ = with_reference(tiny_model('llama'))
    assert use_cpu_decode(model) == ''
    filled(model, 8)
    one, two, three = (
        Span((7,), position, blocks, BASE_SLOT, wanted, dropped=dropped)
        for position, blocks, wanted, dropped in (
            (70, [0, 1], True, 48), (20, [2, 3], False, 0), (33, [4, 5, 6], True, 0)))
    expected = model.run_plainly([one, two, three])
    assert model.fast_passes is not None
    found = model.fast_passes.run([one, two, three], None)
    assert found is not None
    assert relative_error(found, expected) < 1e-4


def test_other_passes_run_the_models_own_code() -> None:
    model, _, _ = with_reference(tiny_model('llama'))
    assert use_cpu_decode(model) == ''
    fast = model.fast_passes
    assert fast is not None
    chunk = Span((3, 4), 0, [9], BASE_SLOT, True)
    scored = Span((3,), 0, [9], BASE_SLOT, True, attention=torch.zeros(1))
    width = model.model.config.hidden_size
    hidden = [torch.zeros(2, width) for _ in range(len(model.layers) + 1)]
    rows = decode_spans((3, 40))
    assert fast.run([*rows, chunk], None) is None
    assert fast.run([*rows, scored], None) is None
    assert fast.run(rows, PiggybackSpans([chunk], hidden)) is None
    assert fast.run(decode_spans((1,) * (SMALL_BATCH + 1)), None) is None
    assert fast.run([], None) is None
    assert model.run([*rows, chunk]).shape[0] == 3


@pytest.mark.parametrize('head_dim', [8, 20, 32])
def test_heads_need_not_be_as_wide_as_the_hidden_states(head_dim: int) -> None:
    """As those of Qwen3."""
    model, _, _ = with_reference(random_model('Qwen3', head_dim=head_dim))
    assert use_cpu_decode(model) == ''
    assert model.fast_passes is not None


def test_large_keys_are_no_reason_not_to_use_it() -> None:
    """As those of Qwen2: its own code rounds them three times, and the kernel once."""
    model = tiny_model('qwen2')
    with torch.no_grad():
        for name, bias in model.named_parameters():
            if name.endswith('k_proj.bias'):
                bias *= 300
    assert use_cpu_decode(with_reference(model.to(torch.bfloat16))[0]) == ''


def test_a_model_that_computes_late_tokens_in_another_way_runs_its_own_code() -> None:
    """Its layers have the modules of Llama's."""
    model, _, _ = with_reference(random_model('Ministral3', rope_parameters={
        'rope_type': 'default', 'rope_theta': 10000.0, 'llama_4_scaling_beta': 0.5,
        'original_max_position_embeddings': 64}))
    assert use_cpu_decode(model).startswith('its logits are off by')


# -- threads -----------------------------------------------------------------------------


def adapted_model() -> PackedModel:
    """Return a model with an adapter in a slot and keys and values in its cache."""
    model, lora, _ = with_reference(tiny_model('qwen2'))
    random_adapter(lora, 0)
    lora.write_slot(FIRST_SERVED_SLOT)
    return filled(model, 16)


@pytest.mark.parametrize('threads', [2, 5])
def test_threads_give_the_same_logits_each_time(threads: int) -> None:
    model, spans = adapted_model(), decode_spans((3, 40, 17))
    alone = CpuDecode(model).run(spans, None)
    assert alone is not None
    torch.set_num_threads(threads)
    fast = CpuDecode(model)
    first = fast.run(spans, None)
    assert first is not None
    assert torch.equal(first, alone)
    for _ in range(100):
        again = fast.run(spans, None)
        assert again is not None
        assert torch.equal(first, again)


def test_a_pass_takes_no_more_threads_than_are_set_now(monkeypatch: pytest.MonkeyPatch) -> None:
    model, spans = adapted_model(), decode_spans((3, 40, 17))
    torch.set_num_threads(3)
    fast, begun = CpuDecode(model), []
    submit = fast._executor.submit

    def noted(*arguments: Any) -> Any:
        begun.append(arguments[0])
        return submit(*arguments)

    monkeypatch.setattr(fast._executor, 'submit', noted)
    for threads, helpers in ((3, 2), (1, 0), (5, 2)):
        torch.set_num_threads(threads)
        fast.run(spans, None)
        assert len(begun) == helpers
        del begun[:]


def test_no_pass_waits_for_a_thread_that_does_not_begin() -> None:
    model, spans = adapted_model(), decode_spans((3, 40, 17))
    torch.set_num_threads(3)
    fast = CpuDecode(model)
    expected = fast.run(spans, None)
    hurry = threading.Event()
    with ThreadPoolExecutor(2) as executor:
        fast._executor = executor
        for _ in range(2):
            executor.submit(hurry.wait)
        try:
            for _ in range(20):
                found = fast.run(spans, None)
                assert found is not None and expected is not None
                assert torch.equal(found, expected)
        finally:
            hurry.set()


def test_a_thread_that_begins_late_touches_nothing_of_the_model(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """The model may be gone by then: at the addresses that are left there is no memory."""
    model, spans = adapted_model(), decode_spans((3, 40, 17))
    passes: list[tuple[Any, ...]] = []
    run_pass = cpu_kernels.run_pass

    def noted(*arguments: Any) -> None:
        passes.append(arguments)
        run_pass(*arguments)

    monkeypatch.setattr(cpu_kernels, 'run_pass', noted)
    logits = CpuDecode(model).run(spans, None)
    assert logits is not None
    before = [logits.clone(), *(x.clone() for x in model.kv_cache.keys)]
    [(*arguments, layers, records, counters)] = passes
    layers, records = np.copy(layers), np.copy(records)
    for name in ('qkv', 'out', 'gate_and_up', 'down'):
        for address in ('weight', 'scales', 'bias', 'a', 'b'):
            layers[name][address] = records['head'][address] = 8
    for norm in ('input_norm', 'middle_norm'):
        layers[norm]['weight'] = records['norm']['weight'] = 8
    layers['keys'] = layers['values'] = 8
    run_pass(*arguments, layers, records, counters)
    for found, expected in zip([logits, *model.kv_cache.keys], before, strict=True):
        assert torch.equal(found, expected)


# -- what goes wrong ---------------------------------------------------------------------


def write_zeros(logits: np.ndarray, *_: object) -> None:
    logits[:] = 0


def fail(*_: object) -> None:
    raise ValueError('injected\nand a traceback')


def fail_silently(*_: object) -> None:
    raise ValueError


@pytest.mark.parametrize('wrong, reason', [
    (write_zeros, 'its logits are off by'), (fail, 'ValueError: injected'),
    (fail_silently, 'ValueError: ')])
def test_a_pass_that_is_wrong_is_not_used(
        wrong: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, 'run_pass', wrong)
    model, _, _ = with_reference(tiny_model('llama'))
    own = [type(m) for m in model.model.modules()]
    found = use_cpu_decode(model)
    assert found.startswith(reason)
    assert '\n' not in found
    assert model.fast_passes is None
    assert [type(m) for m in model.model.modules()] == own


def test_weights_of_another_layout_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of int4 on ARM."""
    monkeypatch.setattr(int4_kernels, 'unpacks_rows', lambda device: False)
    model, _, _ = with_reference(tiny_model('llama'), int4=int4_kernels.find_kernel(
        torch.device('cpu'), torch.float32))
    assert use_cpu_decode(model).startswith('OtherLayout: its weights have another layout')
    assert model.fast_passes is None


def test_a_cpu_without_float16_is_not_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_decode_check, 'reads_float16', lambda: False)
    model, _, _ = with_reference(tiny_model('llama'))
    assert use_cpu_decode(model) == 'the CPU has no instructions for float16'


def test_numba_that_cannot_be_imported_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As beside a NumPy that it does not know, or without a folder for compiled functions."""
    monkeypatch.setitem(sys.modules, 'mace_ros.model.cpu_decode', None)
    model, _, _ = with_reference(tiny_model('llama'))
    assert use_cpu_decode(model).startswith('ModuleNotFoundError: ')
    assert model.fast_passes is None


def test_without_numba_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_decode_check, 'find_spec',
                        lambda name: None if name == 'numba' else importlib.util.find_spec(name))
    model, _, _ = with_reference(tiny_model('llama'))
    assert use_cpu_decode(model) == 'Numba is not installed'
    assert model.fast_passes is None
