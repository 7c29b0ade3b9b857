# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What a pass is asked to compute: stretches of sequences, and where their KV blocks lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

BLOCK_TOKENS = 16   # tokens per KV block


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one sequence that a pass computes."""

    tokens: Sequence[int]     # their ids
    position: int             # of the first one in its sequence
    blocks: Sequence[int]     # KV blocks of the sequence, covering these tokens
    slot: int                 # adapter slot
    wants_logits: bool        # of the last token


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
