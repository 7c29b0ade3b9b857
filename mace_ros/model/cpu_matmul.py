# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Products of small batches with a weight matrix, in the fastest form on a CPU.

A decode row reads every weight for one token, so memory bandwidth bounds it. Kernels differ by
a factor of three in how close they come to that bound (``docs/explanation/precisions.md``).
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor
import torch.nn.functional as F

# Up to this many tokens, reading the weight takes longer than the arithmetic.
SMALL_BATCH = 8
ROUNDED_AT_ONCE = 2 ** 17       # values of a weight


def is_small_batch(x: Tensor) -> bool:
    """Return whether ``x`` (``[..., in]``) is on a CPU and has 1 to ``SMALL_BATCH`` tokens."""
    return x.device.type == 'cpu' and 0 < x.numel() <= SMALL_BATCH * x.shape[-1]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """
    Compute ``F.linear`` for ``x`` (``[..., in]``), up to rounding.

    In fp32, MKL computes ``weight @ x.T`` faster than ``x @ weight.T`` (three times as fast for
    few tokens), and two columns faster than one.
    """
    if (x.dtype != torch.float32 or x.device.type != 'cpu' or not x.numel()
            or not torch.backends.mkl.is_available()):
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
    def has_kernel(self) -> bool:
        """Whether :meth:`linear` supports this shape and is fast on this CPU."""
        return (self._values.shape[1] % self.INPUT_GROUP == 0
                and multiplies_int8(self._scales.dtype))

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``[..., out]`` for ``x``, ``[..., in]``; fastest for small batches."""
        y = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), self._values, self._scales)
        y = y.view(*x.shape[:-1], -1)
        return y if bias is None else y.add_(bias)
