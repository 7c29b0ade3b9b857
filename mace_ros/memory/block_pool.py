# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Allocation of KV blocks of a fixed number of tokens, with prefix caching (no tensors here)."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
import heapq

BLOCK_TOKENS = 16       # of a KV block


class OutOfBlocks(MemoryError):
    """A request for more KV blocks than are free."""


class BlockPool:
    """
    Allocates KV blocks by number, the lowest ones first.

    A sequence of n tokens needs ``blocks_for(n)`` blocks. Token t is in block
    ``t // block_size`` of the sequence's table, at offset ``t % block_size``. Several tables
    may share a block. A block that was cached under the hash of its content stays available
    after the last table has released it, until its memory is needed: the least recently used
    block is evicted first.

    At most ``limit`` blocks have content. Their numbers are below the limit, except after it
    was lowered (:meth:`shrink`), until :meth:`compact` has run.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.limit = num_blocks
        self._empty = list(range(num_blocks))       # a heap
        self._ref_counts: dict[int, int] = {}       # tables that hold a block
        self._evictable: OrderedDict[int, None] = OrderedDict()    # cached and in no table
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def held_blocks(self) -> int:
        """Blocks that are in a table."""
        return len(self._ref_counts)

    @property
    def cached_blocks(self) -> int:
        """Blocks that are cached and in no table."""
        return len(self._evictable)

    @property
    def free_blocks(self) -> int:
        """Blocks that can be allocated; negative while more are held than the limit allows."""
        return self.limit - len(self._ref_counts)

    @property
    def free_tokens(self) -> int:
        """Tokens that the free blocks can hold."""
        return (self.limit - len(self._ref_counts)) * self.block_size

    def blocks_for(self, tokens: int) -> int:
        """Return the number of blocks that hold ``tokens``."""
        return -(-tokens // self.block_size)

    # -- allocating and releasing ----------------------------------------------------

    def allocate(self, tokens: int) -> list[int]:
        """Return a table of blocks for ``tokens``; raises :class:`OutOfBlocks`."""
        blocks: list[int] = []
        self.grow(blocks, tokens)
        return blocks

    def grow(self, blocks: list[int], tokens: int) -> None:
        """
        Append blocks to a table until it holds ``tokens``.

        Raises :class:`OutOfBlocks`, and leaves the table unchanged, if too few are free.
        """
        needed = self.blocks_for(tokens) - len(blocks)
        if needed > self.free_blocks:
            raise OutOfBlocks(f'{needed} KV blocks needed, {self.free_blocks} free')
        for _ in range(needed):
            if len(self._ref_counts) + len(self._evictable) >= self.limit:
                self._evict(next(iter(self._evictable)))
            block = heapq.heappop(self._empty)
            self._ref_counts[block] = 1
            blocks.append(block)

    def acquire(self, blocks: Iterable[int]) -> list[int]:
        """Return a table that shares these blocks, which :meth:`lookup` has returned."""
        table = list(blocks)
        for block in table:
            self._ref_counts[block] = self._ref_counts.get(block, 0) + 1
            self._evictable.pop(block, None)
        return table

    def release(self, blocks: list[int]) -> None:
        """Release a table; empties the list so that it can't be released twice."""
        # From the end: a prefix can be reused without its continuation, but not vice versa.
        while blocks:
            block = blocks.pop()
            self._ref_counts[block] -= 1
            if self._ref_counts[block]:
                continue
            del self._ref_counts[block]
            if block in self._hash_of:
                self._evictable[block] = None
                if block >= self.limit:
                    self._evict(block)
            else:
                heapq.heappush(self._empty, block)
        self._trim()

    def frees(self, blocks: Sequence[int]) -> int:
        """Return the number of blocks that releasing this table would free."""
        return sum(self._ref_counts[block] == 1 for block in blocks)

    def held_among(self, blocks: Iterable[int]) -> int:
        """Return the number of these blocks that are in a table."""
        return sum(block in self._ref_counts for block in blocks)

    # -- prefix cache ----------------------------------------------------------------

    def cache(self, block: int, block_hash: bytes) -> None:
        """Cache a full block under the hash of its content, unless another block is."""
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the cached blocks of the leading ``hashes``, up to the first miss."""
        found = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def reset(self) -> None:
        """Empty the prefix cache; blocks in tables keep their content."""
        for block in list(self._evictable):
            self._evict(block)
        self._hash_of.clear()
        self._block_of.clear()

    def _evict(self, block: int) -> None:
        del self._evictable[block]
        del self._block_of[self._hash_of.pop(block)]
        heapq.heappush(self._empty, block)

    # -- changing the limit ----------------------------------------------------------

    def shrink(self, limit: int) -> None:
        """
        Set the limit, which may also be raised; evict cached blocks that are beyond it.

        While more blocks are held than the limit allows, ``free_blocks`` is negative.
        """
        self.limit = min(limit, self.num_blocks)
        for block in [b for b in self._evictable if b >= self.limit]:
            self._evict(block)
        self._trim()

    def _trim(self) -> None:
        while self._evictable and len(self._evictable) > self.free_blocks:
            self._evict(next(iter(self._evictable)))

    def compact(self) -> dict[int, int]:
        """
        Renumber the held blocks beyond the limit, if all fit below it.

        Returns the new number of each renumbered block. The caller must move the content and
        renumber the tables.
        """
        beyond = [b for b in self._ref_counts if b >= self.limit]
        if not beyond or self.free_blocks < 0:
            return {}
        moved = {}
        for old in sorted(beyond):
            new = moved[old] = heapq.heappop(self._empty)
            self._ref_counts[new] = self._ref_counts.pop(old)
            heapq.heappush(self._empty, old)
            if old in self._hash_of:
                self._hash_of[new] = self._hash_of.pop(old)
                self._block_of[self._hash_of[new]] = new
        return moved

    # -- integrity -------------------------------------------------------------------

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise ``AssertionError`` unless ``tables`` are exactly the tables that hold blocks."""
        held = Counter(block for table in tables for block in table)
        if held != Counter(self._ref_counts):
            lost = Counter(self._ref_counts) - held
            stolen = held - Counter(self._ref_counts)
            raise AssertionError(f'KV blocks without a table: {dict(lost)}; in more tables than '
                                 f'references: {dict(stolen)}')
        known = len(self._ref_counts) + len(self._evictable) + len(self._empty)
        if known != self.num_blocks or set(self._evictable) - set(self._hash_of):
            raise AssertionError(f'{known} KV blocks of {self.num_blocks} are accounted for')
