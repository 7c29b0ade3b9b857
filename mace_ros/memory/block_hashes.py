# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Hashes of full KV blocks, by which sequences with a common prefix share them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

HASH_BYTES = 16


def next_hash(parent: bytes, tokens: Sequence[int], version: str = '') -> bytes:
    """
    Return the hash of the block that holds ``tokens`` after the block with hash ``parent``.

    ``version`` identifies for ever the adapter version that acts on some of the tokens; a slot
    number does not, since slots are overwritten.
    """
    content = parent + array('q', tokens).tobytes() + version.encode()
    return blake2b(content, digest_size=HASH_BYTES).digest()


class BlockHashes:
    """The hashes of one sequence's blocks, computed on demand."""

    def __init__(self, version: str, ids: Sequence[int], block_size: int,
                 adapted_from: int = 0) -> None:
        """
        Begin a sequence on which ``version`` acts from position ``adapted_from`` on.

        Blocks before it are the base model's, and shared under all versions. ``ids`` may be
        appended to; tokens of hashed blocks must not change.
        """
        self._version, self._adapted_from = version, adapted_from
        self._ids, self._size = ids, block_size
        self._hashes = [b'']

    def first(self, blocks: int) -> list[bytes]:
        """Return the hashes of the first ``blocks`` blocks, which must be full."""
        while len(self._hashes) <= blocks:
            start = (len(self._hashes) - 1) * self._size
            end = start + self._size
            self._hashes.append(next_hash(
                self._hashes[-1], self._ids[start:end],
                self._version if end > self._adapted_from else ''))
        return self._hashes[1:blocks + 1]
