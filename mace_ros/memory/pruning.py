# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Choose the KV blocks of a long prompt that its response does not need (no tensors here)."""

from __future__ import annotations

from collections.abc import Sequence

# Shorter prompts are not pruned.
LONG_TOKENS = 512
# Always kept: the first tokens, which absorb attention that has no other target (attention
# sinks), and the last ones, on which the next tokens depend most.
SINK_TOKENS = 16
RECENT_TOKENS = 128


def blocks_to_drop(attention: Sequence[float], fraction: float, block_size: int, *,
                   window: int = 0) -> list[int]:
    """
    Return the indices, in order, of the blocks with the lowest attention scores.

    ``attention`` holds the score of each block of a prompt, the last of which may be partial.
    At most ``fraction`` of the blocks are dropped, and none of the last ``window`` tokens, to
    which a layer with a sliding window is limited.
    """
    count = len(attention)
    last = count - -(-max(RECENT_TOKENS, window) // block_size)
    first = -(-SINK_TOKENS // block_size)
    candidates = sorted(range(first, last), key=lambda i: attention[i])
    return sorted(candidates[:int(count * fraction)])
