# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
PyTorch's products with weights of 4 bits, and the order in which each expects them.

The order depends on the device and on the instructions of a CPU. It is found by packing a small
weight; a product that does not compute the right values is not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
import platform
from typing import Protocol

import torch
from torch import Tensor

from mace_ros.model.int4_rows import unpacks_rows
from mace_ros.model.workspace import Workspace

PROBE_OUTPUTS = 128         # of the small weights that find a layout
PROBE_GROUP = 32
PROBE_ERROR = 2e-2          # relative, of a product that sums up in bfloat16 at worst


class Layout(Protocol):
    """The order of a packed weight ``[out, in]``."""

    @property
    def name(self) -> str:
        """A name for files."""

    @property
    def probes(self) -> tuple[int, ...]:
        """Numbers of inputs, such that small weights with them have every form of the order."""

    def pack(self, q: Tensor) -> Tensor:
        """Return ``q`` (uint8, 0 to 15, ``[out, in]``) in this order, two in each byte."""

    def unpack(self, packed: Tensor, outputs: slice) -> Tensor:
        """Return some outputs of ``q`` as :meth:`pack` received it."""

    def dequantize(self, packed: Tensor, scales_and_zeros: Tensor, outputs: slice,
                   dtype: torch.dtype, workspace: Workspace) -> Tensor:
        """
        Return the weight of some outputs, ``[outputs, in]``; it may be in ``workspace``.

        ``scales_and_zeros`` are ``[groups, out, 2]``.
        """


@dataclass(frozen=True)
class BlockedLayout:
    """
    The order of CPU kernels: blocks of outputs, and in each block input after input.

    A byte holds two outputs: neighbours if ``paired``, otherwise one from each half of a block.
    """

    block: int
    paired: bool = False

    @property
    def name(self) -> str:
        """A name for files."""
        return f'blocks{self.block}{"paired" * self.paired}'

    @property
    def probes(self) -> tuple[int, ...]:
        """One number of inputs: the order has one form."""
        return (128,)

    def pack(self, q: Tensor) -> Tensor:
        """Return ``q`` in this order, ``[blocks, in, block / 2]``."""
        blocks = q.view(-1, self.block, q.shape[1]).transpose(1, 2)
        low, high = (blocks[..., lanes] for lanes in self._lanes())
        return (low | high << 4).contiguous()

    def unpack(self, packed: Tensor, outputs: slice) -> Tensor:
        """Return some outputs of ``q`` as :meth:`pack` received it."""
        part = packed[outputs.start // self.block:outputs.stop // self.block]
        q = part.new_empty(*part.shape[:2], self.block)
        low, high = self._lanes()
        q[..., low], q[..., high] = part & 15, part >> 4
        return q.transpose(1, 2).reshape(-1, part.shape[1])

    def dequantize(self, packed: Tensor, scales_and_zeros: Tensor, outputs: slice,
                   dtype: torch.dtype, workspace: Workspace) -> Tensor:
        """Return the weight of some outputs; its transpose is contiguous."""
        part = packed[outputs.start // self.block:outputs.stop // self.block]
        blocks, count, half = part.shape
        groups = len(scales_and_zeros)
        # [blocks, groups, 1, block]. In bfloat16, PyTorch has no vector instructions for it.
        scales, zeros = (scales_and_zeros[:, outputs].view(groups, blocks, self.block, 2)
                         .permute(3, 1, 0, 2).contiguous().float().unsqueeze(3))
        lowest = zeros - 8 * scales
        q = workspace.tensor('q', part.shape, torch.uint8)
        values = workspace.tensor('values', part.shape, torch.float32)
        grid = values.view(blocks, groups, -1, half)
        result = workspace.tensor('result', (count, blocks, self.block), dtype)
        for lanes, mask, unit in zip(self._lanes(), (15, 240), (1, 16), strict=True):
            torch.bitwise_and(part, mask, out=q)
            values.copy_(q)
            torch.addcmul(lowest[..., lanes], grid, scales[..., lanes] / unit, out=grid)
            result[..., lanes].copy_(values.transpose(0, 1))
        return result.view(count, -1).t()

    def _lanes(self) -> tuple[slice, slice]:
        """Return the outputs of a block in the lower and in the upper bits."""
        half = self.block // 2
        return (slice(0, None, 2), slice(1, None, 2)) if self.paired else (
            slice(0, half), slice(half, None))


@dataclass(frozen=True)
class TensorCoreLayout:
    """
    The order of the CUDA kernel: ``[out / 8, in / (16 * tiles), 32, tiles / 2]`` of int32.

    An int32 holds eight inputs of an output, the even ones in its lower half.
    """

    @property
    def name(self) -> str:
        """A name for files."""
        return 'tensorcores'

    @property
    def probes(self) -> tuple[int, ...]:
        """Numbers of inputs in 8, 4 and 2 tiles, of which the kernel has a template each."""
        return 128, 192, 160

    def pack(self, q: Tensor) -> Tensor:
        """Return ``q`` in this order; the number of inputs is a multiple of 32."""
        outputs, count = q.shape
        tiles = inner_tiles(count)
        # Output: tile, row. Input: tile, pair of inner tiles, eighth, lane, even or odd.
        parts = q.view(outputs // 8, 8, count // (16 * tiles), tiles // 2, 4, 4, 2)
        parts = parts.permute(0, 2, 1, 5, 3, 6, 4).to(torch.int32)
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=q.device).view(2, 4)
        return (parts << shifts).sum((5, 6), dtype=torch.int32).view(
            outputs // 8, count // (16 * tiles), 32, tiles // 2)

    def unpack(self, packed: Tensor, outputs: slice) -> Tensor:
        """Return some outputs of ``q`` as :meth:`pack` received it."""
        part = packed[outputs.start // 8:outputs.stop // 8]
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device).view(2, 4)
        rows, columns, _, pairs = part.shape
        q = (part.view(rows, columns, 8, 4, pairs, 1, 1) >> shifts) & 15
        return q.to(torch.uint8).permute(0, 2, 1, 4, 6, 3, 5).reshape(rows * 8, -1)

    def dequantize(self, packed: Tensor, scales_and_zeros: Tensor, outputs: slice,
                   dtype: torch.dtype, workspace: Workspace) -> Tensor:
        """Return the weight of some outputs, contiguous."""
        part = packed[outputs.start // 8:outputs.stop // 8]
        rows, columns, _, pairs = part.shape
        # A byte holds two eighths. Working on bytes, five kernels move 9 bytes per weight.
        octets = part.view(torch.uint8).view(rows, columns, 8, 4, pairs, 2, 2)
        q = part.new_empty(rows, 8, columns, pairs, 2, 2, 4, 2, dtype=dtype)
        for eighth, bits in enumerate((octets & 15, octets >> 4)):
            ordered = bits.view(torch.int8).permute(0, 2, 1, 4, 6, 3, 5)
            torch.sub(ordered, 8, out=q[..., eighth, :, :])
        scales, zeros = scales_and_zeros[:, outputs].to(dtype).permute(2, 1, 0).unsqueeze(3)
        values = q.view(*scales.shape[:2], -1)
        return torch.addcmul(zeros, values, scales, out=values).view(rows * 8, -1)


CPU_LAYOUTS: tuple[Layout, ...] = (
    BlockedLayout(64), BlockedLayout(32), BlockedLayout(16, paired=True))


@dataclass(frozen=True)
class Int4Kernel:
    """
    A product with 4-bit weights on a device; without ``has_product``, only their layout.

    ``dtype`` is that of scales, zeros and of the product's inputs. With ``has_rows``, weights are
    also kept as rows, which are faster to dequantise. For more than ``max_tokens``, weights are
    dequantised; 0 is a default of the device.
    """

    device: torch.device
    dtype: torch.dtype
    layout: Layout
    has_product: bool
    has_rows: bool = False
    max_tokens: int = 0

    @cached_property
    def workspace(self) -> Workspace:
        """The memory on the device in which weights are dequantised."""
        return Workspace(self.device)

    def operand(self, packed: Tensor, outputs: int) -> Tensor:
        """Return a packed weight as the product takes it."""
        return packed.view(outputs, -1) if self.device.type == 'cpu' else packed

    def multiply(self, rows: Tensor, packed: Tensor, group: int,
                 scales_and_zeros: Tensor) -> Tensor:
        """
        Return ``[tokens, out]`` for ``rows``, ``[tokens, in]``, in the dtype of ``rows``.

        ``packed`` is what :meth:`operand` returns.
        """
        # Each call of PyTorch costs a CPU microseconds, in every layer of every token.
        x = rows if rows.dtype == self.dtype else rows.to(self.dtype)
        x = x if x.is_contiguous() else x.contiguous()
        if self.device.type == 'cpu':
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x, packed, group, scales_and_zeros)
        else:
            y = torch.ops.aten._weight_int4pack_mm(x, packed, group, scales_and_zeros)
        result: Tensor = y if y.dtype == rows.dtype else y.to(rows.dtype)
        return result


def plain_kernel(device: torch.device, dtype: torch.dtype) -> Int4Kernel:
    """Return the kernel of devices without a product: weights are always dequantised."""
    layout: Layout = CPU_LAYOUTS[0] if device.type == 'cpu' else TensorCoreLayout()
    return Int4Kernel(device, dtype, layout, has_product=False)


def find_kernel(device: torch.device, dtype: torch.dtype) -> Int4Kernel:
    """Return the kernel for a model of ``dtype`` on ``device``."""
    layouts: tuple[Layout, ...] = (
        CPU_LAYOUTS if device.type == 'cpu' else (TensorCoreLayout(),))
    # Only ARM has vector instructions for the product in fp32.
    fast = dtype if device.type == 'cpu' and platform.machine() == 'aarch64' else torch.bfloat16
    try:
        for layout in layouts:
            kernel = Int4Kernel(device, fast, layout, True, unpacks_rows(device))
            if all(_is_right(kernel, inputs) for inputs in layout.probes):
                return kernel
    except (AttributeError, RuntimeError):      # not in this build, or not for this device
        pass
    return plain_kernel(device, dtype)


def inner_tiles(inputs: int) -> int:
    """Return how many tiles of 16 inputs CUDA's kernel reads at once."""
    return next(n for n in (8, 4, 2) if inputs % (16 * n) == 0)


def packed_by_torch(q: Tensor) -> Tensor:
    """Return ``q`` (``[out, in]``) in the order of PyTorch's product."""
    if q.device.type == 'cpu':
        result: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 8)
    else:
        result = torch.ops.aten._convert_weight_to_int4pack(
            q[:, ::2] << 4 | q[:, 1::2], inner_tiles(q.shape[1]))
    return result


def _is_right(kernel: Int4Kernel, inputs: int) -> bool:
    """Return whether PyTorch packs a small weight as the kernel does, and multiplies with it."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(
        16, (PROBE_OUTPUTS, inputs), generator=generator, dtype=torch.uint8).to(kernel.device)
    packed = kernel.layout.pack(q)
    if not torch.equal(packed.flatten(), packed_by_torch(q).flatten()):
        return False
    generator.manual_seed(1)
    scales, x = (torch.randn(shape, generator=generator).to(kernel.device, kernel.dtype)
                 for shape in ((inputs // PROBE_GROUP, PROBE_OUTPUTS, 2), (3, inputs)))
    weight = kernel.layout.dequantize(
        packed, scales, slice(0, PROBE_OUTPUTS), torch.float32, kernel.workspace)
    expected = x.float() @ weight.t()
    found = kernel.multiply(x, kernel.operand(packed, PROBE_OUTPUTS), PROBE_GROUP, scales)
    error = (found.float() - expected).norm()
    return bool(error <= PROBE_ERROR * expected.norm())
