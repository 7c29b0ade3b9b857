# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The attention of a prompt's last tokens, by which KV blocks are chosen for pruning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ObservationWindow:
    """Queries of a block whose attention scores are summed, to choose KV blocks for pruning."""

    queries: slice     # of the block's tokens
    keys: slice        # of the block's keys, from the sequence's first to that of the last query
    target: Tensor     # [tokens of the sequence], fp32: the score of each, summed over the layers

    def accumulate(self, query: Tensor, key: Tensor, scaling: float | None,
                   softcap: float | None, sinks: Tensor | None) -> None:
        """Add one layer's attention, averaged over its heads; shapes as in SDPA."""
        query, key = query[0, :, self.queries].float(), key[0, :, self.keys]
        (heads, tokens, size), (kv_heads, keys, _) = query.shape, key.shape
        scale = size ** -0.5 if scaling is None else scaling
        later = torch.ones(tokens, keys, dtype=torch.bool, device=key.device)
        later = later.triu_(keys - tokens + 1)
        # One head of keys at a time, to take less memory.
        for head, own in enumerate((query * scale).split(heads // kv_heads)):
            scores = own @ key[head].float().t()
            if softcap is not None:
                scores.div_(softcap).tanh_().mul_(softcap)
            scores.masked_fill_(later, float('-inf'))
            if sinks is not None:
                column = sinks.float().view(kv_heads, -1, 1, 1)[head].expand(-1, tokens, 1)
                scores = torch.cat([scores, column], 2)
            self.target[:keys] += torch.softmax(scores, 2)[..., :keys].sum((0, 1)) / heads
