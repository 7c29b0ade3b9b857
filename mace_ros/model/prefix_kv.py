# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Keys and values of the base model for the tokens before those that an adapter acts on.

They are the same under all versions, so that a fine-tune step need not compute them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefixKV:
    """Keys and values of one prefix, per layer: ``[1, KV heads, tokens, head size]``."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.keys[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return sum(t.nbytes for t in (*self.keys, *self.values))


@dataclass(frozen=True)
class PackedPrefixes:
    """
    The prefixes of packed sequences, one after the other.

    ``keys`` and ``values`` are those of all prefixes, per layer. ``of_sequence`` holds the
    index of each sequence's prefix, -1 for none.
    """

    lengths: tuple[int, ...]
    of_sequence: tuple[int, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def pack(cls, prefixes: Sequence[PrefixKV], of_sequence: Sequence[int]) -> PackedPrefixes:
        """Pack one or more prefixes."""
        return cls(
            tuple(p.tokens for p in prefixes), tuple(of_sequence),
            *(tuple(layer[0] if len(layer) == 1 else torch.cat(layer, 2)
                    for layer in zip(*parts, strict=True))
              for parts in ([p.keys for p in prefixes], [p.values for p in prefixes])))

    def before_each(self, ours: Tensor, theirs: Sequence[Tensor]) -> list[Tensor]:
        """
        Put its prefix before each sequence.

        ``ours`` are the keys or the values of a layer's prefixes and ``theirs`` those of its
        sequences, ``[1, KV heads, tokens, head size]`` each.
        """
        prefixes = ours.split(self.lengths, 2)
        return [x if p < 0 else torch.cat([prefixes[p], x], 2)
                for p, x in zip(self.of_sequence, theirs, strict=True)]
