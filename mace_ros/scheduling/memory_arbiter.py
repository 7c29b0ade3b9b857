# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Who may use how much of the memory: answers first, then learning, then what may be of use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.memory.budget import MB, MemoryBudget
from mace_ros.scheduling.kv_cache_manager import KVCacheManager
from mace_ros.scheduling.plan import State


class StepMemory(Protocol):
    """A fine-tune step, as far as its memory goes."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of its sequences."""

    @property
    def learns(self) -> bool:
        """Whether it has a backward."""

    @property
    def keep_graphs(self) -> bool:
        """Whether its layers' graphs are kept for the backward."""

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a layer that are computed at once."""

    @property
    def blocks(self) -> Sequence[list[int]]:
        """KV blocks that it holds for riding."""

    def save_memory(self, chunk_tokens: int) -> None:
        """Keep no graphs, and compute so many tokens at once; only before it begins."""

    def restart(self) -> bool:
        """Begin anew without what was computed, unless it is all but done; it does not ride."""

    def take_blocks(self) -> list[list[int]]:
        """Give its KV blocks back."""


class MemoryArbiter:
    """
    Keeps answers and learning within one budget.

    A step begins when it fits beside what the running requests hold; when requests then
    need its memory, it begins anew later. It never takes blocks from a request: for one that
    is overdue, those that end make room, and nobody is admitted in their place until it fits.
    """

    def __init__(self, budget: MemoryBudget, kv_cache: KVCacheManager, state: State) -> None:
        """Put the budget in force."""
        self.budget = budget
        self._kv_cache, self._state = kv_cache, state
        self._granted: StepMemory | None = None
        self._yielded = False    # to requests, some of which still wait for memory
        self._limit()

    @property
    def longest(self) -> int:
        """Tokens that a request may come to when it has the cache for itself."""
        return self._kv_cache.capacity_tokens

    def step_tokens(self, most: int) -> int:
        """Return the most tokens (0 to ``most``) of a step that would fit now."""
        return self.budget.step_tokens(most, held_blocks=self._kv_cache.pool.held_blocks)

    def change(self, total: float) -> None:
        """
        Set another budget, in bytes; a step that no longer fits begins anew.

        With less than the least, nothing could be served: that much is taken in any case.
        """
        self.budget.total = max(total, self.budget.minimum)
        self._limit()
        if self.budget.planned(self._kv_cache.pool.held_blocks) > self.budget.total:
            self._give_up()

    def allows(self, step: StepMemory | None, *, overdue: bool = False) -> bool:
        """
        Whether a step may run now; asked before each plan, since it may only just fit.

        One that is ``overdue`` is cut into smaller pieces or gets room by and by, if that helps.
        """
        if step is not None and step is self._granted:
            return True
        self._granted, self.budget.learning, reserved = None, 0.0, 0.0
        if step is not None and (
                overdue or not (self._yielded and self._state.has_requests)):
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
        self._limit(reserved)
        return self._granted is not None

    def lacks(self, step: StepMemory) -> str:
        """Return why a step can't begin even when nobody asks anything; empty if it can."""
        budget = self.budget
        needed = budget.fixed + budget.footprint.min_step_bytes(
            step.lengths, learns=step.learns, chunk_tokens=step.chunk_tokens)
        if step is self._granted or needed <= budget.total:
            return ''
        return (f'memory.budget_mb: {budget.total / MB:.0f} MB for all but the base model, and '
                f'{needed / MB:.0f} are needed to learn {sum(step.lengths)} tokens')

    def planned(self, lacks_memory: bool, *, overdue: bool = False) -> bool:
        """
        Hear whether requests lack memory.

        Returns whether learning made room, so that a new plan may do more. A step that is
        ``overdue`` keeps what it has, or under lasting pressure it would begin again for ever.
        """
        if overdue:
            self._yielded = False
            return False
        self._yielded = lacks_memory and self._yielded
        return lacks_memory and self._give_up()

    def _give_up(self) -> bool:
        """Let the step begin anew when there is memory again; return whether that gave any."""
        step, pool = self._granted, self._kv_cache.pool
        if step is None or not (step.blocks or pool.limit < self.budget.kv_capacity):
            return False
        if not step.restart():
            return False
        for blocks in step.take_blocks():
            pool.release(blocks)
        self._granted, self._yielded = None, True
        self.budget.learning = 0.0
        self._limit()
        return True

    @property
    def _claimed_blocks(self) -> int:
        """KV blocks of those that run, with those for the rest of their prompts and a token."""
        return self._kv_cache.pool.held_blocks + sum(
            max((r.known_tokens - r.dropped_tokens) // BLOCK_TOKENS + 1 - len(r.blocks), 0)
            for r in self._state.running)

    def _limit(self, reserved: float = 0.0) -> None:
        """Let the KV cache have what is left; of ``reserved`` bytes what nobody claims."""
        limit = self.budget.kv_limit
        if reserved:
            limit = min(limit, max(self.budget.kv_beside(reserved), self._claimed_blocks))
        if limit != self._kv_cache.pool.limit:
            self._kv_cache.pool.shrink(limit)
        self._kv_cache.capacity_tokens = (
            self.budget.kv_capacity * self._kv_cache.pool.block_size)
