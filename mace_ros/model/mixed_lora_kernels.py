# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Triton kernels of the LoRA update of tokens that use different slots.

As in Punica and vLLM, one kernel shrinks each token to the rank of its adapter, and a second one
expands the result to the outputs. A program takes a tile of tokens and loops over the slots; the
loop skips those that no token of the tile uses, which costs a comparison. The product of a slot
counts only for its own tokens: what other slots hold, were it NaN, does not reach them.
Import this module only where Triton is installed.
"""

# Triton evaluates annotations of kernels: there may be no others than its own, and the interpreter
# must not get them as strings, so that annotations are not imported from __future__.

from torch import Tensor
import triton
import triton.language as tl

INPUT_TILE, OUTPUT_TILE = 128, 64       # read or written at once
MIN_WIDTH, MAX_WIDTH = 16, 64           # of the rows of A, or of B, of a slot that are read at once
SPLIT_TILE = 8                          # parts of a sum that are read at once


@triton.jit(do_not_specialize=['tokens', 'slots', 'width'])
def shrink(  # type: ignore[no-untyped-def]
        low, x, slots_a, token_slots, tokens, slots, width, inputs, split_inputs, x_row,
        ROW_TILE: tl.constexpr, WIDTH_TILE: tl.constexpr, TILE: tl.constexpr,
        IN_FP32: tl.constexpr):
    """
    Multiply each token by A of its slot.

    Program (tile of tokens, tile of the width, split of the inputs) writes its part of ``low``,
    ``[splits, tokens, width]`` in fp32.
    """
    row = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)
    column = tl.program_id(1) * WIDTH_TILE + tl.arange(0, WIDTH_TILE)
    split = tl.program_id(2)
    is_row, is_column = row < tokens, column < width
    slot = tl.load(token_slots + row, mask=is_row, other=0).to(tl.int32)
    start = split * split_inputs
    end = tl.minimum(start + split_inputs, inputs)
    total = tl.full([ROW_TILE, WIDTH_TILE], 0.0, tl.float32)
    lowest = tl.min(tl.where(slot > 0, slot, slots), 0)     # slot 0 is the base model
    for used in range(lowest, tl.max(slot, 0) + 1):
        own = slot == used
        if tl.max(own.to(tl.int32), 0) > 0:
            product = tl.full([ROW_TILE, WIDTH_TILE], 0.0, tl.float32)
            for first in range(start, end, TILE):
                place = first + tl.arange(0, TILE)
                inside = place < end
                values = tl.load(x + row[:, None] * x_row + place[None, :],
                                 mask=own[:, None] & inside[None, :], other=0.0)
                weights = tl.load(slots_a + (used * width + column)[None, :] * inputs
                                  + place[:, None],
                                  mask=is_column[None, :] & inside[:, None], other=0.0)
                if IN_FP32:
                    values, weights = values.to(tl.float32), weights.to(tl.float32)
                product += tl.dot(values, weights, input_precision='ieee')
            total = tl.where(own[:, None], product, total)
    tl.store(low + (split * tokens + row)[:, None] * width + column[None, :], total,
             mask=is_row[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=['tokens', 'slots', 'width', 'splits'])
def expand(  # type: ignore[no-untyped-def]
        y, low, slots_b, token_slots, tokens, slots, width, splits, outputs,
        ROW_TILE: tl.constexpr, WIDTH_TILE: tl.constexpr, SPLIT_TILE: tl.constexpr,
        TILE: tl.constexpr, IN_FP32: tl.constexpr):
    """Multiply each token's sum of ``low`` over the splits by B of its slot; add that to ``y``."""
    row = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)
    is_row = row < tokens
    slot = tl.load(token_slots + row, mask=is_row, other=0).to(tl.int32)
    highest = tl.max(slot, 0)
    if highest == 0:
        return
    lowest = tl.min(tl.where(slot > 0, slot, slots), 0)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_column = column < outputs
    total = tl.full([ROW_TILE, TILE], 0.0, tl.float32)
    for first in range(0, width, WIDTH_TILE):
        place = first + tl.arange(0, WIDTH_TILE)
        inside = place < width
        values = tl.full([ROW_TILE, WIDTH_TILE], 0.0, tl.float32)
        for first_split in range(0, splits, SPLIT_TILE):
            split = first_split + tl.arange(0, SPLIT_TILE)[:, None, None]
            values += tl.sum(tl.load(
                low + (split * tokens + row[None, :, None]) * width + place[None, None, :],
                mask=(split < splits) & is_row[None, :, None] & inside[None, None, :],
                other=0.0), 0)
        for used in range(lowest, highest + 1):
            own = slot == used
            if tl.max(own.to(tl.int32), 0) > 0:
                weights = tl.load(slots_b + (used * width + place)[:, None] * outputs
                                  + column[None, :],
                                  mask=inside[:, None] & is_column[None, :], other=0.0)
                if IN_FP32:
                    weights = weights.to(tl.float32)
                product = tl.dot(values.to(weights.dtype), weights, input_precision='ieee')
                total += tl.where(own[:, None], product, 0.0)
    target = y + row[:, None] * outputs + column[None, :]
    changed = (slot > 0)[:, None] & is_column[None, :]
    tl.store(target, tl.load(target, mask=changed, other=0.0).to(tl.float32) + total,
             mask=changed)


def launch(y: Tensor, low: Tensor, x: Tensor, slots_a: Tensor, slots_b: Tensor,
           token_slots: Tensor, *, row_tile: int) -> None:
    """
    Launch both kernels.

    ``x``, ``[tokens, in]``, is contiguous in its last dimension, all others are contiguous; ``y``
    is ``[tokens, out]``. ``row_tile`` is a power of two.
    """
    splits, tokens, width = low.shape
    inputs, outputs, slots = x.shape[1], y.shape[1], slots_a.shape[0] // width
    width_tile = min(max(triton.next_power_of_2(width), MIN_WIDTH), MAX_WIDTH)
    rows = triton.cdiv(tokens, row_tile)
    split_inputs = triton.cdiv(triton.cdiv(inputs, splits), INPUT_TILE) * INPUT_TILE
    # The interpreter, which is NumPy, can't multiply bfloat16.
    in_fp32 = x.device.type == 'cpu'
    shrink[(rows, triton.cdiv(width, width_tile), splits)](
        low, x, slots_a, token_slots, tokens, slots, width, inputs, split_inputs, x.stride(0),
        ROW_TILE=row_tile, WIDTH_TILE=width_tile, TILE=INPUT_TILE, IN_FP32=in_fp32, num_warps=4,
        num_stages=3)
    expand[(rows, triton.cdiv(outputs, OUTPUT_TILE))](
        y, low, slots_b, token_slots, tokens, slots, width, splits, outputs, ROW_TILE=row_tile,
        WIDTH_TILE=width_tile, SPLIT_TILE=SPLIT_TILE, TILE=OUTPUT_TILE, IN_FP32=in_fp32,
        num_warps=4, num_stages=2)
