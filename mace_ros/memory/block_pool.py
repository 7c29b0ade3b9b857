# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Bookkeeping of the KV cache in blocks of a fixed number of tokens (no tensors here)."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
import heapq

BLOCK_TOKENS = 16       # of a KV block

class OutOfBlocks(MemoryError):
    """More KV blocks were asked for than are free."""


class BlockPool:
    """
    Hands out KV blocks by number, the lowest ones first.

    A sequence of n tokens needs ``blocks_for(n)`` blocks; token t lives in block
    ``t // block_size`` of its table, at offset ``t % block_size``. Several tables may hold
    one block. A block that was given a name, which tells its content, keeps it when nobody
    holds it any longer, and can be found by it until its room is needed; what was used
    least recently goes first.

    No more than ``limit`` blocks have content, and but for the time after the limit was
    lowered (:meth:`shrink`) their numbers are below it.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.limit = num_blocks
        self._empty = list(range(num_blocks))       # a heap
        self._holders: dict[int, int] = {}          # how many tables hold a block
        self._idle: OrderedDict[int, None] = OrderedDict()    # named, held by nobody
        self._names: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}

    @property
    def held_blocks(self) -> int:
        """Blocks that are in some table."""
        return len(self._holders)

    @property
    def cached_blocks(self) -> int:
        """Blocks that nobody holds and that can be found by their names."""
        return len(self._idle)

    @property
    def free_blocks(self) -> int:
        """Blocks that can be taken; negative while more are held than the limit allows."""
        return self.limit - len(self._holders)

    @property
    def free_tokens(self) -> int:
        """Tokens that the free blocks can hold."""
        return self.free_blocks * self.block_size

    def blocks_for(self, tokens: int) -> int:
        """Return how many blocks that many tokens take."""
        return -(-tokens // self.block_size)

    # -- taking and giving back ------------------------------------------------------

    def allocate(self, tokens: int) -> list[int]:
        """Return blocks for that many tokens, or raise :class:`OutOfBlocks`."""
        blocks: list[int] = []
        self.grow(blocks, tokens)
        return blocks

    def grow(self, blocks: list[int], tokens: int) -> None:
        """Append to a table what it lacks for that many tokens; all or :class:`OutOfBlocks`."""
        needed = self.blocks_for(tokens) - len(blocks)
        if needed > self.free_blocks:
            raise OutOfBlocks(f'{needed} KV blocks needed, {self.free_blocks} free')
        for _ in range(needed):
            if len(self._holders) + len(self._idle) >= self.limit:
                self._evict(next(iter(self._idle)))
            block = heapq.heappop(self._empty)
            self._holders[block] = 1
            blocks.append(block)

    def acquire(self, blocks: Iterable[int]) -> list[int]:
        """Return a table that shares these blocks, which were found by their names."""
        table = list(blocks)
        for block in table:
            self._holders[block] = self._holders.get(block, 0) + 1
            self._idle.pop(block, None)
        return table

    def release(self, blocks: list[int]) -> None:
        """Let go of a table; it is emptied so that it can't be released twice."""
        # From its end: the beginning of a sequence is of use without the end, not vice versa.
        while blocks:
            block = blocks.pop()
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            if block in self._names:
                self._idle[block] = None
                if block >= self.limit:
                    self._evict(block)
            else:
                heapq.heappush(self._empty, block)
        self._trim()

    def frees(self, blocks: Sequence[int]) -> int:
        """Return how many blocks would be free if this table let go of them."""
        return sum(self._holders[block] == 1 for block in blocks)

    def held_among(self, blocks: Iterable[int]) -> int:
        """Return how many of these blocks some table holds."""
        return sum(block in self._holders for block in blocks)

    # -- finding again ---------------------------------------------------------------

    def cache(self, block: int, name: bytes) -> None:
        """Let a full block be found by its content, unless another one of it can be found."""
        if name not in self._named:
            self._named[name] = block
            self._names[block] = name

    def lookup(self, names: Iterable[bytes]) -> list[int]:
        """Return the blocks with the first of these names, up to one that is not here."""
        found = []
        for name in names:
            block = self._named.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def reset(self) -> None:
        """Let no block be found any more."""
        for block in list(self._idle):
            self._evict(block)
        self._names.clear()
        self._named.clear()

    def _evict(self, block: int) -> None:
        del self._idle[block]
        del self._named[self._names.pop(block)]
        heapq.heappush(self._empty, block)

    # -- shrinking -------------------------------------------------------------------

    def shrink(self, limit: int) -> None:
        """
        Set another limit, and drop what nobody holds and what lies, or is too much, beyond it.

        It may be higher than before, too. While more is held, ``free_blocks`` is negative.
        """
        self.limit = min(limit, self.num_blocks)
        for block in [b for b in self._idle if b >= self.limit]:
            self._evict(block)
        self._trim()

    def _trim(self) -> None:
        while self._idle and len(self._idle) > self.free_blocks:
            self._evict(next(iter(self._idle)))

    def moves(self) -> dict[int, int]:
        """
        Renumber the blocks that are held beyond the limit, once there is room below it.

        Returns the new number of each; the caller moves their content, and renumbers the
        tables that have them.
        """
        beyond = [b for b in self._holders if b >= self.limit]
        if not beyond or self.free_blocks < 0:
            return {}
        moved = {}
        for old in sorted(beyond):
            new = moved[old] = heapq.heappop(self._empty)
            self._holders[new] = self._holders.pop(old)
            heapq.heappush(self._empty, old)
            if old in self._names:
                self._names[new] = self._names.pop(old)
                self._named[self._names[new]] = new
        return moved

    # -- integrity -------------------------------------------------------------------

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise ``AssertionError`` unless ``tables`` are all that is held."""
        held = Counter(block for table in tables for block in table)
        if held != Counter(self._holders):
            lost = Counter(self._holders) - held
            stolen = held - Counter(self._holders)
            raise AssertionError(f'KV blocks without a holder: {dict(lost)}; held by more than '
                                 f'are known: {dict(stolen)}')
        known = len(self._holders) + len(self._idle) + len(self._empty)
        if known != self.num_blocks or set(self._idle) - set(self._names):
            raise AssertionError(f'{known} KV blocks of {self.num_blocks} are accounted for')
