# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Triton kernels of RMSNorm, and of rotary embeddings with the write to the KV cache.

Import this module only where Triton is installed.
"""

# Triton evaluates annotations of kernels: there may be no others than its own, and the interpreter
# must not get them as strings, so that annotations are not imported from __future__.

from torch import Tensor
import triton
import triton.language as tl


@triton.jit(do_not_specialize=['inner'])
def normalize(  # type: ignore[no-untyped-def]
        out, x, weight, eps, width, inner, outer_stride, inner_stride,
        RELATIVE: tl.constexpr, TILE: tl.constexpr):
    """Program (row) divides a row of ``x`` by its root mean square, and scales it."""
    row = tl.program_id(0)
    dim = tl.arange(0, TILE)
    inside = dim < width
    values = tl.load(x + row // inner * outer_stride + row % inner * inner_stride + dim,
                     mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + dim, mask=inside, other=0.0).to(tl.float32)
    if RELATIVE:
        scale += 1.0
    factor = tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    tl.store(out + row * width + dim, values * factor * scale, mask=inside)


@triton.jit
def rotate_and_write(  # type: ignore[no-untyped-def]
        query, key, value, cos, sin, keys, values, slots,
        query_head, query_token, key_head, key_token, value_head, value_token, cos_token,
        sin_token, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_TILE: tl.constexpr,
        HALF: tl.constexpr, HALF_TILE: tl.constexpr, KEY_SIZE: tl.constexpr,
        REST_TILE: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_TILE: tl.constexpr):
    """Program (token, KV head) rotates the key, and the query heads that share it, in place."""
    token, kv_head = tl.program_id(0), tl.program_id(1)
    dim, in_group = tl.arange(0, HALF_TILE), tl.arange(0, GROUP_TILE)
    inside = dim < HALF
    cos_1 = tl.load(cos + token * cos_token + dim, mask=inside, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos + token * cos_token + HALF + dim, mask=inside, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin + token * sin_token + dim, mask=inside, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin + token * sin_token + HALF + dim, mask=inside, other=0.0).to(tl.float32)

    head = kv_head * GROUP + in_group
    place = query + token * query_token + head[:, None] * query_head + dim[None, :]
    is_query = (in_group < GROUP)[:, None] & inside[None, :]
    first = tl.load(place, mask=is_query, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=is_query, other=0.0).to(tl.float32)
    tl.store(place, first * cos_1[None, :] - second * sin_1[None, :], mask=is_query)
    tl.store(place + HALF, second * cos_2[None, :] + first * sin_2[None, :], mask=is_query)

    row = tl.load(slots + token).to(tl.int64) * KV_HEADS + kv_head      # of the cache
    source = key + token * key_token + kv_head * key_head
    target = keys + row * KEY_SIZE
    first = tl.load(source + dim, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + dim, mask=inside, other=0.0).to(tl.float32)
    rotated_1, rotated_2 = first * cos_1 - second * sin_1, second * cos_2 + first * sin_2
    tl.store(source + dim, rotated_1, mask=inside)
    tl.store(source + HALF + dim, rotated_2, mask=inside)
    tl.store(target + dim, rotated_1, mask=inside)
    tl.store(target + HALF + dim, rotated_2, mask=inside)
    if KEY_SIZE > 2 * HALF:     # the rest of a head is not rotated
        rest = 2 * HALF + tl.arange(0, REST_TILE)
        tl.store(target + rest, tl.load(source + rest, mask=rest < KEY_SIZE, other=0.0),
                 mask=rest < KEY_SIZE)
    dim_v = tl.arange(0, VALUE_TILE)
    tl.store(values + row * VALUE_SIZE + dim_v,
             tl.load(value + token * value_token + kv_head * value_head + dim_v,
                     mask=dim_v < VALUE_SIZE, other=0.0), mask=dim_v < VALUE_SIZE)


def launch_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float, relative: bool) -> None:
    """
    Launch the kernel of RMSNorm.

    ``x`` is ``[1, tokens, width]`` or ``[1, tokens, heads, width]``, contiguous in its last
    dimension; ``out`` and ``weight`` are contiguous.
    """
    width, inner = x.shape[-1], x.shape[-2]
    normalize[(out.numel() // width,)](
        out, x, weight, eps, width, inner, x.stride(-3), x.stride(-2), RELATIVE=relative,
        TILE=triton.next_power_of_2(width),
        num_warps=min(triton.next_power_of_2(max(width // 512, 1)), 8))


def launch_rotation(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor,
                    keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """
    Launch the kernel of rotary embeddings.

    All tensors are contiguous in their last dimension, and the cache in all.
    """
    heads, tokens = query.shape[1:3]
    kv_heads, key_size = keys.shape[1:]
    half, group, value_size = cos.shape[-1] // 2, heads // kv_heads, values.shape[2]
    power = triton.next_power_of_2
    rotate_and_write[(tokens, kv_heads)](
        query, key, value, cos, sin, keys, values, slots, query.stride(1), query.stride(2),
        key.stride(1), key.stride(2), value.stride(1), value.stride(2), cos.stride(-2),
        sin.stride(-2), KV_HEADS=kv_heads, GROUP=group, GROUP_TILE=power(group), HALF=half,
        HALF_TILE=power(half), KEY_SIZE=key_size, REST_TILE=power(max(key_size - 2 * half, 1)),
        VALUE_SIZE=value_size, VALUE_TILE=power(value_size), num_warps=2)
