# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Numba kernels of what a decoder layer computes between its products with weights, for few tokens.

Arrays of ``uint16`` hold bfloat16; each kernel computes in fp32, and rounds what it writes. All
arrays are contiguous; those named ``y``, ``x``, ``out`` and ``hidden`` are ``[rows, ...]``. Import
this module only where Numba is installed. The compiled kernels are kept in files, so that only
the first start compiles them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
import numpy as np

# A sum may be computed in any order, so in vectors. NaN and infinity stay what they are.
compiled = njit(cache=True, nogil=True, error_model='numpy',
                fastmath={'reassoc', 'contract', 'arcp', 'nsz'})


def _as_float(context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


def _as_bits(context: Any, number: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


# Map 32 bits to the fp32 number that they are, and back.
as_float: Any = intrinsic(_as_float)
as_bits: Any = intrinsic(_as_bits)


def load(values: np.ndarray, i: int) -> Any:
    """Return element ``i`` in fp32; compiled code only."""
    raise NotImplementedError


@overload(load, inline='always')
def _load(values, i):  # type: ignore[no-untyped-def]
    if values.dtype == types.uint16:
        return lambda values, i: as_float(np.uint32(values[i]) << np.uint32(16))
    return lambda values, i: values[i]


def store(values: np.ndarray, i: int, number: float) -> None:
    """Round a number of fp32 to the nearest value, and write it; compiled code only."""
    raise NotImplementedError


@overload(store, inline='always')
def _store(values, i, number):  # type: ignore[no-untyped-def]
    def rounded(values, i, number):  # type: ignore[no-untyped-def]
        bits = as_bits(np.float32(number))
        to_even = np.uint32(0x7fff) + ((bits >> np.uint32(16)) & np.uint32(1))
        values[i] = np.uint16((bits + to_even) >> np.uint32(16))

    def plain(values, i, number):  # type: ignore[no-untyped-def]
        values[i] = number

    return rounded if values.dtype == types.uint16 else plain


@compiled
def add_update(y: np.ndarray, x: np.ndarray, a: np.ndarray, b: np.ndarray,
               slots: np.ndarray) -> None:
    """
    Add to each row of ``y`` the update by the adapter in its slot; slot 0 has none.

    ``a`` is ``[slots, width, in]`` and ``b``, already scaled, ``[slots, width, out]``, in fp32.
    """
    exact = np.empty(x.shape[1], np.float32)
    update = np.empty(y.shape[1], np.float32)
    for row in range(len(slots)):
        slot = slots[row]
        if slot == 0:
            continue
        for i in range(len(exact)):
            exact[i] = load(x[row], i)
        update[:] = 0
        for k in range(a.shape[1]):
            down, up = a[slot, k], b[slot, k]
            low = np.float32(0)
            for i in range(len(exact)):
                low += exact[i] * down[i]
            for i in range(len(update)):
                update[i] += low * up[i]
        for i in range(len(update)):
            store(y[row], i, load(y[row], i) + update[i])


@compiled
def normalize(out: np.ndarray, x: np.ndarray, weight: np.ndarray, eps: float) -> None:
    """Divide each row of ``x`` by its root mean square, and multiply it by ``weight``."""
    for row in range(len(x)):
        scale_row(out[row], x[row], weight, eps)


@compiled
def add_and_normalize(out: np.ndarray, hidden: np.ndarray, y: np.ndarray, weight: np.ndarray,
                      eps: float) -> None:
    """Add ``y`` to ``hidden``, and normalize the sum to ``out``."""
    for row in range(len(hidden)):
        for i in range(hidden.shape[1]):
            store(hidden[row], i, load(hidden[row], i) + load(y[row], i))
        scale_row(out[row], hidden[row], weight, eps)


@compiled
def normalize_heads(y: np.ndarray, first: int, weight: np.ndarray, eps: float,
                    heads: int) -> None:
    """Normalize in place the heads of each row that begin with element ``first``."""
    size = len(weight)
    for row in range(len(y)):
        for head in range(heads):
            own = y[row, first + head * size:first + (head + 1) * size]
            scale_row(own, own, weight, eps)


@compiled
def scale_row(out: np.ndarray, x: np.ndarray, weight: np.ndarray, eps: float) -> None:
    """Divide ``x`` by its root mean square, and multiply it by ``weight``; all are ``[width]``."""
    squares = np.float32(0)
    for i in range(len(x)):
        squares += load(x, i) * load(x, i)
    factor = np.float32(1) / np.sqrt(squares / np.float32(len(x)) + np.float32(eps))
    for i in range(len(x)):
        store(out, i, load(x, i) * factor * load(weight, i))


@compiled
def rotate_and_write(y: np.ndarray, cos: np.ndarray, sin: np.ndarray, keys: np.ndarray,
                     values: np.ndarray, slots: np.ndarray) -> None:
    """
    Rotate queries and keys in place, and write keys and values to the cache.

    ``y`` holds the heads of queries, keys and values of each row. ``cos`` and ``sin`` are
    ``[rows, rotated values of a head]``, of which each in the first half is a pair with one in
    the second. ``keys`` and ``values`` are the cache, ``[cache slots, KV heads, size]``, and
    ``slots`` those of the rows.
    """
    kv_heads, size = keys.shape[1:]
    rotated = y.shape[1] // size - kv_heads     # heads of queries and keys
    first_key, first_value = (rotated - kv_heads) * size, rotated * size
    half = cos.shape[1] // 2
    for row in range(len(y)):
        for head in range(rotated):
            own = y[row, head * size:(head + 1) * size]
            for i in range(half):
                first, second = load(own, i), load(own, i + half)
                store(own, i, first * load(cos[row], i) - second * load(sin[row], i))
                store(own, i + half, second * load(cos[row], i + half)
                      + first * load(sin[row], i + half))
        for head in range(kv_heads):
            for i in range(head * size, (head + 1) * size):
                keys[slots[row], head, i - head * size] = y[row, first_key + i]
                values[slots[row], head, i - head * size] = y[row, first_value + i]


@compiled
def attend(out: np.ndarray, y: np.ndarray, keys: np.ndarray, values: np.ndarray,
           slots: np.ndarray, lengths: np.ndarray, window: int, scale: float) -> None:
    """
    Attend with the queries at the beginning of each row of ``y``.

    ``out`` is ``[rows, heads * size]``, and ``keys`` and ``values`` are the cache. Row i attends
    to the last ``window`` of the cache slots ``slots[i, :lengths[i]]``.
    """
    kv_heads, size = keys.shape[1:]
    group = out.shape[1] // size // kv_heads        # heads that share keys and values
    query = np.empty((group, size), np.float32)
    shared = np.empty(size, np.float32)             # a key or a value
    weights = np.empty((group, slots.shape[1]), np.float32)
    summed = np.empty((group, size), np.float32)
    for row in range(len(y)):
        first = max(lengths[row] - window, 0)
        for kv_head in range(kv_heads):
            for head in range(group):
                for i in range(size):
                    query[head, i] = load(y[row], (kv_head * group + head) * size + i) * scale
            for t in range(first, lengths[row]):
                key = keys[slots[row, t], kv_head]
                for i in range(size):
                    shared[i] = load(key, i)
                for head in range(group):
                    score = np.float32(0)
                    for i in range(size):
                        score += query[head, i] * shared[i]
                    weights[head, t] = score
            for head in range(group):
                own = weights[head, first:lengths[row]]
                own[:] = np.exp(own - own.max())
                own /= own.sum()
            summed[:] = 0
            for t in range(first, lengths[row]):
                value = values[slots[row, t], kv_head]
                for i in range(size):
                    shared[i] = load(value, i)
                for head in range(group):
                    weight = weights[head, t]
                    for i in range(size):
                        summed[head, i] += weight * shared[i]
            for head in range(group):
                for i in range(size):
                    store(out[row], (kv_head * group + head) * size + i, summed[head, i])


@compiled
def multiply_gate(out: np.ndarray, y: np.ndarray) -> None:
    """Multiply SiLU of the first half of each row by the second half."""
    width = out.shape[1]
    for row in range(len(y)):
        for i in range(width):
            gate = load(y[row], i)
            store(out[row], i, gate / (np.float32(1) + np.exp(-gate)) * load(y[row], width + i))
