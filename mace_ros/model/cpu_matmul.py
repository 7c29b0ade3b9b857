# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Products of a few tokens with a weight matrix, in the form that is fastest on a CPU.

A decode row reads every weight for one token: memory bounds it, and how close a kernel
comes to that bound differs by a factor of three (``docs/performance.md``).
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor
import torch.nn.functional as F

# Up to here a product is bound by reading the weight, not by arithmetic.
FEW_TOKENS = 8


def is_few(x: Tensor) -> bool:
    """Return whether ``x`` (``[..., in]``, on a CPU) holds so few tokens."""
    return x.device.type == 'cpu' and 0 < x.numel() <= FEW_TOKENS * x.shape[-1]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """
    Return what ``F.linear`` returns for ``x`` (``[..., in]``), rounding aside.

    In fp32, MKL computes ``weight @ x.T`` faster than ``x @ weight.T``, for few tokens three
    times as fast, and two columns faster than one.
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
    # Not by view(): autograd forbids to change views of what a function of ours returns.
    y = y[:, :tokens].t()
    y = y.unflatten(0, x.shape[:-1]) if x.dim() > 1 else y[0]
    return y.clone(memory_format=torch.contiguous_format)


def multiplies_int8(dtype: torch.dtype) -> bool:
    """
    Return whether PyTorch's product of ``dtype`` with 8 bits is fast on this CPU.

    In fp32 it has vector instructions for ARM alone; elsewhere it takes ten times as long as
    the product with a weight in fp32.
    """
    return dtype == torch.bfloat16 or platform.machine() == 'aarch64'


class Int8Weight:
    """A weight ``[out, in]`` rounded to 8 bits, with a scale for each output."""

    # PyTorch's kernel takes so many inputs at a time, and reads beyond the last few.
    INPUTS = 16

    def __init__(self, weight: Tensor) -> None:
        """Round ``weight`` in place to what 8 bits can say, and keep those 8 bits."""
        scales = (weight.float().abs().amax(1) / 127).clamp_min(1e-12).to(weight.dtype)
        self._values = (weight.float() / scales.float()[:, None]).round().clamp(
            -127, 127).to(torch.int8)
        self._scales = scales
        weight.copy_(self._values.float() * scales.float()[:, None])

    @property
    def has_kernel(self) -> bool:
        """Whether :meth:`linear` can multiply with this weight, and is worth it."""
        return self._values.shape[1] % self.INPUTS == 0 and multiplies_int8(self._scales.dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``[..., out]`` for ``x``, ``[..., in]``; at its best with few tokens."""
        y = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), self._values, self._scales)
        y = y.view(*x.shape[:-1], -1)
        return y if bias is None else y.add_(bias)
