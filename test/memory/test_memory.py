# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Paging, prefix sharing and preemption change no response."""

from __future__ import annotations

from collections.abc import Callable
import copy
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
import random

from hypothesis import given, settings as hypothesis_settings, strategies as st
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
    VOCABULARY,
    with_reference,
)
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mace_ros.api.settings import Settings
from mace_ros.memory import block_hashes
from mace_ros.memory.block_hashes import BlockHashes
from mace_ros.memory.block_pool import BLOCK_TOKENS, BlockPool
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.lora_mapping import BASE_SLOT, FIRST_SERVED_SLOT
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.spans import Span
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.kv_cache_manager import KVCacheManager
from mace_ros.scheduling.plan import Plan, PrefillChunk
from mace_ros.scheduling.request import Request, RequestState
from mace_ros.scheduling.scheduler import Scheduler

TOLERANCE = 1e-4
TIE = 1e-4      # logits closer than this may swap places
RESPONSE_TOKENS = 6

pytestmark = pytest.mark.usefixtures('one_thread')


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
@hypothesis_settings(max_examples=2)
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

    Returns how much of the prefix was in the cache before each version served.
    """
    model, lora, reference = with_reference(
        random_model('Llama'), kv_tokens=20 * BLOCK_TOKENS, slots=2, invocation=invocation)
    rng = random.Random(0)
    schedule, cached = Schedule(model, rng, 20), []
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
        cached.append(schedule.kv_cache.cached_tokens(
            BlockHashes(f'\n{number}', prefix, BLOCK_TOKENS, adapted_from), len(prefix)))
        schedule.serve(sequences)
        for sequence in sequences:
            assert_response_of(served, sequence)
        assert schedule.kv_cache.shared_tokens > before     # within the version
    return cached


def test_a_block_is_shared_only_within_the_version_that_computed_it(tmp_path: Path) -> None:
    assert serve_swapped_versions(tmp_path) == [0, 0, 0]


def test_blocks_before_the_last_turn_are_shared_by_all_versions(tmp_path: Path) -> None:
    invocation = (VOCABULARY - 1, VOCABULARY - 2)
    assert serve_swapped_versions(tmp_path, invocation) == [0, 40, 40]


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
