# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Causal attention of short sequences with its backward, for training on a CPU.

The backward of PyTorch's CPU kernel is optimised for long sequences: at 128 tokens in bfloat16
the plain matrix products below take a third of its time. Several short sequences are cheaper
to compute behind one mask than in separate calls (``docs/explanation/precisions.md``).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

MAX_TOKENS = 384       # of one sequence, or of several behind one mask


def causal_mask(tokens: int, keys: int, device: torch.device) -> Tensor:
    """Return ``[tokens, keys]``, true at the keys that a sequence's last tokens attend to."""
    return torch.ones(tokens, keys, dtype=torch.bool, device=device).tril(keys - tokens)


# All layers of a step have the same mask, and so have most steps of a job.
kept_mask = lru_cache(maxsize=4)(causal_mask)


def prefers_one_mask(tokens: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the sequences of a batch of ``tokens`` attend faster behind one mask."""
    return device.type == 'cpu' and dtype == torch.bfloat16 and tokens <= MAX_TOKENS


def is_faster(query: Tensor) -> bool:
    """Return whether :func:`attend_causally` is faster than PyTorch's kernel for ``query``."""
    return (prefers_one_mask(query.shape[2], query.dtype, query.device)
            and query.requires_grad and torch.is_grad_enabled())


def attend_causally(query: Tensor, key: Tensor, value: Tensor, scaling: float | None,
                    mask: Tensor | None = None) -> Tensor:
    """
    Compute SDPA with ``enable_gqa``, causal or with ``mask``.

    ``query`` is ``[1, heads, tokens, head size]``. ``key`` and ``value`` have the same number
    of heads or a divisor of it, and at least as many tokens. ``mask``, ``[tokens, keys]``, is
    true at the keys that a token attends to.
    """
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if mask is None:
        mask = kept_mask(query.shape[2], key.shape[2], query.device)
    result: Tensor = _CausalAttention.apply(query, key, value, mask, scale)
    return result


class _CausalAttention(torch.autograd.Function):
    """Attention in which the query heads that share a KV head are rows of one product."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor,
                scale: float) -> Tensor:
        _, heads, tokens, _ = query.shape
        kv_heads, keys = key.shape[1:3]
        q = (query[0] * scale).reshape(kv_heads, -1, query.shape[3])
        scores = torch.bmm(q, key[0].transpose(1, 2)).view(heads, tokens, keys)
        # Softmax computes in fp32 whatever the dtype of its input.
        weights = torch.softmax(scores.masked_fill_(~mask, float('-inf')), -1)
        weights = weights.view(kv_heads, -1, keys)
        ctx.save_for_backward(q, key[0], value[0], weights)
        ctx.scale = scale
        return torch.bmm(weights, value[0]).view(1, heads, tokens, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, key, value, weights = ctx.saved_tensors
        gradient = gradients[0].reshape(*weights.shape[:2], -1)
        grad_value = torch.bmm(weights.transpose(1, 2), gradient)
        grad_weights = torch.bmm(gradient, value.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_query = torch.bmm(grad_scores, key).mul_(ctx.scale)
        grad_key = torch.bmm(grad_scores.transpose(1, 2), q)
        shape = (1, -1, gradients[0].shape[2], key.shape[2])
        return grad_query.view(shape), grad_key[None], grad_value[None], None, None
