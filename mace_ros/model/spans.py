# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Input of a packed pass: spans of sequences, and the KV blocks that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.model.lora_mapping import BASE_SLOT

# Tokens at the end of a prompt whose attention predicts which blocks the response will need.
OBSERVATION_TOKENS = 32


@dataclass(frozen=True)
class Span:
    """
    Consecutive tokens of one sequence that a pass computes.

    Pruning may have dropped earlier tokens of the sequence, a multiple of a block, from the KV
    cache; ``blocks`` does not contain them. With ``attention``, ``[tokens of the sequence]`` in
    fp32, the pass adds to it the attention that each token receives from those of the last
    :data:`OBSERVATION_TOKENS` tokens of the sequence that this span contains; no token may have
    been dropped then. With ``pooled``, ``[width]`` in fp32, the pass adds to it the last hidden
    states of the span's tokens.
    """

    tokens: Sequence[int]     # token ids
    position: int             # of the first token in its sequence
    blocks: Sequence[int]     # KV blocks of the sequence, covering these tokens
    slot: int                 # adapter slot
    wants_logits: bool        # of the last token
    dropped: int = 0          # tokens before this span that are not in the KV cache
    attention: Tensor | None = None
    prefix: int = 0           # tokens at the start of the sequence that are in prefix_blocks
    prefix_blocks: Sequence[int] = ()
    adapted_from: int = 0     # position from which the adapter acts
    pooled: Tensor | None = None

    @property
    def cache_position(self) -> int:
        """Number of cached tokens of the sequence before the first token of this span."""
        return self.position - self.dropped

    def slots(self) -> np.ndarray:
        """Return the cache slots of the sequence up to the last token of this span."""
        own = cache_slots(self.blocks, self.cache_position + len(self.tokens) - self.prefix)
        if not self.prefix:
            return own
        return np.concatenate([cache_slots(self.prefix_blocks, self.prefix), own])

    @property
    def base_tokens(self) -> int:
        """Number of first tokens of this span that the base model computes."""
        return min(max(self.adapted_from - self.position, 0), len(self.tokens))

    @property
    def adapter_slots(self) -> list[int]:
        """The adapter slot of each token."""
        base = self.base_tokens
        return [BASE_SLOT] * base + [self.slot] * (len(self.tokens) - base)


def is_decode(span: Span) -> bool:
    """Return whether a span runs as a decode row instead of as part of the block of chunks."""
    return len(span.tokens) == 1 and span.attention is None


@dataclass(frozen=True)
class PiggybackSpans:
    """Fine-tune tokens that piggyback on a pass, and the buffers for their layer inputs."""

    spans: Sequence[Span]
    hidden: Sequence[Tensor]    # for each layer's input and the last output: [tokens, width]

    @property
    def tokens(self) -> int:
        """Number of fine-tune tokens."""
        return sum(len(s.tokens) for s in self.spans)


def cache_slots(blocks: Sequence[int], tokens: int) -> np.ndarray:
    """Return the cache slots of the first ``tokens`` tokens of a block table, ``[tokens]``."""
    used = np.asarray(blocks[:-(-tokens // BLOCK_TOKENS)], dtype=np.int64)
    return (used[:, None] * BLOCK_TOKENS + np.arange(BLOCK_TOKENS)).reshape(-1)[:tokens]
