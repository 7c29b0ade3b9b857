# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Bookkeeping of the KV cache in blocks of a fixed number of tokens (no tensors here)."""

from __future__ import annotations


class OutOfBlocks(MemoryError):
    """More KV blocks were asked for than are free."""


class BlockPool:
    """
    Hands out KV blocks by number.

    A sequence of n tokens needs ``blocks_for(n)`` blocks; token t lives in block
    ``t // block_size`` of its table, at offset ``t % block_size``.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def free_tokens(self) -> int:
        """Tokens that the free blocks can hold."""
        return len(self._free) * self.block_size

    def blocks_for(self, tokens: int) -> int:
        """Return how many blocks that many tokens take."""
        return -(-tokens // self.block_size)

    def allocate(self, tokens: int) -> list[int]:
        """Return blocks for that many tokens, or raise :class:`OutOfBlocks`."""
        needed = self.blocks_for(tokens)
        if needed > len(self._free):
            raise OutOfBlocks(f'{needed} KV blocks needed, {len(self._free)} free')
        kept = len(self._free) - needed
        taken, self._free = self._free[kept:], self._free[:kept]
        return taken

    def release(self, blocks: list[int]) -> None:
        """Give blocks back; the list is emptied so that it can't be released twice."""
        self._free.extend(blocks)
        blocks.clear()
        if len(self._free) > self.num_blocks:
            raise AssertionError('KV blocks were released twice')
