# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Which requests lie in the KV cache: the bookkeeping that a plan asks for."""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping, Sequence

from mace_ros.memory.block_hashes import BlockHashes
from mace_ros.memory.block_pool import BlockPool
from mace_ros.scheduling.plan import Plan, State
from mace_ros.scheduling.request import Request, RequestState


class KVCacheManager:
    """
    Moves the requests of a :class:`State` in and out of the blocks of a pool.

    For each iteration: :meth:`refresh`, plan, :meth:`begin`, run, :meth:`computed`. It is
    the same on a device and in a simulation.
    """

    def __init__(self, pool: BlockPool, state: State, *, sharing: bool = True) -> None:
        """Begin with nobody in the cache; ``sharing`` says whether blocks are found again."""
        self.pool = pool
        self.capacity_tokens = pool.num_blocks * pool.block_size    # when nobody else is there
        self._sharing = sharing
        self.preemptions = 0    # so far
        self.shared_tokens = 0  # found in the cache instead of computed, so far
        self.pruned_tokens = 0  # dropped by running requests, so far
        self._state = state
        state.frees = lambda request: pool.frees(request.blocks)
        state.get_computed_blocks = self.get_computed_blocks
        self.refresh()

    def share(self, sharing: bool) -> None:
        """Share blocks from now on, or no longer; what is shared stays so."""
        if self._sharing and not sharing:
            self.pool.reset()
        self._sharing = sharing

    def refresh(self) -> None:
        """Bring what the scheduler reads of the memory up to date."""
        self._state.free_tokens = self.pool.free_tokens
        self._state.capacity_tokens = self.capacity_tokens

    def begin(self, plan: Plan, now: float) -> None:
        """Preempt, admit, and give blocks for what the plan's pass computes."""
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

    def known(self, hashes: BlockHashes, tokens: int) -> int:
        """Return how many of a sequence's first tokens are in the cache, as whole blocks."""
        size = self.pool.block_size
        full = tokens // size
        found = len(self.pool.lookup(hashes.first(full)))
        return tokens if found == full else found * size

    def computed(self, request: Request, tokens: int) -> None:
        """Note that a pass computed the next ``tokens`` tokens of a request."""
        size = self.pool.block_size
        full = request.computed_tokens // size
        request.computed_tokens += tokens
        now_full = request.computed_tokens // size
        # What is computed without some of the tokens before it must not be found by others.
        exact = not request.dropped_tokens
        if now_full > full and self._sharing and request.block_hashes is not None and exact:
            names = request.block_hashes.first(now_full)
            for i in range(full, now_full):
                self.pool.cache(request.blocks[i], names[i])

    def drop(self, request: Request, places: Sequence[int]) -> None:
        """Let go of full blocks of a request, by their places in its table, in order."""
        table, gone = request.blocks, set(places)
        dropped = [table[i] for i in places]
        request.blocks = [block for i, block in enumerate(table) if i not in gone]
        request.dropped_tokens += len(dropped) * self.pool.block_size
        self.pruned_tokens += len(dropped) * self.pool.block_size
        self.pool.release(dropped)

    def move(self, moved: Mapping[int, int]) -> None:
        """Let tables name blocks by their new numbers."""
        for request in self._state.running:
            request.blocks = [moved.get(b, b) for b in request.blocks]

    def preempt(self, request: Request) -> None:
        """Take a running request's blocks, and let it wait in its place of arrival."""
        self.pool.release(request.blocks)
        request.dropped_tokens = 0
        self._state.running.remove(request)
        request.state = RequestState.WAITING
        self.get_computed_blocks(request)
        self._state.waiting.add(request)
        self.preemptions += 1

    def start_over(self) -> None:
        """Let everybody wait, and nothing be found again: what the blocks hold is lost."""
        for request in list(self._state.running):
            self.preempt(request)
        self.pool.reset()

    def leave(self, request: Request) -> None:
        """Let a request go, from wherever it is."""
        waits = request.state is RequestState.WAITING
        (self._state.waiting if waits else self._state.running).remove(request)
        request.state = RequestState.FINISHED
        self.pool.release(request.blocks)

    def _admit(self, request: Request, now: float) -> None:
        request.blocks = self.pool.acquire(self.get_computed_blocks(request))
        self.shared_tokens += request.computed_tokens
        request.state = RequestState.RUNNING
        if request.started_at is None:
            request.started_at = now
        self._state.waiting.remove(request)
        insort(self._state.running, request, key=lambda r: r.arrival)

    def get_computed_blocks(self, request: Request) -> list[int]:
        """Find the blocks that a waiting request would share; one token must be computed."""
        request.computed_tokens = request.shared_blocks = 0
        if not self._sharing or request.block_hashes is None:
            return []
        most = (request.known_tokens - 1) // self.pool.block_size
        blocks = self.pool.lookup(request.block_hashes.first(most))
        request.computed_tokens = len(blocks) * self.pool.block_size
        request.shared_blocks = self.pool.held_among(blocks)
        return blocks
