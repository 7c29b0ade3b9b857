# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Attention of chunks with a softcap or sinks, as one kernel.

No kernel of PyTorch takes these: plain operations copy the keys, repeat them for each head that
shares them, and write all scores several times. The kernel here (:mod:`block_kernels`) reads keys
where they are in the KV cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mace_ros.model.paged_attention import ALL_KEYS
from mace_ros.model.triton_operator import triton_operator


def attend_block(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor,
                 queries_at: tuple[Tensor, Tensor], keys_at: tuple[Tensor, Tensor], *,
                 scaling: float | None = None, window: int | None = None,
                 softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
    """
    Attend to the keys of a token's own sequence up to its position, ``[tokens, heads, size]``.

    ``query`` is ``[heads, tokens, key size]``; ``keys`` and ``values`` are the cache, ``[cache
    slots, KV heads, size]``, of which ``slots``, ``[keys]``, take part. ``queries_at`` and
    ``keys_at`` are the sequence and the position of each token and key. With a ``window``, a token
    attends to as many keys. A token without keys gets zeros.
    """
    heads, tokens, size = query.shape
    out = values.new_empty(tokens, heads, values.shape[2])
    torch.ops.mace_ros.attend_block(
        out, query if query.stride(2) == 1 else query.contiguous(), keys, values, slots,
        *queries_at, *keys_at, sinks, size ** -0.5 if scaling is None else scaling,
        ALL_KEYS if window is None else window, softcap)
    return out


@triton_operator(
    'attend_block(Tensor(a!) out, Tensor query, Tensor keys, Tensor values, Tensor slots, '
    'Tensor query_sequence, Tensor query_position, Tensor key_sequence, Tensor key_position, '
    'Tensor? sinks, float scale, int window, float? softcap) -> ()')
def _launch(out: Tensor, query: Tensor, keys: Tensor, values: Tensor, slots: Tensor,
            query_sequence: Tensor, query_position: Tensor, key_sequence: Tensor,
            key_position: Tensor, sinks: Tensor | None, scale: float, window: int,
            softcap: float | None) -> None:
    """Run the kernel; on a CPU, only Triton's interpreter can."""
    from mace_ros.model.block_kernels import launch  # needs Triton

    launch(out, query, keys, values, slots, query_sequence, query_position, key_sequence,
           key_position, sinks, scale=scale, window=window, softcap=softcap)
