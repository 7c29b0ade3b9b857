# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What a pass is asked to compute: stretches of sequences, and where their KV blocks lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mace_ros.memory.block_pool import BLOCK_TOKENS

# Tokens at the end of a prompt whose attention tells what of it the answer will need.
OBSERVED_TOKENS = 32


@dataclass(frozen=True)
class Span:
    """
    Consecutive tokens of one sequence that a pass computes.

    Of the tokens before them the cache may have dropped some, a multiple of a block; they
    are not in ``blocks``. If ``attention`` is given, ``[tokens of the sequence]`` in fp32,
    the attention that each token gets from the last :data:`OBSERVED_TOKENS` of the sequence
    is added to it, as far as those are in this span; nothing may be dropped then.
    """

    tokens: Sequence[int]     # their ids
    position: int             # of the first one in its sequence
    blocks: Sequence[int]     # KV blocks of the sequence, covering these tokens
    slot: int                 # adapter slot
    wants_logits: bool        # of the last token
    dropped: int = 0
    attention: Tensor | None = None
    shared: int = 0           # tokens that the sequence begins with and that lie elsewhere, ...
    shared_blocks: Sequence[int] = ()      # ... in these blocks

    @property
    def place(self) -> int:
        """Where the first token lies in ``blocks``: how many cached ones are before it."""
        return self.position - self.dropped

    def slots(self) -> np.ndarray:
        """Return where the cached tokens of its sequence lie, up to its own last one."""
        own = cache_slots(self.blocks, self.place + len(self.tokens) - self.shared)
        if not self.shared:
            return own
        return np.concatenate([cache_slots(self.shared_blocks, self.shared), own])


def is_decode_row(span: Span) -> bool:
    """Return whether a span attends by itself, as one token beside the block of chunks."""
    return len(span.tokens) == 1 and span.attention is None


@dataclass(frozen=True)
class FinetuneRows:
    """Fine-tune tokens that ride in a pass, and where their layer inputs go."""

    spans: Sequence[Span]
    hidden: Sequence[Tensor]    # for each layer's input and the last output: [tokens, width]

    @property
    def tokens(self) -> int:
        """How many tokens ride."""
        return sum(len(s.tokens) for s in self.spans)


def cache_slots(blocks: Sequence[int], tokens: int) -> np.ndarray:
    """Return where the first ``tokens`` tokens of a block table lie, ``[tokens]``."""
    used = np.asarray(blocks[:-(-tokens // BLOCK_TOKENS)], dtype=np.int64)
    return (used[:, None] * BLOCK_TOKENS + np.arange(BLOCK_TOKENS)).reshape(-1)[:tokens]
