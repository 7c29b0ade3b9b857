# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Weights in 4 bits, with a scale and a zero for each group of inputs of an output.

A value is ``(q - 8) * scale + zero`` with ``q`` from 0 to 15, as in PyTorch's kernels. Q4_0, Q4_1
and Q4_K of GGUF files have the same form. Few tokens are multiplied with the packed weight; for
more of them, parts of it are dequantised one after the other and multiplied as usual.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mace_ros.model.cpu_matmul import linear
from mace_ros.model.int4_kernels import Int4Kernel
from mace_ros.model.int4_rows import pack_rows, unpack_rows
from mace_ros.model.stored_weight import StoredWeight

LEVELS = 15             # the largest q
MIDDLE = 8              # the q whose value is the zero
GROUP = 32              # inputs of a group: that of GGUF files
OUTPUTS = 64            # the number of outputs is a multiple of it in all kernels
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)      # of a group's range, tried for the smallest error
SMALLEST_SCALE = 1e-30
# Rounding of float32 arithmetic, relative to the largest value of a group.
FLOAT32_ERROR = 2.0 ** -20
QUANTIZED_AT_ONCE = 2 ** 22     # values
# Values that are dequantised at once: as many as a CPU's caches hold. On CUDA, each part is
# some eight kernels, so larger ones: a pass of an 8B model would otherwise be ten thousand.
TILE_VALUES, CUDA_TILE_VALUES = 2 ** 22, 2 ** 24
# For more tokens, it is faster to dequantise the weight: on a CPU with and without rows, and on
# CUDA, whose product reads the weight once for every 16 tokens. The last one is a default:
# int4_limit.py measures the limit of the device.
MAX_TOKENS_BESIDE_ROWS = 32
MAX_CPU_TOKENS = 48
MAX_CUDA_TOKENS = 16


@dataclass(frozen=True)
class Int4Values:
    """
    A weight ``[out, in]`` in 4 bits, not yet in the order of a kernel.

    ``q`` is uint8, ``[out, in]``; ``scales`` and ``zeros`` are ``[out, groups]``, fp32.
    ``rounded`` counts the groups whose values were changed by rounding.
    """

    q: Tensor
    scales: Tensor
    zeros: Tensor
    rounded: int = 0

    @property
    def group(self) -> int:
        """Number of inputs in a group."""
        return self.q.shape[1] // self.scales.shape[1]

    def dequantized(self) -> Tensor:
        """Return the weight, ``[out, in]``, fp32."""
        q = self.q.view(*self.scales.shape, -1).float() - MIDDLE
        return (q * self.scales.unsqueeze(2) + self.zeros.unsqueeze(2)).view(self.q.shape)


def quantizable(weight: Tensor, group: int = GROUP) -> bool:
    """Return whether all kernels support the shape of ``weight``, ``[out, in]``."""
    return weight.shape[0] % OUTPUTS == 0 and weight.shape[1] % group == 0


def quantize(weight: Tensor, *, group: int = GROUP,
             dtype: torch.dtype = torch.float32) -> Int4Values:
    """
    Return ``weight`` (``[out, in]``) in 4 bits.

    A group of values that lie on a grid of at most 16 levels, since they were dequantised from
    4 bits, keeps them. Other groups are rounded, with scales and zeros that ``dtype`` represents.
    """
    parts = [_quantize(rows.float(), group, dtype) for rows in weight.split(
        max(QUANTIZED_AT_ONCE // weight.shape[1], 1))]
    return Int4Values(
        torch.cat([p.q for p in parts]), torch.cat([p.scales for p in parts]),
        torch.cat([p.zeros for p in parts]), sum(p.rounded for p in parts))


def _quantize(weight: Tensor, group: int, dtype: torch.dtype) -> Int4Values:
    values = weight.reshape(-1, group)
    scales, zeros, found = _grids(values)
    others = (~found).nonzero()[:, 0]
    if len(others):
        scales[others], zeros[others] = _fitted(values[others], dtype)
    q = _levels(values, scales, zeros)
    shape = weight.shape[0], weight.shape[1] // group
    return Int4Values(q.to(torch.uint8).view(weight.shape), scales.view(shape),
                      zeros.view(shape), len(others))


def _levels(values: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    q: Tensor = ((values - zeros[:, None]) / scales[:, None]).round_()
    return q.add_(MIDDLE).clamp_(0, LEVELS)


def _grids(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scales and zeros of the groups that lie on a grid, and which groups do."""
    low, high = values.aminmax(dim=1)
    error = FLOAT32_ERROR * torch.maximum(low.abs(), high.abs())
    scales, zeros = torch.ones_like(low), torch.zeros_like(low)
    found = torch.zeros_like(low, dtype=torch.bool)
    left = torch.arange(len(values), device=values.device)
    # The lowest and the highest value need not be the ends of the grid.
    for steps in range(LEVELS, 0, -1):
        lowest, rows = low[left], values[left]
        scale = ((high[left] - lowest) / steps).clamp_min(SMALLEST_SCALE)
        grid = ((rows - lowest[:, None]) / scale[:, None]).round_()
        off = grid.mul_(scale[:, None]).add_(lowest[:, None]).sub_(rows).abs_().amax(1)
        fits = off <= error[left]
        chosen = left[fits]
        scales[chosen], zeros[chosen] = _smallest_zero(
            lowest[fits], scale[fits], steps, error[chosen])
        found[chosen] = True
        left = left[~fits]
    return scales, zeros, found


def _smallest_zero(lowest: Tensor, scale: Tensor, steps: int,
                   error: Tensor) -> tuple[Tensor, Tensor]:
    """
    Return scales and zeros of grids from ``lowest`` on, with ``steps`` steps of ``scale``.

    Of the possible zeros, take the smallest one: it loses the least when it is rounded. Those of
    Q4_0 are 0; there, the scale may be negative.
    """
    choices = []
    for sign, first in ((1.0, lowest), (-1.0, lowest + steps * scale)):
        signed = sign * scale
        shift = (MIDDLE + first / signed).round_().clamp_(0, LEVELS - steps)
        zero = first + (MIDDLE - shift) * signed
        choices.append((signed, torch.where(zero.abs() <= error, 0.0, zero)))
    (scale, zero), (negative, other) = choices
    turned = other.abs() < zero.abs()
    return torch.where(turned, negative, scale), torch.where(turned, other, zero)


def _fitted(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the scales and zeros with the smallest squared error of those that are tried."""
    low, high = values.aminmax(dim=1)
    best = torch.full_like(low, torch.inf)
    scales, zeros = torch.ones_like(low), torch.zeros_like(low)
    for shrink in SHRINKS:
        scale = ((high - low) * (shrink / LEVELS)).clamp_min(SMALLEST_SCALE).to(dtype).float()
        # The levels reach from 8 below the zero to 7 above it.
        zero = ((low + high) / 2 + scale / 2).to(dtype).float()
        rounded = (_levels(values, scale, zero) - MIDDLE).mul_(scale[:, None]).add_(zero[:, None])
        error = rounded.sub_(values).square_().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return scales, zeros


class Int4Weight(StoredWeight):
    """
    A weight ``[out, in]`` in 4 bits, packed in the order of a kernel.

    ``scales_and_zeros`` is ``[groups, out, 2]`` in the dtype of the kernel, ``rows`` what is
    dequantised faster (:mod:`mace_ros.model.int4_rows`).
    """

    def __init__(self, packed: Tensor, scales_and_zeros: Tensor, kernel: Int4Kernel,
                 rows: Tensor | None = None) -> None:
        self.packed = packed
        self.scales_and_zeros = scales_and_zeros
        self.rows = rows
        self._kernel = kernel
        self.out_features = scales_and_zeros.shape[1]
        self._operand = kernel.operand(packed, self.out_features)
        self.in_features = packed.numel() * packed.element_size() * 2 // self.out_features
        self._group = self.in_features // scales_and_zeros.shape[0]
        self._max_tokens = 0
        if kernel.has_product:
            self._max_tokens = kernel.max_tokens or (
                MAX_CUDA_TOKENS if packed.device.type == 'cuda' else
                MAX_CPU_TOKENS if rows is None else MAX_TOKENS_BESIDE_ROWS)

    @classmethod
    def of(cls, values: Int4Values, kernel: Int4Kernel) -> Int4Weight:
        """Pack ``values`` for ``kernel`` on its device."""
        scales = torch.stack([values.scales.t(), values.zeros.t()], 2)
        return cls(kernel.layout.pack(values.q.to(kernel.device)).contiguous(),
                   scales.to(kernel.device, kernel.dtype).contiguous(), kernel,
                   pack_rows(values.q, values.scales, values.zeros) if kernel.has_rows else None)

    @property
    def _tile_values(self) -> int:
        """Values that are dequantised at once."""
        return CUDA_TILE_VALUES if self.packed.device.type == 'cuda' else TILE_VALUES

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the values are read from."""
        return self.packed, self.scales_and_zeros

    @property
    def nbytes(self) -> int:
        """Memory, in bytes."""
        rows = 0 if self.rows is None else self.rows.nbytes
        return self.packed.nbytes + self.scales_and_zeros.nbytes + rows

    def workspace_nbytes(self, dtype: torch.dtype) -> int:
        """Return the memory that dequantising takes, in bytes."""
        values = min(self.out_features * self.in_features, self._tile_values)
        if self.packed.device.type == 'cuda':   # also each in a byte
            return values * (dtype.itemsize + 1)
        # On a CPU, half of the values also as uint8 and as fp32.
        return values * (dtype.itemsize + 3)

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """Return ``[tokens, in]`` for the gradient of the output, ``[tokens, out]``."""
        if self.out_features * self.in_features <= self._tile_values:
            return gradient @ self._tile(slice(0, self.out_features), gradient.dtype)
        result = gradient.new_zeros(len(gradient), self.in_features, dtype=torch.float32)
        for outputs, part in self._tiles(gradient.dtype):
            result += gradient[:, outputs] @ part
        return result.to(gradient.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, ``[out, in]``."""
        result = self.packed.new_empty(self.out_features, self.in_features, dtype=dtype)
        for outputs, part in self._tiles(dtype):
            result[outputs] = part
        return result

    def product(self, rows: Tensor) -> Tensor:
        """Return ``[tokens, out]`` for ``rows``, ``[tokens, in]``, without a gradient."""
        return (self.packed_product(rows) if 0 < len(rows) <= self._max_tokens
                else self.written_out_product(rows))

    def packed_product(self, rows: Tensor) -> Tensor:
        """Return the product with the 4 bits, which the kernel must have."""
        return self._kernel.multiply(rows, self._operand, self._group, self.scales_and_zeros)

    def written_out_product(self, rows: Tensor) -> Tensor:
        """Return the product with the weight as it is dequantised, part by part."""
        if self.out_features * self.in_features <= self._tile_values:
            return linear(rows, self._tile(slice(0, self.out_features), rows.dtype))
        y = rows.new_empty(len(rows), self.out_features)
        for outputs, part in self._tiles(rows.dtype):
            y[:, outputs] = linear(rows, part)
        return y

    def _tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of the outputs with their weights, ``[some outputs, in]``."""
        step = max(self._tile_values // self.in_features // OUTPUTS, 1) * OUTPUTS
        for first in range(0, self.out_features, step):
            outputs = slice(first, min(first + step, self.out_features))
            yield outputs, self._tile(outputs, dtype)

    def _tile(self, outputs: slice, dtype: torch.dtype) -> Tensor:
        """Return the weights of some outputs; the next call may overwrite them."""
        workspace = self._kernel.workspace
        if self.rows is None:
            return self._kernel.layout.dequantize(
                self.packed, self.scales_and_zeros, outputs, dtype, workspace)
        groups = self.in_features // self._group
        result = workspace.tensor(
            'result', (outputs.stop - outputs.start, self.in_features), dtype)
        unpack_rows(self.rows[outputs.start * groups:outputs.stop * groups], result)
        return result
