# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Causal attention of short sequences, with its gradients, for training on a CPU.

The backward of PyTorch's kernel for CPUs is made for long sequences: at 128 tokens in
bfloat16 the plain products below take a third of its time. What many short sequences hide
from each other costs less to compute than as many calls (``docs/performance.md``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LONGEST = 384       # tokens, of one sequence or of several behind one mask


def visible(tokens: int, keys: int, device: torch.device) -> Tensor:
    """Return ``[tokens, keys]``, true where the last tokens of a sequence may look."""
    return torch.ones(tokens, keys, dtype=torch.bool, device=device).tril(keys - tokens)


def are_few(tokens: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether so many tokens of a batch had better attend behind one mask."""
    return device.type == 'cpu' and dtype == torch.bfloat16 and tokens <= LONGEST


def suits(query: Tensor) -> bool:
    """Return whether :func:`attend_causally` is the faster way for ``query``."""
    return (are_few(query.shape[2], query.dtype, query.device)
            and query.requires_grad and torch.is_grad_enabled())


def attend_causally(query: Tensor, key: Tensor, value: Tensor, scaling: float | None,
                    mask: Tensor | None = None) -> Tensor:
    """
    Return what SDPA returns with ``is_causal``, or with ``mask``, and ``enable_gqa``.

    ``query`` is ``[1, heads, tokens, head size]``, ``key`` and ``value`` have as many heads
    or a divisor of them, and as many tokens or some before them. ``mask``, ``[tokens, keys]``,
    is true where one may look.
    """
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if mask is None:
        mask = visible(query.shape[2], key.shape[2], query.device)
    result: Tensor = _CausalAttention.apply(query, key, value, mask, scale)
    return result


class _CausalAttention(torch.autograd.Function):
    """Query heads that share a KV head are rows of one product."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor,
                scale: float) -> Tensor:
        _, heads, tokens, _ = query.shape
        kv_heads, keys = key.shape[1:3]
        q = (query[0] * scale).reshape(kv_heads, -1, query.shape[3])
        scores = torch.bmm(q, key[0].transpose(1, 2)).view(heads, tokens, keys)
        # It computes in fp32, whatever it is given.
        weights = torch.softmax(scores.masked_fill_(~mask, float('-inf')), -1)
        weights = weights.view(kv_heads, -1, keys)
        ctx.save_for_backward(q, key[0], value[0], weights)
        ctx.scale = scale
        return torch.bmm(weights, value[0]).view(1, heads, tokens, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, key, value, weights = ctx.saved_tensors
        gradient = gradients[0].reshape(*weights.shape[:2], -1)
        of_value = torch.bmm(weights.transpose(1, 2), gradient)
        of_weights = torch.bmm(gradient, value.transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_query = torch.bmm(of_scores, key).mul_(ctx.scale)
        of_key = torch.bmm(of_scores.transpose(1, 2), q)
        shape = (1, -1, gradients[0].shape[2], key.shape[2])
        return of_query.view(shape), of_key[None], of_value[None], None, None
