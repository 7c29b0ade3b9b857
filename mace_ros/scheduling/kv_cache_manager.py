# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Admission, preemption and prefix sharing: which requests hold which KV blocks."""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping, Sequence

from mace_ros.memory.block_hashes import BlockHashes
from mace_ros.memory.block_pool import BlockPool
from mace_ros.scheduling.plan import Plan, State
from mace_ros.scheduling.request import Request, RequestState


class KVCacheManager:
    """
    Moves the requests of its ``state`` into and out of the blocks of a pool.

    In each iteration: plan, :meth:`allocate`, run, :meth:`commit`. The same code runs on a device
    and in a simulation. Implements :class:`mace_ros.scheduling.plan.CacheView`.
    """

    def __init__(self, pool: BlockPool, *, sharing: bool = True) -> None:
        """Start without requests; ``sharing`` enables the prefix cache."""
        self.pool = pool
        self.state = State(self)
        self.capacity_blocks = pool.num_blocks      # when one request has the cache for itself
        self.preemptions = 0        # since the start, like the counts below
        self.shared_tokens = 0      # found in the prefix cache instead of computed
        self.pruned_tokens = 0
        self._sharing = sharing

    # -- the scheduler's view ------------------------------------------------------------

    @property
    def free_tokens(self) -> int:
        """Tokens that the free blocks can hold; negative if some requests must be preempted."""
        return self.pool.free_tokens

    @property
    def capacity_tokens(self) -> int:
        """Tokens that a request can use when it is alone in the cache."""
        return self.capacity_blocks * self.pool.block_size

    def blocks_freed_by(self, request: Request) -> int:
        """Return how many blocks preempting a running request would free."""
        return self.pool.frees(request.blocks)

    def get_computed_blocks(self, request: Request) -> list[int]:
        """
        Look up the cached blocks that a waiting request would share.

        Updates the request's ``computed_tokens`` and ``shared_blocks``, but acquires no block. At
        least one of its tokens is left to compute, since sampling needs logits.
        """
        request.computed_tokens = request.shared_blocks = 0
        if not self._sharing or request.block_hashes is None:
            return []
        limit = request.known_tokens - 1
        if request.shareable_tokens is not None:
            limit = min(limit, request.shareable_tokens)
        blocks = self.pool.lookup(request.block_hashes.first(limit // self.pool.block_size))
        request.computed_tokens = len(blocks) * self.pool.block_size
        request.shared_blocks = self.pool.held_among(blocks)
        return blocks

    # -- an iteration --------------------------------------------------------------------

    def allocate(self, plan: Plan, now: float) -> None:
        """Preempt, admit, and allocate blocks for the tokens that the plan's pass computes."""
        for request in plan.preempted:
            self.preempt(request)
        for row in plan.decode:
            self.pool.grow(row.blocks, row.cached_tokens + 1)
        for chunk in plan.prefill:
            request = chunk.request
            if request.state is RequestState.WAITING:
                self._admit(request, now)
            self.pool.grow(request.blocks, request.computed_tokens + min(
                chunk.tokens, request.remaining_tokens))

    def commit(self, request: Request, tokens: int) -> None:
        """Record that a pass computed the next ``tokens`` tokens of a request."""
        size = self.pool.block_size
        first = request.computed_tokens // size
        request.computed_tokens += tokens
        full = request.computed_tokens // size
        # Tokens computed without pruned ones differ from those of an unpruned request.
        exact = not request.dropped_tokens
        if full > first and self._sharing and request.block_hashes is not None and exact:
            hashes = request.block_hashes.first(full)
            for i in range(first, full):
                self.pool.cache(request.blocks[i], hashes[i])

    def preempt(self, request: Request) -> None:
        """Release a running request's blocks, and queue it again; it keeps its output tokens."""
        self.pool.release(request.blocks)
        request.dropped_tokens = 0
        self.state.running.remove(request)
        request.state = RequestState.WAITING
        self.get_computed_blocks(request)
        self.state.waiting.add(request)
        self.preemptions += 1

    def free(self, request: Request) -> None:
        """Remove a waiting or running request, and release its blocks."""
        waits = request.state is RequestState.WAITING
        (self.state.waiting if waits else self.state.running).remove(request)
        request.state = RequestState.FINISHED
        self.pool.release(request.blocks)

    def _admit(self, request: Request, now: float) -> None:
        request.blocks = self.pool.acquire(self.get_computed_blocks(request))
        self.shared_tokens += request.computed_tokens
        request.state = RequestState.RUNNING
        if request.started_at is None:
            request.started_at = now
        self.state.waiting.remove(request)
        insort(self.state.running, request, key=lambda r: r.arrival)

    # -- the prefix cache ----------------------------------------------------------------

    def set_sharing(self, sharing: bool) -> None:
        """Enable or disable the prefix cache; blocks that are shared already stay shared."""
        if self._sharing and not sharing:
            self.pool.reset()
        self._sharing = sharing

    def cached_tokens(self, hashes: BlockHashes, tokens: int) -> int:
        """
        Return how many of a sequence's first ``tokens`` tokens the prefix cache has.

        Only full blocks are cached; a partial last block counts if all full ones are.
        """
        size = self.pool.block_size
        full = tokens // size
        found = len(self.pool.lookup(hashes.first(full)))
        return tokens if found == full else found * size

    # -- changes of the blocks -----------------------------------------------------------

    def drop(self, request: Request, positions: Sequence[int]) -> None:
        """Prune full blocks of a request, given by ascending positions in its block table."""
        table, pruned = request.blocks, set(positions)
        dropped = [table[i] for i in positions]
        request.blocks = [block for i, block in enumerate(table) if i not in pruned]
        request.dropped_tokens += len(dropped) * self.pool.block_size
        self.pruned_tokens += len(dropped) * self.pool.block_size
        self.pool.release(dropped)

    def renumber(self, moved: Mapping[int, int]) -> None:
        """Renumber the blocks in the block tables; ``moved`` maps old numbers to new ones."""
        for request in self.state.running:
            request.blocks = [moved.get(b, b) for b in request.blocks]

    def reset(self) -> None:
        """Preempt all requests and empty the prefix cache: the blocks' content is lost."""
        for request in list(self.state.running):
            self.preempt(request)
        self.pool.reset()
