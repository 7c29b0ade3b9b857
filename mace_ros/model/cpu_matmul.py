# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Products of small batches with a weight matrix, in the fastest form on a CPU.

A decode row reads every weight for one token, so memory bandwidth bounds it. Kernels differ by
a factor of three in how close they come to that bound (``docs/explanation/precisions.md``). Which
one is the fastest depends on the CPU. It is chosen by the CPU's kind and not by a measurement:
kernels round differently, and a restart must not change answers.
"""

from __future__ import annotations

from functools import cache
import platform

import torch
from torch import Tensor
import torch.nn.functional as F

from mace_ros.model.stored_weight import StoredWeight

# Up to this many tokens, reading the weight takes longer than the arithmetic.
SMALL_BATCH = 8
# For more tokens, a weight in oneDNN's order is faster than one in 8 bits.
INT8_TOKENS = 1
ROUNDED_AT_ONCE = 2 ** 17       # values of a weight


def is_small_batch(x: Tensor) -> bool:
    """Return whether ``x`` (``[..., in]``) is on a CPU and has 1 to ``SMALL_BATCH`` tokens."""
    return x.device.type == 'cpu' and 0 < x.numel() <= SMALL_BATCH * x.shape[-1]


@cache
def prefers_columns() -> bool:
    """
    Return whether fp32 products are faster as ``weight @ x.T`` than as ``x @ weight.T``.

    In MKL on an AMD CPU they are, up to four times, and two columns are faster than one. On an
    Intel CPU they are slower, up to 2.5 times for few tokens.
    """
    maker = str(torch.cpu.get_capabilities().get('cpu_name', ''))
    return torch.backends.mkl.is_available() and not maker.startswith('Intel')


@cache
def plain_tokens(dtype: torch.dtype) -> int:
    """Return up to how many tokens a plain weight is faster than one in oneDNN's order."""
    if dtype == torch.float32:
        return 2 if prefers_columns() else 1
    return 0 if torch.cpu.get_capabilities().get('amx_bf16') else 1


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``F.linear`` for ``x`` (``[..., in]``), up to rounding."""
    if (x.dtype != torch.float32 or x.device.type != 'cpu' or not x.numel()
            or not prefers_columns()):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    tokens = rows.shape[0]
    if tokens == 1:
        rows = torch.cat([rows, rows])
    y = (torch.mm(weight, rows.t()) if bias is None
         else torch.addmm(bias[:, None], weight, rows.t()))
    # Not view(): autograd forbids in-place changes of views returned by a custom Function.
    y = y[:, :tokens].t()
    y = y.unflatten(0, x.shape[:-1]) if x.dim() > 1 else y[0]
    return y.clone(memory_format=torch.contiguous_format)


def multiplies_int8(dtype: torch.dtype) -> bool:
    """
    Return whether PyTorch's product of ``dtype`` with an 8-bit weight is fast on this CPU.

    In fp32 only ARM has vector instructions for it. Other CPUs take ten times as long as with
    an fp32 weight.
    """
    return dtype == torch.bfloat16 or platform.machine() == 'aarch64'


class Int8Weight:
    """A weight ``[out, in]`` rounded to 8 bits, with one scale per output."""

    # PyTorch's kernel reads the inputs in groups of this size, beyond the end of a partial one.
    INPUT_GROUP = 16

    def __init__(self, weight: Tensor) -> None:
        """Round ``weight`` in place to values that 8 bits represent, and keep these bits."""
        self._values = torch.empty_like(weight, dtype=torch.int8)
        self._scales = weight.new_empty(len(weight))
        # In parts that stay in the caches: that takes a third of the time.
        count = max(ROUNDED_AT_ONCE // weight.shape[1], 1)
        for part, values, scales in zip(
                weight.split(count), self._values.split(count), self._scales.split(count),
                strict=True):
            exact = part.float()
            scales.copy_((exact.abs().amax(1) / 127).clamp_min_(1e-12))
            steps = scales.float()[:, None]
            values.copy_((exact / steps).round_().clamp_(-127, 127))
            part.copy_(values.float().mul_(steps))

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The rounded values, ``[out, in]``, and the scales."""
        return self._values, self._scales

    @property
    def nbytes(self) -> int:
        """Memory, in bytes."""
        return self._values.nbytes + self._scales.nbytes

    @property
    def has_kernel(self) -> bool:
        """Whether :meth:`linear` supports this shape and is fast on this CPU."""
        return (self._values.shape[1] % self.INPUT_GROUP == 0
                and multiplies_int8(self._scales.dtype))

    def is_faster(self, x: Tensor) -> bool:
        """Return whether ``x`` has so few tokens that the 8-bit product is the fastest."""
        if prepacks(self._scales.device, self._scales.dtype):
            return 0 < x.numel() <= INT8_TOKENS * x.shape[-1]
        return is_small_batch(x)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``[..., out]`` for ``x``, ``[..., in]``; fastest for small batches."""
        y = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), self._values, self._scales)
        y = y.view(*x.shape[:-1], -1)
        return y if bias is None else y.add_(bias)


def prepacks(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether :class:`PrepackedWeight` is supported, and faster than a plain weight."""
    if (device.type != 'cpu' or platform.machine() != 'x86_64'
            or not torch.backends.mkldnn.is_available()):
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PrepackedWeight(StoredWeight):
    """
    A weight ``[out, in]``, and a copy in oneDNN's order.

    Without the copy, each product reorders the weight. For up to eight tokens, that takes longer
    than the product itself. For one token, other kernels are faster on most CPUs.
    """

    def __init__(self, weight: Tensor) -> None:
        """Keep ``weight``, and copy it."""
        self.out_features, self.in_features = weight.shape
        self._weight = weight
        self._reordered = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._plain_tokens = plain_tokens(weight.dtype)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the values are read from."""
        return (self._weight,)

    @property
    def nbytes(self) -> int:
        """Memory, in bytes."""
        return 2 * self._weight.nbytes

    def product(self, rows: Tensor) -> Tensor:
        """Return ``[tokens, out]`` for ``rows``, ``[tokens, in]``, without a gradient."""
        if len(rows) > self._plain_tokens:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(
                rows, self._reordered, None, 'none', [], '')
            return y
        if len(rows) == 1 and rows.dtype != torch.float32:
            return _multiply_row(rows, self._weight)
        return linear(rows, self._weight)

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """Return ``[tokens, in]`` for the gradient of the output, ``[tokens, out]``."""
        return gradient @ self._weight

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, ``[out, in]``."""
        return self._weight.to(dtype)


def _multiply_row(row: Tensor, weight: Tensor) -> Tensor:
    """Multiply ``row``, ``[1, in]``, by PyTorch's own kernel: it takes half of oneDNN's time."""
    y = row.new_empty(1, weight.shape[0])
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        torch.mv(weight, row[0], out=y[0])
    finally:
        torch._C._set_mkldnn_enabled(enabled)
    return y
