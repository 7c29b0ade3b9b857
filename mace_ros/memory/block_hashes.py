# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Names for full KV blocks, by which sequences with the same beginning share them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

NAME_BYTES = 16


def root_hash(version: str) -> bytes:
    """
    Return the name of an empty sequence under an adapter version.

    Keys and values made under another version are wrong. ``version`` must name it for
    ever: slots are overwritten.
    """
    return blake2b(version.encode(), digest_size=NAME_BYTES).digest()


def next_hash(before: bytes, tokens: Sequence[int]) -> bytes:
    """Return the name of the block that holds ``tokens``, after the one named ``before``."""
    return blake2b(before + array('q', tokens).tobytes(), digest_size=NAME_BYTES).digest()


class BlockHashes:
    """The names of one sequence's blocks, made as they are asked for."""

    def __init__(self, version: str, ids: Sequence[int], block_size: int) -> None:
        """``ids`` may grow; what was named must stay."""
        self._ids, self._size = ids, block_size
        self._names = [root_hash(version)]

    def first(self, blocks: int) -> list[bytes]:
        """Return the names of the first ``blocks`` blocks, which must be full."""
        while len(self._names) <= blocks:
            start = (len(self._names) - 1) * self._size
            self._names.append(next_hash(self._names[-1], self._ids[start:start + self._size]))
        return self._names[1:blocks + 1]
