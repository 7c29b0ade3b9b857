# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The memory budget serves requests first, and a fine-tune step takes no more than predicted."""

from __future__ import annotations

from dataclasses import dataclass, replace
import gc
import random

from hypothesis import given, strategies as st
import pytest
from support.families import random_ids, tiny_model, with_reference
from support.finetuning import prefixes_of
from support.peak import Peak
import torch

from mace_ros.finetune.footprint import measure_footprint
from mace_ros.finetune.sample import Sample
from mace_ros.finetune.step import FinetuneStep
from mace_ros.finetune.trainer import Trainer
from mace_ros.memory.block_pool import BLOCK_TOKENS, BlockPool
from mace_ros.memory.budget import Footprint, Grant, MemoryBudget, MIN_CHUNK_TOKENS
from mace_ros.model.paged_attention import PagedAttention, row_bytes
from mace_ros.scheduling.kv_cache_manager import KVCacheManager
from mace_ros.scheduling.memory_arbiter import MemoryArbiter
from mace_ros.scheduling.plan import SegmentKind
from mace_ros.scheduling.request import Request, RequestState

pytestmark = pytest.mark.usefixtures('one_thread')

FOOTPRINT = Footprint(kv_block=900, adapters=5000, layers=9, hidden_token=10, logits_row=8,
                      graphs=((10, 1000), (20, 4000)))


def test_the_budget_serves_requests_first_then_a_step_then_the_prefix_cache() -> None:
    budget = MemoryBudget(FOOTPRINT, 60_000, max_blocks=1000, pass_tokens=10, rows=1)
    free = 60_000 - budget.fixed
    assert budget.kv_capacity == budget.kv_limit == free // 1000
    graphs, again = (FOOTPRINT.step_bytes([10, 10], keep_graphs=k) for k in (True, False))
    held = [int((free - needed) // 1000) for needed in (graphs, again)]
    grants = [budget.grant([10, 10], held_blocks=n, keep_graphs=True)
              for n in (held[0], held[0] + 1, held[1], held[1] + 1)]
    assert grants == [
        Grant(graphs, True, 20), Grant(again, False, 20), Grant(again, False, 20), None]
    budget.learning = again
    assert budget.kv_limit == held[1] < budget.kv_capacity
    most = budget.step_tokens(10**6, held_blocks=held[1])
    assert FOOTPRINT.max_step_bytes(most) <= free - held[1] * 1000
    assert FOOTPRINT.step_bytes([most + 1], keep_graphs=False) > free - held[1] * 1000
    budget.total = 1000.0
    assert budget.kv_capacity == 0 and budget.step_tokens(100, held_blocks=0) == 0


def test_a_step_that_would_never_fit_whole_gets_smaller_chunks() -> None:
    whole, chunked = (FOOTPRINT.step_bytes([80], keep_graphs=False, chunk_tokens=n)
                     for n in (None, 20))
    budget = MemoryBudget(FOOTPRINT, 0.0, max_blocks=1000, pass_tokens=10, rows=1)
    budget.total = budget.fixed + chunked + 1000

    def granted(blocks: int, chunk_tokens: int | None = None, *,
                urgent: bool = False) -> Grant | None:
        return budget.grant([80], held_blocks=blocks, keep_graphs=True,
                            chunk_tokens=chunk_tokens, urgent=urgent)

    assert granted(0) == granted(1) == granted(0, 40) == Grant(chunked, False, 20)
    assert granted(2) is None       # waits until blocks are released
    assert granted(0, 17) == Grant(
        FOOTPRINT.step_bytes([80], keep_graphs=False, chunk_tokens=17), False, 17)
    budget.total = budget.fixed + whole
    assert granted(0) == Grant(whole, False, 80)
    assert granted(1) is None       # only an urgent step is divided further
    assert granted(1, urgent=True) == Grant(
        FOOTPRINT.step_bytes([80], keep_graphs=False, chunk_tokens=40), False, 40)
    assert granted(10**6, urgent=True) is None
    budget.total = budget.fixed
    assert granted(0) is None


@dataclass(eq=False)
class Step:
    """A fine-tune step as the memory arbiter sees it."""

    lengths: tuple[int, ...] = (80,)
    learns: bool = True
    keep_graphs: bool = False
    chunk_tokens: int = 80
    blocks: tuple[list[int], ...] = ()

    def save_memory(self, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens

    def restart(self) -> bool:
        return True

    def take_blocks(self) -> list[list[int]]:
        return []


def test_finished_requests_make_room_for_an_overdue_step_and_no_running_one_is_preempted() -> None:
    budget = MemoryBudget(FOOTPRINT, 0.0, max_blocks=1000, pass_tokens=10, rows=1)
    step, least = Step(), FOOTPRINT.min_step_bytes([80])
    budget.total = budget.fixed + least + 3000
    pool = BlockPool(1000, BLOCK_TOKENS)
    kv_cache = KVCacheManager(pool)
    state = kv_cache.state
    arbiter = MemoryArbiter(budget, kv_cache)
    whole = pool.limit
    # One request decodes in full blocks; half of the other's prompt is computed.
    for name, computed, output in (('a', 48, 9), ('b', 48, 0)):
        state.running.append(Request(
            name, 0.0, 40 if output else 96, 20, 1.0, 1.0, state=RequestState.RUNNING,
            computed_tokens=computed, output_tokens=output, blocks=pool.allocate(computed)))
    assert not arbiter.grant(step) and pool.limit == whole
    assert not arbiter.grant(step, overdue=True)
    assert pool.limit == 4 + 7      # with the next token of each
    assert not arbiter.grant(None) and pool.limit == whole
    assert not arbiter.grant(step) and pool.limit == whole
    kv_cache.free(state.running[1])
    assert not arbiter.grant(step, overdue=True) and pool.limit == 4
    state.running[0].dropped_tokens = 16
    pool.release([state.running[0].blocks.pop(0)])
    assert arbiter.grant(step, overdue=True) and pool.limit == 3
    assert step.chunk_tokens == MIN_CHUNK_TOKENS
    # It keeps the memory, unless requests lack it and the step is no longer overdue.
    assert not arbiter.reclaim(True, overdue=True) and arbiter.grant(step)
    assert arbiter.reclaim(True) and not arbiter.grant(step) and pool.limit == whole


def test_a_step_whose_chunks_do_not_fit_is_not_assumed_to_fit_whole() -> None:
    """Chunks are bounded by time, too: a step that would fit whole must not wait for ever."""
    footprint = replace(FOOTPRINT, kv_block=9000)
    step = Step(lengths=(20,), chunk_tokens=MIN_CHUNK_TOKENS)
    whole, chunked = (footprint.step_bytes([20], keep_graphs=False, chunk_tokens=n)
                     for n in (None, MIN_CHUNK_TOKENS))
    assert whole < chunked
    budget = MemoryBudget(footprint, 0.0, max_blocks=1000, pass_tokens=10, rows=1)
    arbiter = MemoryArbiter(budget, KVCacheManager(BlockPool(1000, BLOCK_TOKENS)))
    for total, fits in ((whole, False), (chunked, True)):
        budget.total = budget.fixed + total
        assert (arbiter.shortage(step) == '') is fits
        assert arbiter.grant(step, overdue=True) is fits


@pytest.mark.parametrize('before', [0, 24])
def test_graphs_are_kept_if_memory_allows(before: int) -> None:
    """A prefix takes memory for a copy per sample."""
    model, lora, _ = with_reference(tiny_model('llama'))
    rng = random.Random(0)
    prefix = tuple(random_ids(rng, before))
    samples = [Sample((*prefix, *random_ids(rng, 10)), (0.0,) * (before + 5) + (1.0,) * 5,
                      adapted_from=before) for _ in range(8)]
    step = FinetuneStep(model, Trainer(lora, 1e-3), samples, chunk_tokens=200,
                        prefixes=prefixes_of(model, samples))
    footprint = measure_footprint(model, lora)
    budget = MemoryBudget(footprint, 1e9, max_blocks=1000, pass_tokens=10, rows=1)
    arbiter = MemoryArbiter(budget, KVCacheManager(BlockPool(1000, BLOCK_TOKENS)))
    assert arbiter.grant(step) and step.keep_graphs
    assert SegmentKind.BACKWARD in {s.kind for s in step.segments()}


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8),
       st.lists(st.integers(1, 5000), min_size=1, max_size=4), st.booleans())
def test_max_step_bytes_bounds_every_split_into_sequences(
        lengths: list[int], sizes: list[int], packed: bool) -> None:
    """Otherwise a step that was cut to fit would wait for ever."""
    footprint = replace(FOOTPRINT, packed=packed, graphs=tuple(
        (8 * 2 ** i, size) for i, size in enumerate(sorted(sizes))))
    assert (footprint.step_bytes(lengths, keep_graphs=False)
            <= footprint.max_step_bytes(sum(lengths)) * (1 + 1e-9))


def test_graph_bytes_are_interpolated_linearly_and_extrapolated_quadratically() -> None:
    assert [FOOTPRINT.graph_bytes(n) for n in (5, 10, 15, 20)] == [500, 1000, 2500, 4000]
    assert FOOTPRINT.graph_bytes(40) == 16_000     # 10 n²
    assert replace(FOOTPRINT, graphs=((10, 1000), (20, 2000))).graph_bytes(40) == 4000


# -- predicted memory --------------------------------------------------------------------


def test_measuring_the_footprint_is_repeatable_and_leaves_no_graphs() -> None:
    model, lora, _ = with_reference(tiny_model('llama'))

    def graphs() -> int:
        gc.collect()
        return sum(isinstance(o, torch.Tensor) and o.grad_fn is not None
                   for o in gc.get_objects())

    before = graphs()
    counts = [measure_footprint(model, lora).graphs for _ in range(3)]
    assert graphs() == before
    assert counts[1:] == counts[:-1]
    # A graph grows at least in proportion to its tokens, unless a part was not counted.
    each = [size / tokens for tokens, size in counts[0]]
    assert each[0] <= each[-1] and min(each) > 0.99 * each[0]


@pytest.mark.parametrize('before', [0, 24, 80])
@pytest.mark.parametrize(('keep_graphs', 'chunk_tokens'), [(True, None), (False, None), (True, 60)])
@pytest.mark.parametrize('family', ['llama', 'gemma2', 'qwen3-moe'])
def test_a_step_takes_no_more_memory_than_predicted(
        family: str, keep_graphs: bool, chunk_tokens: int | None, before: int) -> None:
    model, lora, _ = with_reference(tiny_model(family))
    footprint = measure_footprint(model, lora)
    rng = random.Random(0)
    prefix = tuple(random_ids(rng, before))
    # After a prefix, many short samples, as corrections are.
    lengths = (30, 20, 25, 12, 18, 30, 40, 22, 35, 15, 9, 28, 17) if before else (150, 120, 90)
    samples = [Sample((*prefix, *random_ids(rng, n)),
                      (0.0,) * (before + n // 2) + (1.0,) * (n - n // 2), adapted_from=before)
               for n in lengths]
    trainer, prefixes = Trainer(lora, 1e-3), prefixes_of(model, samples)
    with Peak() as peak:
        step = FinetuneStep(
            model, trainer, samples, keep_graphs=keep_graphs, chunk_tokens=chunk_tokens,
            prefixes=prefixes)
        while not step.done:
            step.run_segment()
    predicted = footprint.step_bytes(
        step.lengths, keep_graphs=keep_graphs, chunk_tokens=chunk_tokens)
    gradients = sum(p.nbytes for p in lora.parameters())     # counted with the adapters
    assert 0.4 * predicted <= peak.most - gradients <= predicted


@pytest.mark.parametrize('processors', [1, 16, 132])
@pytest.mark.parametrize('rows, blocks', [(1, 8), (1, 1024), (4, 64), (16, 8), (16, 1024)])
def test_paged_attention_takes_no_more_memory_than_counted(
        processors: int, rows: int, blocks: int) -> None:
    heads, kv_heads, size = 32, 8, 64
    cache = torch.zeros(64, kv_heads, size, dtype=torch.bfloat16, device='meta')
    tables, lengths = (torch.zeros(shape, dtype=torch.long, device='meta')
                       for shape in ((rows, blocks), (rows,)))
    query = torch.zeros(rows, heads, size, dtype=torch.bfloat16, device='meta')
    with Peak() as peak:
        PagedAttention(processors).attend(query, cache, cache, tables, lengths)
    counted = rows * row_bytes(heads, size, 2)
    assert 0.01 * counted <= peak.most <= counted


def test_the_largest_pass_attends_to_the_whole_cache() -> None:
    budget, masked = (
        MemoryBudget(replace(FOOTPRINT, attended_key=n), 0.0, max_blocks=100, pass_tokens=10,
                     rows=1, resident=True) for n in (0, 3))
    assert masked.fixed - budget.fixed == 10 * 100 * BLOCK_TOKENS * 3
