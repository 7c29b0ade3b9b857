# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Triton kernel of the product of tokens with an expert each.

Import this module only where Triton is installed.
"""

# Triton evaluates annotations of kernels: there may be no others than its own, and the interpreter
# must not get them as strings, so that annotations are not imported from __future__.

from torch import Tensor
import triton
import triton.language as tl

# Outputs and inputs of a tile: the weights of a warp should be consecutive in memory.
TILES, TRANSPOSED_TILES = (16, 256), (64, 64)


@triton.jit(do_not_specialize=['pairs_of_row'])
def multiply_pairs(  # type: ignore[no-untyped-def]
        out, x, weight, bias, experts, pairs_of_row, inputs, outputs, expert_stride,
        output_stride, input_stride, HAS_BIAS: tl.constexpr, OUTPUT_TILE: tl.constexpr,
        INPUT_TILE: tl.constexpr):
    """
    Program (pair, tile of outputs) multiplies a row of ``x`` with some rows of its expert.

    Programs that run at the same time belong to different pairs and the same tile, so that pairs
    with a common expert read its weights once from memory.
    """
    pair = tl.program_id(0)
    output = tl.program_id(1) * OUTPUT_TILE + tl.arange(0, OUTPUT_TILE)
    is_output = output < outputs
    expert = tl.load(experts + pair).to(tl.int64)
    source = weight + expert * expert_stride + output[:, None] * output_stride
    total = tl.full([OUTPUT_TILE, INPUT_TILE], 0.0, tl.float32)
    for first in range(0, inputs, INPUT_TILE):
        place = first + tl.arange(0, INPUT_TILE)
        inside = place < inputs
        values = tl.load(x + pair // pairs_of_row * inputs + place, mask=inside, other=0.0)
        weights = tl.load(source + place[None, :] * input_stride,
                          mask=is_output[:, None] & inside[None, :], other=0.0)
        total += weights.to(tl.float32) * values.to(tl.float32)[None, :]
    result = tl.sum(total, 1)
    if HAS_BIAS:
        result += tl.load(bias + expert * outputs + output, mask=is_output, other=0.0).to(
            tl.float32)
    tl.store(out + pair * outputs + output, result, mask=is_output)


def launch(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor, *,
           transposed: bool) -> None:
    """
    Launch the kernel.

    ``out``, ``x``, ``bias`` and ``experts`` are contiguous; shapes are those of
    :func:`mace_ros.model.fused_experts.multiply_pairs`.
    """
    (pairs, outputs), (rows, inputs) = out.shape, x.shape
    output_stride, input_stride = weight.stride()[1:]
    if transposed:
        output_stride, input_stride = input_stride, output_stride
    output_tile, input_tile = TRANSPOSED_TILES if output_stride == 1 else TILES
    multiply_pairs[(pairs, triton.cdiv(outputs, output_tile))](
        out, x, weight, out if bias is None else bias, experts, pairs // rows, inputs, outputs,
        weight.stride(0), output_stride, input_stride, HAS_BIAS=bias is not None,
        OUTPUT_TILE=output_tile, INPUT_TILE=input_tile, num_warps=4)
