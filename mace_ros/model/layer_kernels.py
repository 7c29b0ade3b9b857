# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Triton kernels of norms, and of rotary embeddings with the write to the KV cache.

Import this module only where Triton is installed.
"""

# Triton evaluates annotations of kernels: there may be no others than its own, and the interpreter
# must not get them as strings, so that annotations are not imported from __future__.

from torch import Tensor
import triton
import triton.language as tl


@triton.jit(do_not_specialize=['inner'])
def normalize(  # type: ignore[no-untyped-def]
        out, x, weight, eps, width, inner, outer_stride, inner_stride, weight_stride,
        RELATIVE: tl.constexpr, CENTERED: tl.constexpr, TILE: tl.constexpr):
    """Program (row) divides a row of ``x`` by its root mean square, and scales it."""
    row = tl.program_id(0)
    dim = tl.arange(0, TILE)
    inside = dim < width
    values = tl.load(x + row // inner * outer_stride + row % inner * inner_stride + dim,
                     mask=inside, other=0.0).to(tl.float32)
    if CENTERED:
        values = tl.where(inside, values - tl.sum(values, 0) / width, 0.0)
    scale = tl.load(weight + row % inner * weight_stride + dim, mask=inside, other=0.0).to(
        tl.float32)
    if RELATIVE:
        scale += 1.0
    factor = tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    tl.store(out + row * width + dim, values * factor * scale, mask=inside)


@triton.jit
def rotate_and_write(  # type: ignore[no-untyped-def]
        query, key, value, cos, sin, keys, values, slots,
        query_head, query_token, key_head, key_token, value_head, value_token, cos_token,
        sin_token, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_TILE: tl.constexpr,
        PAIRS: tl.constexpr, PAIRS_TILE: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr,
        GAP: tl.constexpr, COS_STEP: tl.constexpr, COS_GAP: tl.constexpr, KEY_SIZE: tl.constexpr,
        KEY_TILE: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_TILE: tl.constexpr):
    """
    Program (token, KV head) rotates the key, and the query heads that share it, in place.

    The first values of pairs are STEP apart, and the second ones GAP after them.
    """
    token, kv_head = tl.program_id(0), tl.program_id(1)
    pair, in_group = tl.arange(0, PAIRS_TILE), tl.arange(0, GROUP_TILE)
    inside = pair < PAIRS
    cos_place = cos + token * cos_token + pair * COS_STEP
    sin_place = sin + token * sin_token + pair * COS_STEP
    cos_1 = tl.load(cos_place, mask=inside, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos_place + COS_GAP, mask=inside, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin_place, mask=inside, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin_place + COS_GAP, mask=inside, other=0.0).to(tl.float32)
    dim = FIRST + pair * STEP

    head = kv_head * GROUP + in_group
    place = query + token * query_token + head[:, None] * query_head + dim[None, :]
    is_query = (in_group < GROUP)[:, None] & inside[None, :]
    first = tl.load(place, mask=is_query, other=0.0).to(tl.float32)
    second = tl.load(place + GAP, mask=is_query, other=0.0).to(tl.float32)
    tl.store(place, first * cos_1[None, :] - second * sin_1[None, :], mask=is_query)
    tl.store(place + GAP, second * cos_2[None, :] + first * sin_2[None, :], mask=is_query)

    row = tl.load(slots + token).to(tl.int64) * KV_HEADS + kv_head      # of the cache
    source = key + token * key_token + kv_head * key_head
    target = keys + row * KEY_SIZE
    first = tl.load(source + dim, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + dim + GAP, mask=inside, other=0.0).to(tl.float32)
    rotated_1, rotated_2 = first * cos_1 - second * sin_1, second * cos_2 + first * sin_2
    tl.store(source + dim, rotated_1, mask=inside)
    tl.store(source + dim + GAP, rotated_2, mask=inside)
    tl.store(target + dim, rotated_1, mask=inside)
    tl.store(target + dim + GAP, rotated_2, mask=inside)
    if KEY_SIZE > 2 * PAIRS:     # the rest of a head is not rotated
        rest = tl.arange(0, KEY_TILE)
        is_rest = (rest < FIRST) | ((rest >= FIRST + 2 * PAIRS) & (rest < KEY_SIZE))
        tl.store(target + rest, tl.load(source + rest, mask=is_rest, other=0.0), mask=is_rest)
    dim_v = tl.arange(0, VALUE_TILE)
    tl.store(values + row * VALUE_SIZE + dim_v,
             tl.load(value + token * value_token + kv_head * value_head + dim_v,
                     mask=dim_v < VALUE_SIZE, other=0.0), mask=dim_v < VALUE_SIZE)


def launch_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float, *, relative: bool,
                centered: bool) -> None:
    """
    Launch the kernel of norms.

    ``x`` is ``[1, tokens, width]`` or ``[1, tokens, heads, width]``, contiguous in its last
    dimension; ``out`` and ``weight``, ``[width]`` or ``[heads, width]``, are contiguous.
    """
    width, inner = x.shape[-1], x.shape[-2]
    normalize[(out.numel() // width,)](
        out, x, weight, eps, width, inner, x.stride(-3), x.stride(-2),
        width if weight.dim() == 2 else 0, RELATIVE=relative, CENTERED=centered,
        TILE=triton.next_power_of_2(width),
        num_warps=min(triton.next_power_of_2(max(width // 512, 1)), 8))


def launch_rotation(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor,
                    keys: Tensor, values: Tensor, slots: Tensor, *, first: int, interleaved: bool,
                    shared: bool) -> None:
    """
    Launch the kernel of rotary embeddings.

    All tensors but ``cos`` and ``sin`` are contiguous in their last dimension, and the cache in
    all.
    """
    heads, tokens = query.shape[1:3]
    kv_heads, key_size = keys.shape[1:]
    group, value_size = heads // kv_heads, values.shape[2]
    pairs, column = cos.shape[-1] // (1 if shared else 2), cos.stride(-1)
    step, gap = (2, 1) if interleaved else (1, pairs)
    power = triton.next_power_of_2
    rotate_and_write[(tokens, kv_heads)](
        query, key, value, cos, sin, keys, values, slots, query.stride(1), query.stride(2),
        key.stride(1), key.stride(2), value.stride(1), value.stride(2), cos.stride(-2),
        sin.stride(-2), KV_HEADS=kv_heads, GROUP=group, GROUP_TILE=power(group), PAIRS=pairs,
        PAIRS_TILE=power(pairs), FIRST=first, STEP=step, GAP=gap,
        COS_STEP=column * (1 if shared else step), COS_GAP=0 if shared else column * gap,
        KEY_SIZE=key_size, KEY_TILE=power(key_size), VALUE_SIZE=value_size,
        VALUE_TILE=power(value_size), num_warps=2)
