# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Triton kernels of decode attention over block tables (split-KV, also known as flash decoding).

One token of a sequence attends to all keys before it. One program per sequence would leave most
of a GPU idle, so the keys of a row are split: each program computes the softmax and the weighted
values of its part, and a second kernel combines the parts by the logarithms of their sums.
Import this module only where Triton is installed.
"""

# Triton evaluates annotations of kernels: there may be no others than its own, and the interpreter
# must not get them as strings, so that annotations are not imported from __future__.

from torch import Tensor
import triton
import triton.language as tl

TILE_BYTES = 16384                  # of the keys that a program reads at once
MIN_TILE, MAX_TILE = 16, 64         # in tokens; the product of tensor cores takes 16 at least
MIN_HEADS, MAX_HEADS = 16, 64       # query heads of one program


@triton.jit
def split_range(  # type: ignore[no-untyped-def]
        length, window, split, splits, SPLIT_TOKENS: tl.constexpr, TILE: tl.constexpr):
    """
    Return how many splits a row uses, and the first and the last key (exclusive) of ``split``.

    Every split below the returned count has at least one key. Its size is a multiple of TILE.
    """
    oldest = tl.maximum(length - window, 0)
    keys = length - oldest
    wanted = tl.minimum((keys + SPLIT_TOKENS - 1) // SPLIT_TOKENS, splits)
    # Quotients are rounded up as here; a call of tl.cdiv() costs the interpreter milliseconds.
    each = ((keys + wanted - 1) // wanted + TILE - 1) // TILE * TILE
    start = oldest + split * each
    return (keys + each - 1) // each, start, tl.minimum(start + each, length)


@triton.jit(do_not_specialize=['window', 'splits', 'table_stride'])
def attend_split(  # type: ignore[no-untyped-def]
        partial, log_sums, query, keys, values, tables, lengths,
        sinks, scale, softcap, window, splits, table_stride,
        query_row, query_head,
        KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_TILE: tl.constexpr,
        KEY_SIZE: tl.constexpr, KEY_TILE: tl.constexpr, VALUE_SIZE: tl.constexpr,
        VALUE_TILE: tl.constexpr, TILE: tl.constexpr, SPLIT_TOKENS: tl.constexpr,
        BLOCK_TOKENS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
        IN_FP32: tl.constexpr):
    """
    Attend to one split of a row's keys with query heads that share a KV head.

    Program (row, KV head and part of its query heads, split) writes ``partial``, ``[rows, heads,
    splits, value size]``, and ``log_sums``, ``[rows, heads, splits]``. The splits that a row does
    not use stay unwritten.
    """
    row = tl.program_id(0)
    parts: tl.constexpr = (GROUP + GROUP_TILE - 1) // GROUP_TILE
    kv_head = tl.program_id(1) // parts
    split = tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    used, start, end = split_range(length, window, split, splits, SPLIT_TOKENS, TILE)
    if split >= used:
        return

    in_group = tl.program_id(1) % parts * GROUP_TILE + tl.arange(0, GROUP_TILE)
    is_head = in_group < GROUP
    head = kv_head * GROUP + in_group
    key_dim, value_dim = tl.arange(0, KEY_TILE), tl.arange(0, VALUE_TILE)
    q = tl.load(query + row * query_row + head[:, None] * query_head + key_dim[None, :],
                mask=is_head[:, None] & (key_dim < KEY_SIZE)[None, :], other=0.0)
    if IN_FP32:
        q = q.to(tl.float32)

    largest = tl.full([GROUP_TILE], float('-inf'), tl.float32)
    total = tl.full([GROUP_TILE], 0.0, tl.float32)
    if HAS_SINKS:       # a score without a value, which belongs to the first split
        sink = tl.load(sinks + head, mask=is_head, other=0.0).to(tl.float32)
        largest = tl.where(split == 0, sink, largest)
        total = tl.where(split == 0, 1.0, total)
    weighted = tl.full([GROUP_TILE, VALUE_TILE], 0.0, tl.float32)
    for first in range(start, end, TILE):
        position = first + tl.arange(0, TILE)
        # Slots of other sequences are not even read: they may hold NaN.
        inside = position < end
        block = tl.load(tables + row * table_stride + position // BLOCK_TOKENS,
                        mask=inside, other=0).to(tl.int64)
        place = (block * BLOCK_TOKENS + position % BLOCK_TOKENS) * KV_HEADS + kv_head
        k = tl.load(keys + place[None, :] * KEY_SIZE + key_dim[:, None],
                    mask=inside[None, :] & (key_dim < KEY_SIZE)[:, None], other=0.0)
        v = tl.load(values + place[:, None] * VALUE_SIZE + value_dim[None, :],
                    mask=inside[:, None] & (value_dim < VALUE_SIZE)[None, :], other=0.0)
        if IN_FP32:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, k, input_precision='ieee') * scale
        if HAS_SOFTCAP:     # with tanh(x) = 2 sigmoid(2 x) - 1
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        scores = tl.where(inside[None, :], scores, float('-inf'))
        # The first key of a tile is always inside, so that this is finite.
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - new_largest[:, None])
        rescale = tl.exp(largest - new_largest)
        total = total * rescale + tl.sum(weights, 1)
        weighted = weighted * rescale[:, None] + tl.dot(
            weights.to(v.dtype), v, input_precision='ieee')
        largest = new_largest

    part = (row * KV_HEADS * GROUP + head) * splits + split
    tl.store(partial + part[:, None] * VALUE_SIZE + value_dim[None, :],
             weighted / total[:, None],
             mask=is_head[:, None] & (value_dim < VALUE_SIZE)[None, :])
    tl.store(log_sums + part, largest + tl.log(total), mask=is_head)


@triton.jit(do_not_specialize=['window', 'splits'])
def combine_splits(  # type: ignore[no-untyped-def]
        out, partial, log_sums, lengths, window, splits,
        HEADS: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_TILE: tl.constexpr,
        TILE: tl.constexpr, SPLIT_TOKENS: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Combine the parts of each (row, head), in proportion to their sums."""
    row, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + row).to(tl.int32)
    used, _, _ = split_range(length, window, 0, splits, SPLIT_TOKENS, TILE)
    split, value_dim = tl.arange(0, MAX_SPLITS), tl.arange(0, VALUE_TILE)
    is_used, is_value = split < used, value_dim < VALUE_SIZE
    part = (row * HEADS + head) * splits + split
    logs = tl.load(log_sums + part, mask=is_used, other=float('-inf'))
    shares = tl.exp(logs - tl.max(logs, 0))
    values = tl.load(partial + part[:, None] * VALUE_SIZE + value_dim[None, :],
                     mask=is_used[:, None] & is_value[None, :], other=0.0)
    result = tl.sum(values * shares[:, None], 0) / tl.sum(shares, 0)
    tl.store(out + (row * HEADS + head) * VALUE_SIZE + value_dim, result, mask=is_value)


def launch(out: Tensor, partial: Tensor, log_sums: Tensor, query: Tensor, keys: Tensor,
           values: Tensor, tables: Tensor, lengths: Tensor, sinks: Tensor | None, *, scale: float,
           window: int, softcap: float | None, block_tokens: int, split_tokens: int,
           max_splits: int) -> None:
    """
    Launch both kernels; if ``log_sums`` has one split, only the first one, without ``partial``.

    ``query`` is ``[rows, heads, key size]``, contiguous in its last dimension; all others are
    contiguous. ``max_splits`` is a power of two.
    """
    rows, heads, splits = log_sums.shape
    kv_heads, key_size = keys.shape[1:]
    value_size = values.shape[2]
    group = heads // kv_heads
    group_tile = min(max(triton.next_power_of_2(group), MIN_HEADS), MAX_HEADS)
    key_tile, value_tile = (max(triton.next_power_of_2(n), 16) for n in (key_size, value_size))
    tile = min(max(TILE_BYTES // (key_tile * keys.element_size()), MIN_TILE), MAX_TILE)
    attend_split[(rows, kv_heads * triton.cdiv(group, group_tile), splits)](
        partial if splits > 1 else out, log_sums, query, keys, values, tables, lengths,
        query if sinks is None else sinks, scale, 1.0 if softcap is None else softcap, window,
        splits, tables.stride(0), query.stride(0), query.stride(1),
        KV_HEADS=kv_heads, GROUP=group, GROUP_TILE=group_tile, KEY_SIZE=key_size,
        KEY_TILE=key_tile, VALUE_SIZE=value_size, VALUE_TILE=value_tile, TILE=tile,
        SPLIT_TOKENS=split_tokens, BLOCK_TOKENS=block_tokens, HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
        # The interpreter, which is NumPy, can't multiply bfloat16.
        IN_FP32=keys.device.type == 'cpu', num_warps=4, num_stages=2)
    if splits > 1:
        combine_splits[(rows, heads)](
            out, partial, log_sums, lengths, window, splits, HEADS=heads, VALUE_SIZE=value_size,
            VALUE_TILE=value_tile, TILE=tile, SPLIT_TOKENS=split_tokens, MAX_SPLITS=max_splits,
            num_warps=4)
