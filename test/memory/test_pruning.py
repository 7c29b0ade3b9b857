# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""KV pruning drops the least attended blocks, and computes the rest as transformers does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
import random

import pytest
from support.families import CONTEXT, relative_error, tiny_model, VOCABULARY, WINDOW, with_reference
from support.robot import robot_with, SYSTEM
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mace_ros.api.events import FinishReason, Query, ResponseChunk
from mace_ros.api.settings import Settings
from mace_ros.memory.block_hashes import BlockHashes
from mace_ros.memory.block_pool import BLOCK_TOKENS, BlockPool
from mace_ros.memory.pruning import blocks_to_drop, LONG_TOKENS, RECENT_TOKENS
from mace_ros.model.architectures import longest_window
from mace_ros.model.batch_descriptor import BatchDescriptor
from mace_ros.model.cuda_graph_runner import CudaGraphRunner
from mace_ros.model.lora_mapping import BASE_SLOT
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.spans import OBSERVATION_TOKENS, Span
from mace_ros.scheduling.kv_cache_manager import KVCacheManager
from mace_ros.scheduling.plan import Plan, PrefillChunk, State
from mace_ros.scheduling.request import Request

TOLERANCE = 1e-4
PROMPT = 112     # tokens, seven blocks


pytestmark = pytest.mark.usefixtures('one_thread')


def random_ids(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCABULARY) for _ in range(count)]


# -- choosing blocks ---------------------------------------------------------------------


def test_the_least_attended_blocks_are_dropped_except_the_first_and_last() -> None:
    attention = [0.0] + [float(i % 7) + i / 1000 for i in range(1, 60)] + [0.0]
    assert blocks_to_drop(attention, 0.0, 16) == []
    assert blocks_to_drop(attention, 0.05, 16) == [7, 14, 21]
    everything = blocks_to_drop(attention, 0.9, 16)
    assert everything == list(range(1, 61 - RECENT_TOKENS // 16))
    assert blocks_to_drop(attention, 0.9, 16, window=600) == list(range(1, 61 - 38))
    assert blocks_to_drop(attention[:9], 0.9, 16) == []


def running(pool: BlockPool, ids: list[int]) -> tuple[KVCacheManager, Request, State]:
    """Return a request whose prompt ``ids`` is computed."""
    kv_cache = KVCacheManager(pool)
    state = kv_cache.state
    request = Request('a', 0.0, len(ids), 50, 1.0, 1.0,
                      block_hashes=BlockHashes('v', ids, pool.block_size))
    state.waiting.add(request)
    admitted(kv_cache, request)
    return kv_cache, request, state


def admitted(kv_cache: KVCacheManager, request: Request) -> None:
    tokens = request.remaining_tokens
    kv_cache.allocate(Plan(prefill=(PrefillChunk(request, tokens),)), 0.0)
    kv_cache.commit(request, tokens)


def test_dropped_blocks_are_free_and_blocks_after_them_are_never_shared() -> None:
    pool = BlockPool(20, 4)
    ids = list(range(38))     # nine and a half blocks
    kv_cache, request, state = running(pool, ids)
    table = list(request.blocks)
    kv_cache.drop(request, [1, 2, 5])
    assert request.blocks == [table[i] for i in (0, 3, 4, 6, 7, 8, 9)]
    assert pool.held_blocks == 7
    assert request.cached_tokens == 38 - 12
    assert kv_cache.pruned_tokens == 12
    pool.check([request.blocks])

    assert request.block_hashes is not None
    ids.extend(range(100, 120))
    for _ in range(10):     # fill the last block of the prompt, and two more blocks
        request.output_tokens += 1
        kv_cache.allocate(Plan(decode=(request,)), 0.0)
        kv_cache.commit(request, 1)
    assert len(request.blocks) == 9
    # Only prompt blocks are cached: they were computed before any block was dropped.
    assert pool.lookup(request.block_hashes.first(12)) == table[:9]

    kv_cache.preempt(request)
    assert request.dropped_tokens == 0
    assert request.computed_tokens == 36     # all cached blocks
    pool.check([])
    admitted(kv_cache, request)
    pool.check([request.blocks])
    assert len(request.blocks) == 12
    kv_cache.free(request)
    pool.check([])
    assert not state.running


# -- attention scores, and decoding without some blocks ------------------------------------


def serve(model: PackedModel, ids: Sequence[int], blocks: Sequence[int], sizes: Sequence[int],
          attention: Tensor | None) -> Tensor:
    """Compute a prompt in chunks of these sizes in turn; return the last logits."""
    start, turn, logits = 0, 0, torch.zeros(0)
    while start < len(ids):
        end = min(start + sizes[turn % len(sizes)], len(ids))
        logits = model.run([
            Span(ids[start:end], start, blocks, BASE_SLOT, end == len(ids), attention=attention),
            Span(random_ids(turn, 9), 0, [14, 15], BASE_SLOT, False)])
        start, turn = end, turn + 1
    return logits.clone()


@pytest.mark.parametrize('sizes', [(1000,), (33,), (50, 1, 8), (100, 1)])
@pytest.mark.parametrize('family', [
    'llama', 'qwen3', 'gemma2', 'gpt-neox', 'gpt-oss', 'granite', 'deepseek-v2'])
def test_attention_scores_are_those_of_transformers(family: str, sizes: Sequence[int]) -> None:
    model, _, reference = with_reference(tiny_model(family))
    ids, scores = random_ids(1, PROMPT), torch.zeros(PROMPT)
    serve(model, ids, [7, 1, 6, 2, 5, 3, 4], sizes, scores)
    with torch.no_grad():
        output = reference(input_ids=torch.tensor([ids]), output_attentions=True)
    kinds = getattr(reference.config, 'layer_types', None) or ['full_attention'] * 3
    expected = sum(a[0, :, -OBSERVATION_TOKENS:].sum(1).mean(0) for a, kind in zip(
        output.attentions, kinds, strict=True) if kind == 'full_attention')
    assert relative_error(scores, expected) < TOLERANCE     # type: ignore[arg-type]


def hidden_logits(reference: PreTrainedModel, ids: Sequence[int], prompt: int,
                  hidden: Sequence[int], window: int = 0) -> Tensor:
    """Return transformers' logits if tokens after the prompt do not attend to hidden blocks."""
    count = len(ids)
    distance = torch.arange(count)[:, None] - torch.arange(count)[None]
    seen = distance >= 0
    for block in hidden:
        seen[prompt:, block * BLOCK_TOKENS:(block + 1) * BLOCK_TOKENS] = False
    # Additive masks for each kind of layer, as eager attention expects them.
    masks = {'full_attention': seen, 'sliding_attention': (distance >= 0) & (distance < window)}
    ready = {kind: torch.zeros(1, 1, count, count).masked_fill(~mask, torch.finfo().min)
             for kind, mask in masks.items()}
    with torch.no_grad():
        logits: Tensor = reference(
            input_ids=torch.tensor([ids]), use_cache=False,
            attention_mask=ready if window else ready['full_attention']).logits[0]
    return logits


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('family', [
    'llama', 'qwen3', 'gemma2', 'gemma3', 'gpt-neox', 'granite', 'cohere2', 'smollm3'])
def test_decoding_without_dropped_blocks_gives_the_logits_of_transformers(
        family: str, padded: bool) -> None:
    model, _, reference = with_reference(tiny_model(family))
    windowed = family in ('gemma2', 'gemma3', 'cohere2')
    assert longest_window(reference, CONTEXT) == (WINDOW if windowed else 0)
    ids, answer = random_ids(1, PROMPT), random_ids(2, 24)
    blocks, hidden = [7, 1, 6, 2, 5, 3, 4, 9, 10], [1, 3, 4]
    serve(model, ids, blocks, (1000,), None)
    kept = [b for i, b in enumerate(blocks) if i not in hidden]
    dropped = len(hidden) * BLOCK_TOKENS

    runner = CudaGraphRunner(model)
    model.fast_passes = runner
    ours, other = [], random_ids(3, 40)
    for i in range(20):     # beside a longer sequence without dropped blocks
        spans = [Span(answer[i:i + 1], PROMPT + i, kept, BASE_SLOT, True, dropped),
                 Span(other[i:i + 1], i, [14, 15], BASE_SLOT, False)]
        if padded:
            runner.prepare(BatchDescriptor.of(spans, None))
        ours.append(model.run(spans)[0].clone())
    ours.append(model.run([Span(answer[20:], PROMPT + 20, kept, BASE_SLOT, True, dropped)])[0])

    theirs = hidden_logits(reference, ids + answer, PROMPT, hidden, WINDOW if windowed else 0)
    indices = [*range(PROMPT, PROMPT + 20), PROMPT + 23]
    assert relative_error(torch.stack(ours), theirs[indices]) < TOLERANCE
    full = hidden_logits(reference, ids + answer, PROMPT, [], WINDOW if windowed else 0)
    assert relative_error(full[indices], theirs[indices]) > 10 * TOLERANCE


# -- in the engine -------------------------------------------------------------------------


@pytest.fixture(scope='module')
def settings(tiny_settings: Settings, all_tokens: Path) -> Settings:
    """Return settings for a tiny model with all tokens, without learning."""
    return tiny_settings.updated({
        'model.source': str(all_tokens), 'finetune.budget': 0.0, 'memory.kv_cache_tokens': 4096})


LONG = SYSTEM * 8


@pytest.fixture
def dropped(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Return a list that receives the indices of dropped blocks, once for each prompt."""
    calls: list[list[int]] = []
    drop = KVCacheManager.drop

    def recording(kv_cache: KVCacheManager, request: Request, indices: Sequence[int]) -> None:
        if indices:
            calls.append(list(indices))
        drop(kv_cache, request, indices)

    monkeypatch.setattr(KVCacheManager, 'drop', recording)
    return calls


def test_a_response_with_pruning_is_that_of_transformers_without_the_dropped_blocks(
        settings: Settings, tmp_path: Path, all_tokens: Path, dropped: list[list[int]]) -> None:
    """Half of the blocks are dropped after the first token."""
    with robot_with(settings, tmp_path, memory__kv_prune=0.5) as one:
        free = one.engine.free_kv_tokens
        ids = one.engine.chat.prompt([{'role': 'system', 'content': LONG},
                                      {'role': 'user', 'content': 'Well?'}])
        assert len(ids) > LONG_TOKENS
        one.engine.submit(Query('Well?', id='q', system=LONG, max_tokens=12, temperature=0.0))
        one.until(lambda e: isinstance(e, ResponseChunk))
        held = (free - one.engine.free_kv_tokens) // BLOCK_TOKENS
        response = one.response('q')
        short = one.ask('Well?', max_tokens=4)
        assert short.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)

    blocks = -(-len(ids) // 16)
    assert len(dropped) == 1     # the short prompt is not pruned
    assert len(dropped[0]) == blocks // 2
    assert held <= blocks - blocks // 2 + 1
    reference = AutoModelForCausalLM.from_pretrained(all_tokens, attn_implementation='eager')
    count, expected = len(ids), list(ids)
    for _ in range(response.output_tokens):
        logits = hidden_logits(reference, expected, count, dropped[0])
        expected.append(int(logits[-1].argmax()))
    tokenizer = one.engine.chat.tokenizer
    assert response.text == tokenizer.decode(expected[count:], skip_special_tokens=True)


def test_the_pruning_parameter_applies_from_the_next_query(
        settings: Settings, tmp_path: Path, dropped: list[list[int]]) -> None:
    """Prompts are shared before, during and after pruning."""
    with robot_with(settings, tmp_path) as one:
        def ask(fraction: float) -> tuple[str, int, int]:
            one.engine.update(one.engine.settings.updated({'memory.kv_prune': fraction}))
            one.engine.step()
            dropped.clear()
            shared = one.engine.status().shared_tokens
            text = one.ask('Well?', system=LONG, max_tokens=30, temperature=0.0).text
            return (text, BLOCK_TOKENS * sum(map(len, dropped)),
                    one.engine.status().shared_tokens - shared)

        off, pruned, again = ask(0.0), ask(0.75), ask(0.0)
        assert off[1] == again[1] == 0
        assert pruned[1] > 300
        assert again[0] == off[0]
        assert pruned[2] == again[2] > LONG_TOKENS - 16


def test_a_pruned_request_can_be_preempted_and_recomputed(
        settings: Settings, tmp_path: Path, dropped: list[list[int]]) -> None:
    """After recomputation its blocks may be dropped again."""
    with robot_with(settings, tmp_path, memory__kv_prune=0.5, memory__kv_cache_tokens=1280,
               memory__prefix_sharing=False) as tight:
        for n in range(4):
            tight.engine.submit(Query(
                f'Well? {n}', id=str(n), system=LONG, max_tokens=400, seed=n, temperature=1.0,
                ttft_slo_ms=600000.0))
        waiting = {str(n) for n in range(4)}
        while waiting:
            event = tight.until(lambda e: getattr(e, 'query_id', '') in waiting
                                and hasattr(e, 'finish_reason'))
            assert event.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)   # type: ignore[union-attr]
            waiting.discard(event.query_id)     # type: ignore[union-attr]
        assert BLOCK_TOKENS * sum(map(len, dropped)) >= 4 * 256
        assert tight.engine.status().preemptions > 0
