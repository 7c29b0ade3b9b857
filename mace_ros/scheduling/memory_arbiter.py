# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Memory priority: serving, fine-tuning, prefix cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.memory.budget import MB, MemoryBudget
from mace_ros.scheduling.kv_cache_manager import KVCacheManager


class StepMemory(Protocol):
    """The arbiter's view of a fine-tune step."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each of its sequences."""

    @property
    def learns(self) -> bool:
        """Whether it has a backward."""

    @property
    def keep_graphs(self) -> bool:
        """Whether the layers' autograd graphs are kept for the backward."""

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a layer that are computed at once."""

    @property
    def blocks(self) -> Sequence[list[int]]:
        """KV block tables that it holds while its forward is piggybacked."""

    def save_memory(self, chunk_tokens: int) -> None:
        """Keep no graphs, and compute ``chunk_tokens`` tokens at once; only before it starts."""

    def restart(self) -> bool:
        """Discard all results, and piggyback no more; False if the step is almost done."""

    def take_blocks(self) -> list[list[int]]:
        """Hand over its KV block tables."""


class MemoryArbiter:
    """
    Keeps serving and learning within one memory budget.

    A step starts when it fits beside what the running requests hold. If requests need its
    memory later, the step is discarded and restarted. No request is preempted for a step: for an
    overdue one, blocks are reserved as requests end, and none is admitted in their place until
    the step fits.
    """

    def __init__(self, budget: MemoryBudget, kv_cache: KVCacheManager) -> None:
        """Apply the budget to the KV cache."""
        self.budget = budget
        self._kv_cache = kv_cache
        self._granted: StepMemory | None = None
        self._yielded = False    # a step made room for requests that may still lack memory
        self._limit_kv_cache()

    @property
    def granted(self) -> StepMemory | None:
        """The step that has memory to run."""
        return self._granted

    @property
    def max_request_tokens(self) -> int:
        """Tokens that a request can use when it is alone in the cache."""
        return self._kv_cache.capacity_tokens

    def step_tokens(self, limit: int) -> int:
        """Return the most tokens (0 to ``limit``) of a step that would fit now."""
        return self.budget.step_tokens(limit, held_blocks=self._kv_cache.pool.held_blocks)

    def resize(self, total: float) -> None:
        """
        Set the budget, in bytes, but at least what serving needs.

        A step that no longer fits is restarted.
        """
        self.budget.total = max(total, self.budget.minimum)
        self._limit_kv_cache()
        if self.budget.planned(self._kv_cache.pool.held_blocks) > self.budget.total:
            self._evict_step()

    def charge_graphs(self, size: float) -> None:
        """Count ``size`` bytes of device graphs as always in use."""
        self.budget.graphs = size
        self.resize(self.budget.total)

    def grant(self, step: StepMemory | None, *, overdue: bool = False) -> bool:
        """
        Return whether a step has the memory to run now; to be called before each plan.

        An ``overdue`` step is cut into smaller chunks or gets memory reserved, if that helps.
        """
        if step is not None and step is self._granted:
            return True
        self._granted, self.budget.learning, reserved = None, 0.0, 0.0
        if step is not None and (
                overdue or not (self._yielded and self._kv_cache.state.has_requests)):
            grant = self.budget.grant(
                step.lengths, held_blocks=self._claimed_blocks, keep_graphs=step.keep_graphs,
                learns=step.learns, chunk_tokens=step.chunk_tokens, urgent=overdue)
            if grant is not None:
                if not grant.keep_graphs and (
                        step.keep_graphs or grant.chunk_tokens < step.chunk_tokens):
                    step.save_memory(grant.chunk_tokens)
                self._granted, self.budget.learning = step, grant.bytes
            elif overdue:
                reserved = self.budget.footprint.min_step_bytes(
                    step.lengths, learns=step.learns, chunk_tokens=step.chunk_tokens)
        self._limit_kv_cache(reserved)
        return self._granted is not None

    def shortage(self, step: StepMemory) -> str:
        """Return why a step cannot run even without any request; empty if it can."""
        budget = self.budget
        needed = budget.fixed + budget.footprint.min_step_bytes(
            step.lengths, learns=step.learns, chunk_tokens=step.chunk_tokens)
        if step is self._granted or needed <= budget.total:
            return ''
        return (f'memory.budget_mb: {budget.total / MB:.0f} MB beside the base model, but '
                f'{needed / MB:.0f} MB are needed to learn {sum(step.lengths)} tokens')

    def reclaim(self, lacks_memory: bool, *, overdue: bool = False) -> bool:
        """
        Take the step's memory if the plan ``lacks_memory``; return whether to plan again.

        An ``overdue`` step keeps its memory: under lasting pressure it would restart for ever.
        """
        if overdue or not lacks_memory:
            self._yielded = False
            return False
        return self._evict_step()

    def _evict_step(self) -> bool:
        """
        Take the memory of the granted step, which begins again when there is memory.

        Returns False, and leaves the step alone, if that frees nothing or the step is almost done.
        """
        step, pool = self._granted, self._kv_cache.pool
        if step is None or not (step.blocks or pool.limit < self.budget.kv_capacity):
            return False
        if not step.restart():
            return False
        for blocks in step.take_blocks():
            pool.release(blocks)
        self._granted, self._yielded = None, True
        self.budget.learning = 0.0
        self._limit_kv_cache()
        return True

    @property
    def _claimed_blocks(self) -> int:
        """Blocks held, and needed for the rest of the running prompts and one more token each."""
        return self._kv_cache.pool.held_blocks + sum(
            max((r.known_tokens - r.dropped_tokens) // BLOCK_TOKENS + 1 - len(r.blocks), 0)
            for r in self._kv_cache.state.running)

    def _limit_kv_cache(self, reserved: float = 0.0) -> None:
        """
        Limit the KV cache to the rest of the budget.

        ``reserved`` bytes for a step are left free, too, as far as running requests do not claim
        them.
        """
        limit = self.budget.kv_limit
        if reserved:
            limit = min(limit, max(self.budget.kv_beside(reserved), self._claimed_blocks))
        if limit != self._kv_cache.pool.limit:
            self._kv_cache.pool.shrink(limit)
        self._kv_cache.capacity_blocks = self.budget.kv_capacity
