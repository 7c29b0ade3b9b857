# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
CPU instructions that Numba has no functions for, generated as LLVM IR.

Only compiled code can call them. Import this module only where Numba is installed. A
change here takes one in :mod:`mace_ros.model.cpu_kernels` as well; see there.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
import numpy as np

GROUP = 32                      # inputs that share a scale in 4 bits (mace_ros.model.int4_rows)
GROUP_BYTES = GROUP // 2 + 4

# For mypy, a function has the arguments of the one that generates its code.
intrinsic: Any = extending.intrinsic


# -- numbers -----------------------------------------------------------------------------


@intrinsic
def as_float(context: Any, bits: Any) -> Any:
    """Return the fp32 number that 32 bits are."""
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def as_bits(context: Any, number: Any) -> Any:
    """Return the bits of an fp32 number."""
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def load(values: np.ndarray, i: int) -> Any:
    """Return element ``i`` in fp32; compiled code only."""
    raise NotImplementedError


@extending.overload(load, inline='always')
def _load(values, i):  # type: ignore[no-untyped-def]
    if values.dtype == types.uint16:
        return lambda values, i: as_float(np.uint32(values[i]) << np.uint32(16))
    return lambda values, i: np.float32(values[i])


def store(values: np.ndarray, i: int, number: float) -> None:
    """Round a number of fp32 to the nearest value, and write it; compiled code only."""
    raise NotImplementedError


@extending.overload(store, inline='always')
def _store(values, i, number):  # type: ignore[no-untyped-def]
    def rounded(values, i, number):  # type: ignore[no-untyped-def]
        bits = as_bits(np.float32(number))
        to_even = np.uint32(0x7fff) + ((bits >> np.uint32(16)) & np.uint32(1))
        values[i] = np.uint16((bits + to_even) >> np.uint32(16))

    def plain(values, i, number):  # type: ignore[no-untyped-def]
        values[i] = number

    return rounded if values.dtype == types.uint16 else plain


# -- memory ------------------------------------------------------------------------------


@intrinsic
def pointer(context: Any, address: Any) -> Any:
    """Return an address as a pointer, from which ``carray`` makes an array."""
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.uint64), generate


@intrinsic
def prefetch(context: Any, address: Any) -> Any:
    """Prefetch the cache line at an address, which need not be mapped."""
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, *[number] * 3])
        function = cgutils.get_or_insert_function(builder.module, kind, 'llvm.prefetch.p0')
        # To read it, and into the second-level cache.
        builder.call(function, [builder.inttoptr(args[0], cgutils.voidptr_t),
                                number(0), number(2), number(1)])
        return context.get_dummy_value()

    return types.void(types.uint64), generate


# -- threads -----------------------------------------------------------------------------


@intrinsic
def fetch_add(context: Any, counters: Any, i: Any, number: Any) -> Any:
    """Add to ``counters[i]``, as other threads may do meanwhile; return it as it was before."""
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(counters)(context, builder, args[0])
        place = cgutils.get_item_pointer(context, builder, counters, array, [args[1]])
        return builder.atomic_rmw('add', place, args[2], 'seq_cst')

    return types.int64(counters, types.int64, types.int64), generate


@intrinsic
def load_acquire(context: Any, counters: Any, i: Any) -> Any:
    """Return ``counters[i]``; what other threads wrote before they added to it is then seen."""
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(counters)(context, builder, args[0])
        place = cgutils.get_item_pointer(context, builder, counters, array, [args[1]])
        return builder.load_atomic(place, 'acquire', 8)

    return types.int64(counters, types.int64), generate


@intrinsic
def yield_core(context: Any) -> Any:
    """Let the system run another thread on this core, if one waits for it."""
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, 'sched_yield'), [])
        return context.get_dummy_value()

    return types.void(), generate


# -- weights in 4 bits -------------------------------------------------------------------


def _dot_int4(rows: int) -> Any:
    """
    Return a function that multiplies an output's weights in 4 bits with ``rows`` rows.

    All is given by addresses: that of the weights, those of ``pairs`` and ``sums``, and that of the
    results, in fp32. LLVM does not vectorise Numba's loops over 4-bit weights.
    """
    number, byte, half, index = ir.FloatType(), ir.IntType(8), ir.HalfType(), ir.IntType(32)
    lanes = GROUP // 2
    numbers, pairs_of_weights = ir.VectorType(number, lanes), ir.VectorType(byte, lanes)
    fast = ('contract', 'reassoc')

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        weights, pairs, sums, results, groups = args

        def at(address: Any, group: Any, size: int, first: int, kind: Any) -> Any:
            """Return what lies ``first`` bytes behind a group's beginning."""
            offset = builder.add(builder.mul(group, group.type(size)), group.type(first))
            place = builder.inttoptr(builder.add(address, offset), kind.as_pointer())
            return builder.load(place, align=1 if kind in (pairs_of_weights, half) else 4)

        def broadcast(x: Any) -> Any:
            nothing = ir.Constant(numbers, ir.Undefined)
            return builder.shuffle_vector(
                builder.insert_element(nothing, x, index(0)), nothing,
                ir.Constant(ir.VectorType(index, lanes), [0] * lanes))

        def add_product(place: Any, x: Any, y: Any) -> None:
            product = builder.fmul(x, y, flags=fast)
            builder.store(builder.fadd(builder.load(place), product, flags=fast), place)

        totals, rests = ([cgutils.alloca_once_value(builder, zero) for _ in range(rows)]
                         for zero in (ir.Constant(numbers, [0.0] * lanes), number(0.0)))
        with cgutils.for_range(builder, groups, intp=groups.type) as loop:
            group = loop.index
            packed = at(weights, group, GROUP_BYTES, 0, pairs_of_weights)
            scale, lowest = (
                builder.fpext(at(weights, group, GROUP_BYTES, lanes + i, half), number)
                for i in (0, 2))
            low, whole = (builder.uitofp(x, numbers) for x in (
                builder.and_(packed, ir.Constant(pairs_of_weights, [15] * lanes)), packed))
            scales = broadcast(scale)
            for row, (total, rest) in enumerate(zip(totals, rests, strict=True)):
                first, second = (
                    at(pairs, group, 4 * GROUP * rows, 4 * (2 * row + i) * lanes, numbers)
                    for i in range(2))
                product = builder.fadd(builder.fmul(low, first, flags=fast),
                                       builder.fmul(whole, second, flags=fast), flags=fast)
                add_product(total, product, scales)
                add_product(rest, lowest, at(sums, group, 4 * rows, 4 * row, number))
        add_up = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(number, [number, numbers]),
            f'llvm.vector.reduce.fadd.v{lanes}f32')
        for row, (total, rest) in enumerate(zip(totals, rests, strict=True)):
            result = builder.call(add_up, [builder.load(rest), builder.load(total)], fastmath=fast)
            builder.store(result, builder.inttoptr(
                builder.add(results, results.type(4 * row)), number.as_pointer()))
        return context.get_dummy_value()

    @intrinsic
    def dot(context: Any, weights: Any, pairs: Any, sums: Any, results: Any, groups: Any) -> Any:
        return types.void(*[types.uint64] * 4, types.int64), generate

    return dot


dot_int4, dot_int4_of_four = _dot_int4(1), _dot_int4(4)
