# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Triton kernel of attention of chunks over the KV cache.

Import this module only where Triton is installed.
"""

# Triton evaluates annotations of kernels: there may be no others than its own, and the interpreter
# must not get them as strings, so that annotations are not imported from __future__.

from torch import Tensor
import triton
import triton.language as tl

MIN_ROWS, MAX_ROWS, KEYS = 16, 32, 32   # of a tile; the product of tensor cores takes 16 at least


@triton.jit(do_not_specialize=['tokens', 'count', 'window'])
def attend_block(  # type: ignore[no-untyped-def]
        out, query, keys, values, slots, query_sequence, query_position, key_sequence,
        key_position, sinks, scale, softcap, tokens, count, window, query_head, query_token,
        HEADS: tl.constexpr, KV_HEADS: tl.constexpr, KEY_SIZE: tl.constexpr,
        KEY_TILE: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_TILE: tl.constexpr,
        ROWS: tl.constexpr, KEYS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
        HAS_SINKS: tl.constexpr, IN_FP32: tl.constexpr):
    """Program (tile of tokens, head) goes through all keys, and skips tiles that it can't see."""
    row, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    is_row = row < tokens
    key_dim, value_dim = tl.arange(0, KEY_TILE), tl.arange(0, VALUE_TILE)
    is_key_dim, is_value_dim = key_dim < KEY_SIZE, value_dim < VALUE_SIZE
    q = tl.load(query + head * query_head + row[:, None] * query_token + key_dim[None, :],
                mask=is_row[:, None] & is_key_dim[None, :], other=0.0)
    if IN_FP32:
        q = q.to(tl.float32)
    sequence = tl.load(query_sequence + row, mask=is_row, other=0)
    position = tl.load(query_position + row, mask=is_row, other=0)

    # Finite, so that rows without keys get no NaN.
    largest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    if HAS_SINKS:       # a score without a value
        largest = tl.full([ROWS], 0.0, tl.float32) + tl.load(sinks + head).to(tl.float32)
        total += 1.0
    weighted = tl.full([ROWS, VALUE_TILE], 0.0, tl.float32)
    for first in range(0, count, KEYS):
        place = first + tl.arange(0, KEYS)
        is_key = place < count
        distance = position[:, None] - tl.load(key_position + place, mask=is_key, other=0)[None, :]
        same = sequence[:, None] == tl.load(key_sequence + place, mask=is_key, other=0)[None, :]
        seen = (same & (distance >= 0) & (distance < window)
                & is_row[:, None] & is_key[None, :])
        is_seen = tl.max(seen.to(tl.int32), 0) > 0      # others may hold NaN
        if tl.max(is_seen.to(tl.int32), 0) > 0:
            slot = tl.load(slots + place, mask=is_seen, other=0).to(tl.int64) * KV_HEADS + kv_head
            k = tl.load(keys + slot[None, :] * KEY_SIZE + key_dim[:, None],
                        mask=is_seen[None, :] & is_key_dim[:, None], other=0.0)
            v = tl.load(values + slot[:, None] * VALUE_SIZE + value_dim[None, :],
                        mask=is_seen[:, None] & is_value_dim[None, :], other=0.0)
            if IN_FP32:
                k, v = k.to(tl.float32), v.to(tl.float32)
            scores = tl.dot(q, k, input_precision='ieee') * scale
            if HAS_SOFTCAP:     # with tanh(x) = 2 sigmoid(2 x) - 1
                scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
            scores = tl.where(seen, scores, -1e30)
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            weights = tl.where(seen, tl.exp(scores - new_largest[:, None]), 0.0)
            rescale = tl.exp(largest - new_largest)
            total = total * rescale + tl.sum(weights, 1)
            weighted = weighted * rescale[:, None] + tl.dot(
                weights.to(v.dtype), v, input_precision='ieee')
            largest = new_largest
    result = weighted / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out + (row[:, None] * HEADS + head) * VALUE_SIZE + value_dim[None, :], result,
             mask=is_row[:, None] & is_value_dim[None, :])


def launch(out: Tensor, query: Tensor, keys: Tensor, values: Tensor, slots: Tensor,
           query_sequence: Tensor, query_position: Tensor, key_sequence: Tensor,
           key_position: Tensor, sinks: Tensor | None, *, scale: float, window: int,
           softcap: float | None) -> None:
    """
    Launch the kernel.

    ``query`` is ``[heads, tokens, key size]``, contiguous in its last dimension; all others are
    contiguous.
    """
    heads, tokens, key_size = query.shape
    value_size = values.shape[2]
    rows = min(max(triton.next_power_of_2(tokens), MIN_ROWS), MAX_ROWS)
    attend_block[(triton.cdiv(tokens, rows), heads)](
        out, query, keys, values, slots, query_sequence, query_position, key_sequence,
        key_position, query if sinks is None else sinks, scale,
        1.0 if softcap is None else softcap, tokens, len(slots), window, query.stride(0),
        query.stride(1), HEADS=heads, KV_HEADS=keys.shape[1], KEY_SIZE=key_size,
        KEY_TILE=max(triton.next_power_of_2(key_size), 16), VALUE_SIZE=value_size,
        VALUE_TILE=max(triton.next_power_of_2(value_size), 16), ROWS=rows, KEYS=KEYS,
        HAS_SOFTCAP=softcap is not None, HAS_SINKS=sinks is not None,
        # The interpreter, which is NumPy, can't multiply bfloat16.
        IN_FP32=keys.device.type == 'cpu', num_warps=4, num_stages=2)
