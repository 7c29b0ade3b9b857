# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Hashes of full KV blocks, by which sequences with a common prefix share them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

HASH_BYTES = 16


def root_hash(version: str) -> bytes:
    """
    Return the hash of an empty sequence under an adapter version.

    Keys and values depend on the version. ``version`` must identify it for ever; a slot number
    does not, since slots are overwritten.
    """
    return blake2b(version.encode(), digest_size=HASH_BYTES).digest()


def next_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Return the hash of the block that holds ``tokens`` after the block with hash ``parent``."""
    return blake2b(parent + array('q', tokens).tobytes(), digest_size=HASH_BYTES).digest()


class BlockHashes:
    """The hashes of one sequence's blocks, computed on demand."""

    def __init__(self, version: str, ids: Sequence[int], block_size: int) -> None:
        """``ids`` may be appended to; tokens of hashed blocks must not change."""
        self._ids, self._size = ids, block_size
        self._hashes = [root_hash(version)]

    def first(self, blocks: int) -> list[bytes]:
        """Return the hashes of the first ``blocks`` blocks, which must be full."""
        while len(self._hashes) <= blocks:
            start = (len(self._hashes) - 1) * self._size
            self._hashes.append(next_hash(self._hashes[-1], self._ids[start:start + self._size]))
        return self._hashes[1:blocks + 1]
