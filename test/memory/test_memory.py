# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Paging, prefix sharing and preemption change no response, and lose no block."""

from __future__ import annotations

from collections.abc import Callable
import copy
from dataclasses import dataclass, field, replace
from functools import cache
import gc
from itertools import accumulate
from pathlib import Path
import random
import weakref

from hypothesis import given, settings as hypothesis_settings, strategies as st
from peft import PeftModel
import pytest
from support.families import (
    FAMILIES,
    publish,
    random_adapter,
    random_model,
    relative_error,
    TARGETS,
    tiny_model,
    VOCABULARY,
    with_reference,
)
from support.finetuning import prefixes_of
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from mace_ros.api.settings import Settings
from mace_ros.finetune.footprint import measure_footprint
from mace_ros.finetune.sample import Sample
from mace_ros.finetune.step import FinetuneStep
from mace_ros.finetune.trainer import Trainer
from mace_ros.memory import block_hashes
from mace_ros.memory.block_hashes import BlockHashes
from mace_ros.memory.block_pool import BLOCK_TOKENS, BlockPool, OutOfBlocks
from mace_ros.memory.budget import Footprint, Grant, MemoryBudget, MIN_CHUNK_TOKENS
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.lora_mapping import BASE_SLOT, FIRST_SERVED_SLOT
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.spans import Span
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.kv_cache_manager import KVCacheManager
from mace_ros.scheduling.memory_arbiter import MemoryArbiter
from mace_ros.scheduling.plan import Plan, PrefillChunk, SegmentKind
from mace_ros.scheduling.request import Request, RequestState
from mace_ros.scheduling.scheduler import Scheduler

TOLERANCE = 1e-4
TIE = 1e-4      # logits closer than this may swap places
RESPONSE_TOKENS = 6


pytestmark = pytest.mark.usefixtures('one_thread')


# -- block pool --------------------------------------------------------------------------


@hypothesis_settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_block_is_lost_and_a_hash_finds_its_content(data: st.DataObject) -> None:
    pool = BlockPool(10, 4)
    tables: list[list[int]] = []
    written: dict[int, bytes] = {}     # content of each block
    hashes = [bytes([n]) for n in range(6)]
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(['take', 'grow', 'share', 'release', 'shrink']))
        if action == 'take' or not tables:
            table: list[int] = []
            tables.append(table)
            fresh(pool, table, data.draw(st.integers(0, 12)), written, data)
        elif action == 'grow':
            table = data.draw(st.sampled_from(tables))
            fresh(pool, table, len(table) * 4 + data.draw(st.integers(0, 8)), written, data)
        elif action == 'share':
            wanted = data.draw(st.lists(st.sampled_from(hashes), max_size=3, unique=True))
            found = pool.lookup(wanted)
            assert [written[b] for b in found] == wanted[:len(found)]
            if pool.held_among(found) + pool.free_blocks >= len(found):
                tables.append(pool.acquire(found))
        elif action == 'release':
            table = tables.pop(data.draw(st.integers(0, len(tables) - 1)))
            before, free = pool.frees(table), pool.free_blocks
            pool.release(table)
            assert table == [] and pool.free_blocks == free + before
        else:
            pool.shrink(data.draw(st.integers(1, 10)))
        moved = pool.compact()
        content = {new: written[old] for old, new in moved.items()}
        written |= content
        for table in tables:
            table[:] = [moved.get(b, b) for b in table]
        pool.check(tables)
        assert pool.cached_blocks <= max(pool.free_blocks, 0)
        if pool.free_blocks >= 0:
            assert all(b < pool.limit for table in tables for b in table)
    for table in tables:
        pool.release(table)
    pool.check([])
    assert pool.free_blocks == pool.limit


def fresh(pool: BlockPool, table: list[int], tokens: int, written: dict[int, bytes],
          data: st.DataObject) -> None:
    """Grow a table, write content into each new block, and perhaps cache it."""
    held, before = len(table), list(table)
    try:
        pool.grow(table, tokens)
    except OutOfBlocks:
        assert pool.blocks_for(tokens) - held > pool.free_blocks and table == before
        return
    for block in table[held:]:
        written[block] = bytes([data.draw(st.integers(0, 5))])
        if data.draw(st.booleans()):
            pool.cache(block, written[block])


def test_eviction_takes_the_least_recently_used_block_and_prefixes_last() -> None:
    pool = BlockPool(4, 16)
    one, two = pool.allocate(32), pool.allocate(32)
    for table, hashes in ((one, (b'a', b'b')), (two, (b'c', b'd'))):
        for block, block_hash in zip(table, hashes, strict=True):
            pool.cache(block, block_hash)
        pool.release(table)
    pool.release(pool.acquire(pool.lookup([b'a'])))     # now most recently used
    held = [pool.allocate(16)]
    assert (pool.lookup([b'a']), pool.lookup([b'd'])) != ([], []) and not pool.lookup([b'b'])
    held.append(pool.allocate(16))
    assert pool.lookup([b'c']) == [] or pool.lookup([b'd']) == []
    held += [pool.allocate(16)]
    assert len(pool.lookup([b'a'])) == 1
    held += [pool.allocate(16)]
    assert pool.lookup([b'a']) == []
    with pytest.raises(OutOfBlocks):
        pool.allocate(1)


def test_check_finds_leaked_and_doubly_used_blocks() -> None:
    pool = BlockPool(4, 16)
    table = pool.allocate(20)
    pool.check([table])
    with pytest.raises(AssertionError, match='without a table'):
        pool.check([])
    with pytest.raises(AssertionError, match='in more tables'):
        pool.check([table, [table[0]]])


# -- memory budget -----------------------------------------------------------------------

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


# -- responses in random schedules -------------------------------------------------------


@dataclass
class Sequence:
    """A prompt with greedy decoding under a version, and the logits of its response."""

    ids: list[int]
    slot: int
    version: str
    adapted_from: int = 0
    request: Request = field(init=False)
    logits: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.request = Request(
            id=str(id(self)), arrival=0.0, prompt_tokens=len(self.ids), max_tokens=RESPONSE_TOKENS,
            ttft_slo=1.0, tpot_slo=1.0,
            block_hashes=BlockHashes(
                self.version, self.ids, BLOCK_TOKENS, self.adapted_from),
            adapter_slot=self.slot)

    @property
    def done(self) -> bool:
        return self.request.output_tokens == RESPONSE_TOKENS


@dataclass
class Schedule:
    """Serves sequences in random passes, with preemptions, in a pool that is too small."""

    model: PackedModel
    rng: random.Random
    blocks: int

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.blocks, BLOCK_TOKENS)
        self.kv_cache = KVCacheManager(self.pool)
        self.state = self.kv_cache.state
        self.computed = 0

    def serve(self, sequences: list[Sequence], between: Callable[[], None] = lambda: None) -> None:
        """Serve sequences that arrive one by one; call ``between`` between passes."""
        coming = list(sequences)
        by_request = {s.request: s for s in sequences}
        while coming or self.state.has_requests:
            while coming and (not self.state.has_requests or self.rng.random() < 0.4):
                sequence = coming.pop(0)
                sequence.request.arrival = float(-len(coming))
                self.state.waiting.add(sequence.request)
            plan = self._plan()
            self.kv_cache.allocate(plan, 0.0)
            self.pool.check([r.blocks for r in self.state.running])
            work = [*((r, 1) for r in plan.decode), *((c.request, c.tokens) for c in plan.prefill)]
            if work:
                self._run([(by_request[r], n) for r, n in work])
            between()
        self.pool.check([])

    def _plan(self) -> Plan:
        """Return a random plan that fits; a plan that preempts admits no request."""
        rng, state = self.rng, self.state
        preempted = [r for r in state.running if rng.random() < 0.05]
        free = self.pool.free_blocks + sum(map(state.cache.blocks_freed_by, preempted))
        candidates = [r for r in state.running if r not in preempted]
        for request in [] if preempted else state.waiting:
            state.cache.get_computed_blocks(request)
            candidates.append(request)
        rng.shuffle(candidates)
        decode, prefill = [], []
        for request in candidates[:rng.randint(1, 4)]:
            tokens = min(rng.choice((1, 3, 8, 19)), request.remaining_tokens)
            growth = self.pool.blocks_for(request.computed_tokens + tokens) - (
                len(request.blocks) or request.shared_blocks)
            if growth > free:
                continue
            free -= growth
            if request.is_decoding and request.state is RequestState.RUNNING:
                decode.append(request)
            else:
                prefill.append(PrefillChunk(request, tokens))
        if not (decode or prefill or preempted) and state.running:
            preempted = [rng.choice(state.running)]
        return Plan(decode=tuple(decode), prefill=tuple(prefill), preempted=tuple(preempted))

    def _run(self, work: list[tuple[Sequence, int]]) -> None:
        spans = []
        for sequence, tokens in work:
            request = sequence.request
            first = request.computed_tokens
            spans.append(Span(sequence.ids[first:first + tokens], first, request.blocks,
                              sequence.slot, tokens == request.remaining_tokens,
                              adapted_from=sequence.adapted_from))
            self.computed += tokens
        logits = iter(self.model.run(spans))
        for (sequence, tokens), span in zip(work, spans, strict=True):
            self.kv_cache.commit(sequence.request, tokens)
            if span.wants_logits:
                sequence.logits.append(next(logits).clone())
                sequence.ids.append(int(sequence.logits[-1].argmax()))
                sequence.request.output_tokens += 1
                if sequence.done:
                    self.kv_cache.free(sequence.request)


def assert_response_of(model: PreTrainedModel, sequence: Sequence) -> None:
    """Compare all logits with ``generate``, and all tokens up to a tie of the best two."""
    prompt = sequence.ids[:sequence.request.prompt_tokens]
    with torch.no_grad():
        output = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=RESPONSE_TOKENS,
            output_logits=True, return_dict_in_generate=True)
    expected = output.sequences[0, len(prompt):].tolist()
    response = sequence.ids[len(prompt):]
    assert len(response) == RESPONSE_TOKENS
    for ours, theirs, token, right in zip(
            sequence.logits, output.logits, response, expected, strict=True):
        assert relative_error(ours, theirs[0]) < TOLERANCE
        if token != right:
            best, second = theirs[0].topk(2).values
            assert best - second < TIE
            return   # after a tie the texts may differ


def random_ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(2, VOCABULARY) for _ in range(count)]


def prompts(rng: random.Random, count: int) -> list[list[int]]:
    """Return prompts, many with a common prefix, which may end at a block or with the prompt."""
    prefixes = list(accumulate(random_ids(rng, n) for n in (16, 7, 25)))
    return [rng.choice(prefixes) + random_ids(rng, rng.choice((1, 5, 16, 21)))
            for _ in range(count)] + [list(prefixes[1]), list(prefixes[1])]


@cache
def family_model(family: str) -> tuple[PackedModel, LoRAManager, PreTrainedModel]:
    return with_reference(tiny_model(family), kv_tokens=12 * BLOCK_TOKENS,
                          targets=TARGETS.get(family, 'all-linear'))


@pytest.mark.parametrize('family', FAMILIES)
@hypothesis_settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 10**6), blocks=st.sampled_from((6, 12)))
def test_responses_do_not_depend_on_the_schedule(family: str, seed: int, blocks: int) -> None:
    model, _, reference = family_model(family)
    rng = random.Random(seed)
    schedule = Schedule(model, rng, blocks)
    sequences = [Sequence(ids, BASE_SLOT, '') for ids in prompts(rng, 4)]
    schedule.serve(sequences)
    for sequence in sequences:
        assert_response_of(reference, sequence)


def test_a_waiting_request_shares_the_blocks_that_are_cached_when_it_is_admitted() -> None:
    """Blocks that it shared when it was preempted may have been evicted since."""
    kv_cache = KVCacheManager(BlockPool(20, BLOCK_TOKENS))
    state = kv_cache.state
    request = Request('0', 0.0, 170, 10, 1.0, 1.0,
                      block_hashes=BlockHashes('', range(170), BLOCK_TOKENS))
    state.waiting.add(request)
    request.computed_tokens, request.shared_blocks = 160, 10
    plan = Scheduler(Settings(), CostModel()).plan(state, 0.0)
    assert plan.prefill[0].tokens > 10
    kv_cache.allocate(plan, 0.0)
    assert (request.computed_tokens, request.shared_blocks) == (0, 0)
    assert len(request.blocks) * BLOCK_TOKENS >= plan.prefill[0].tokens


def test_random_schedules_preempt_and_share() -> None:
    """Otherwise the test of schedules would not test preemption and sharing."""
    model = family_model('llama')[0]
    schedule = Schedule(model, random.Random(1), 6)
    sequences = [Sequence(ids, BASE_SLOT, '') for ids in prompts(random.Random(1), 12)]
    schedule.serve(sequences)
    assert schedule.kv_cache.preemptions > 3
    assert schedule.kv_cache.shared_tokens > 100


# -- blocks that an adapter acts on are shared only within its version -------------------


def serve_swapped_versions(folder: Path, invocation: tuple[int, ...] = ()) -> list[int]:
    """
    Publish versions in turn into two slots; raises if a response is not its version's.

    Returns the tokens that each version found in the prefix cache.
    """
    model, lora, reference = with_reference(
        random_model('Llama'), kv_tokens=20 * BLOCK_TOKENS, slots=2, invocation=invocation)
    rng = random.Random(0)
    schedule, shared = Schedule(model, rng, 20), []
    prefix = random_ids(rng, 40)
    adapted_from = len(prefix) if invocation else 0
    for number in range(1, 4):
        # Two slots: this version overwrites the one before the last.
        slot = FIRST_SERVED_SLOT + number % 2
        path = publish(folder / str(number), lora, random_adapter(lora, number))
        lora.write_slot(slot)
        served = PeftModel.from_pretrained(copy.deepcopy(reference), str(path)).eval()
        sequences = [Sequence([*prefix, *invocation, *random_ids(rng, 5)], slot, f'\n{number}',
                              adapted_from) for _ in range(3)]
        before = schedule.kv_cache.shared_tokens
        schedule.serve(sequences)
        for sequence in sequences:
            assert_response_of(served, sequence)
        shared.append(schedule.kv_cache.shared_tokens - before)
    return shared


def test_a_block_is_shared_only_within_the_version_that_computed_it(tmp_path: Path) -> None:
    assert all(shared > 0 for shared in serve_swapped_versions(tmp_path))


def test_blocks_before_the_last_turn_are_shared_by_all_versions(tmp_path: Path) -> None:
    first, *later = serve_swapped_versions(tmp_path, invocation=(0, 1))
    assert first < 3 * 32 and later == [3 * 32] * 2      # the full blocks of 40 tokens


@pytest.mark.parametrize('identity', [
    lambda version: '',                           # no version
    lambda version: str(int(version) % 2),        # the slot instead of the version
], ids=['none', 'slot'])
def test_hashes_without_the_version_give_wrong_responses(
        identity: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above detects it."""
    hashed = block_hashes.next_hash
    monkeypatch.setattr(block_hashes, 'next_hash', lambda parent, tokens, version: hashed(
        parent, tokens, identity(version)))
    with pytest.raises(AssertionError, match='relative_error'):
        serve_swapped_versions(tmp_path)


# -- predicted memory --------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """While open, counts the bytes of all tensors that operations create, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._known: dict[int, weakref.ref[object]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        before = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs))
                  if isinstance(x, Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._known and id(storage) not in before:
                    self._add(storage, storage.nbytes())
        return out

    def _add(self, storage: object, size: int) -> None:
        key = id(storage)

        def gone(_: object) -> None:
            self.bytes -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.most = max(self.most, self.bytes)


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
