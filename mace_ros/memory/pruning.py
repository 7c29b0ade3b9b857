# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Which KV blocks of a long prompt its answer can do without (no tensors here)."""

from __future__ import annotations

from collections.abc import Sequence

# Shorter prompts are kept whole.
LONG_TOKENS = 512
# Always kept: the beginning, on which attention rests that has nowhere else to go, and the
# end, on which the next tokens hang most.
SINK_TOKENS = 16
RECENT_TOKENS = 128


def blocks_to_drop(attention: Sequence[float], fraction: float, block_size: int, *,
                   window: int = 0) -> list[int]:
    """
    Return the places, in order, of the blocks that get the least attention.

    ``attention`` holds what each block of a prompt gets, the last one perhaps not full. At
    most ``fraction`` of them are dropped, and none of the last ``window`` tokens: all that
    some layer sees.
    """
    count = len(attention)
    last = count - -(-max(RECENT_TOKENS, window) // block_size)
    first = -(-SINK_TOKENS // block_size)
    candidates = sorted(range(first, last), key=lambda i: attention[i])
    return sorted(candidates[:int(count * fraction)])
