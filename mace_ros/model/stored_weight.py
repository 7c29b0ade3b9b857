# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Weights of linear layers in an order of their own, in which products are faster."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class StoredWeight(ABC):
    """A weight ``[out, in]`` that is not trained."""

    out_features: int
    in_features: int

    @abstractmethod
    def product(self, rows: Tensor) -> Tensor:
        """Return ``[tokens, out]`` for ``rows``, ``[tokens, in]``, without a gradient."""

    @abstractmethod
    def input_gradient(self, gradient: Tensor) -> Tensor:
        """Return ``[tokens, in]`` for the gradient of the output, ``[tokens, out]``."""

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, ``[out, in]``."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the values are read from."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory, in bytes."""

    def workspace_nbytes(self, dtype: torch.dtype) -> int:
        """Return the memory that a product takes while it runs, in bytes."""
        return 0

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``[..., out]`` for ``x``, ``[..., in]``, with a gradient of ``x`` only."""
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        if torch.is_grad_enabled() and rows.requires_grad:
            y: Tensor = _Product.apply(rows, self)
        else:
            y = self.product(rows)
        if bias is not None:
            y.add_(bias)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)


class _Product(torch.autograd.Function):
    """The product with a stored weight, which has a gradient of the input only."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: StoredWeight) -> Tensor:
        ctx.weight = weight
        return weight.product(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.weight.input_gradient(gradients[0]), None
