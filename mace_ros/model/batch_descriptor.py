# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The padded shapes of passes for which device graphs are captured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.model.spans import PiggybackSpans, Span

CHUNK_LOGITS = 4    # chunks of a pass whose last token may want logits
NO_LIMIT = 2 ** 31


@dataclass(frozen=True)
class Limits:
    """The most that a shape is padded to: larger ones would cost time and memory for nothing."""

    blocks: int = NO_LIMIT      # KV blocks of a decode row
    keys: int = NO_LIMIT        # of a block

    @staticmethod
    def of(max_context: int, cache_tokens: int) -> Limits:
        """Return the limits for requests of ``max_context`` tokens, and all of the cache."""
        # The keys include one for padding tokens.
        return Limits(-(-max_context // BLOCK_TOKENS), cache_tokens + BLOCK_TOKENS)


UNLIMITED = Limits()


@dataclass(frozen=True)
class BatchDescriptor:
    """The shape to which all passes of at most this size are padded."""

    decode: int     # decode rows
    blocks: int     # KV blocks of each decode row
    block: int      # tokens of prefill chunks, then fine-tune tokens
    keys: int       # keys that the block attends to
    saves: bool     # whether the block's layer inputs are kept, for fine-tune tokens

    @property
    def tokens(self) -> int:
        """Tokens of the pass."""
        return self.decode + self.block

    @property
    def logits(self) -> int:
        """Tokens for which the head is computed."""
        return self.decode + (CHUNK_LOGITS if self.block else 0)

    @property
    def size(self) -> int:
        """A measure of the work: KV blocks of all rows, and pairs of a token and a key."""
        return self.decode * self.blocks + self.block * self.keys

    @property
    def kind(self) -> tuple[bool, bool, bool]:
        """Whether there are decode rows, a block, and fine-tune tokens."""
        return bool(self.decode), bool(self.block), self.saves

    @staticmethod
    def of(spans: Sequence[Span], piggyback: PiggybackSpans | None,
           limits: Limits = UNLIMITED) -> BatchDescriptor:
        """Return the smallest descriptor that holds a pass."""
        finetune = list(piggyback.spans) if piggyback else []
        decode = [s for s in spans if len(s.tokens) == 1]
        block = [s for s in spans if len(s.tokens) > 1] + finetune
        tokens = sum(len(s.tokens) for s in block)
        longest = max((s.cache_position + 1 for s in decode), default=0)
        size = _round_up(tokens, 16, 2)
        keys = sum(s.cache_position + len(s.tokens) for s in block)
        return BatchDescriptor(
            # Beside a block, decode rows are the smaller part: coarser steps need fewer graphs.
            decode=_round_up(len(decode), *((4, 4) if block else (1, 2))),
            blocks=_round_up(-(-longest // BLOCK_TOKENS), *((32, 4) if block else (8, 2)),
                             limits.blocks),
            # A padding token needs a padding key, or its softmax would be NaN.
            block=size, keys=_round_up(keys + (size > tokens), 256, 4, limits.keys),
            saves=bool(finetune))


def batch_descriptors(max_rows: int, max_tokens: int, max_context: int,
                      limits: Limits = UNLIMITED) -> Iterator[BatchDescriptor]:
    """Yield the descriptors of all passes within these limits, the most frequent first."""
    max_blocks = -(-max_context // BLOCK_TOKENS)
    for blocks in _sizes(8, 2, max_blocks, limits.blocks):
        for rows in _sizes(1, 2, max_rows):
            yield BatchDescriptor(rows, blocks, 0, 0, False)
    for keys in _sizes(256, 4, max_context + 1, limits.keys):
        for block in _sizes(16, 2, max_tokens):
            if block // 2 >= keys:      # fewer tokens fit a smaller block
                continue
            yield BatchDescriptor(0, 0, block, keys, False)
            yield BatchDescriptor(0, 0, block, keys, True)
            for blocks in _sizes(32, 4, max_blocks, limits.blocks):
                for rows in _sizes(4, 4, max_rows):
                    yield BatchDescriptor(rows, blocks, block, keys, False)
                    yield BatchDescriptor(rows, blocks, block, keys, True)


def largest_first(descriptors: Iterable[BatchDescriptor]) -> list[BatchDescriptor]:
    """
    Return the same descriptors, beginning with the largest of decode rows and with a block.

    Their graphs reserve the memory in which those of all others fit; the other way round, it
    would grow piece by piece.
    """
    found = list(descriptors)
    kinds = [[d for d in found if bool(d.block) is with_block] for with_block in (False, True)]
    largest = [max(kind, key=lambda d: d.size + d.saves) for kind in kinds if kind]
    return list(dict.fromkeys([*largest, *found]))


def _sizes(minimum: int, factor: int, limit: int, most: int = NO_LIMIT) -> list[int]:
    """
    Return ``minimum``, ``minimum * factor``, ... up to the first size that holds ``limit``.

    ``most`` takes the place of larger sizes.
    """
    found = [min(minimum, most)]
    while found[-1] < min(limit, most):
        found.append(min(found[-1] * factor, most))
    return found


def _round_up(n: int, minimum: int, factor: int, most: int = NO_LIMIT) -> int:
    """Return the first of :func:`_sizes` that holds ``n``, which may exceed ``most``; 0 stays 0."""
    return _sizes(minimum, factor, n, most if n <= most else NO_LIMIT)[-1] if n else 0
