# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Norms and rotary embeddings on a CPU as one compiled function each, with their gradients.

In a model's code a norm is six operations and a rotation ten, with as many more in the backward,
each of which divides a little work among all threads. Passes of decode rows have compiled norms
already (:mod:`mace_ros.model.cpu_decode`); these are for prompts and fine-tune steps. Import this
module only where Numba is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
import inspect
from typing import Any

import numpy as np
import torch
from torch import nn, Tensor

from mace_ros.model import cpu_layer_kernels as kernels
from mace_ros.model.cpu_decode import array
from mace_ros.model.fused_layers import (
    eps_of,
    is_norm,
    norm_kind,
    OtherCode,
    PlainRotation,
    ROTARY,
    rotary_form,
    ROTARY_FORMS,
    with_function,
)
from mace_ros.model.layer_operators import plain_norm
from mace_ros.model.packed_model import PackedModel

# What the kernels compute: the norms and rotations of Llama, and of many other families.
KIND = {'relative': False, 'centered': False}
FORM = ROTARY_FORMS[0]


# -- norms -------------------------------------------------------------------------------


def compiled_norms(model: PackedModel) -> OtherCode:
    """Return the RMSNorms of a model whose weight has the model's dtype."""
    norms = [m for m in model.model.modules() if is_norm(m) and m.weight.dim() == 1
             and m.weight.dtype == model.dtype]
    kinds = {type(m): m for m in norms}
    found = {kind for kind, norm in kinds.items() if norm_kind(norm) == KIND}
    norms = [m for m in norms if type(m) in found]
    compiled, plain = (
        {kind: norm_class(kind, compute) for kind in found}
        for compute in (normalize, partial(plain_norm, relative=False, centered=False)))
    return OtherCode('norms', {m: compiled[type(m)] for m in norms},
                     {m: plain[type(m)] for m in norms})


def norm_class(kind: type[nn.Module], compute: Callable[..., Tensor]) -> type[nn.Module]:
    """Return a class like ``kind`` that calls ``compute(x, weight, eps)``."""
    def forward(self: Any, x: Tensor) -> Any:
        if x.dtype != self.weight.dtype:
            return kind.forward(self, x)
        return compute(x, self.weight, eps_of(self))

    return type(kind.__name__, (kind,), {'forward': forward})


def normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """
    Return ``x``, divided by the root mean square of its last dimension, times ``weight``.

    Only ``x`` has a gradient.
    """
    result: Tensor = _Norm.apply(x, weight, eps)
    return result


class _Norm(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
        out, factors = torch.empty_like(rows), torch.empty(len(rows), dtype=torch.float32)
        kernels.normalize(array(out), array(factors), array(rows), array(weight.detach()),
                          np.float32(eps))
        ctx.save_for_backward(rows, factors)
        ctx.weight = weight
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, factors = ctx.saved_tensors
        gradient = gradients[0].reshape(rows.shape).contiguous()
        out = torch.empty_like(rows)
        kernels.normalize_backward(array(out), array(gradient), array(factors), array(rows),
                                   array(ctx.weight.detach()))
        return out.view(gradients[0].shape), None, None


# -- rotary embeddings -------------------------------------------------------------------


def compiled_rotary(model: PackedModel) -> OtherCode:
    """Return the attention layers of a model that rotate queries and keys as Llama's do."""
    layers = [m for m in model.model.modules() if hasattr(m, 'mace_attention')]
    classes = {kind: found for kind in set(map(type, layers))
               if (found := rotating_classes(kind)) is not None}
    layers = [m for m in layers if type(m) in classes]
    compiled, plain = ({m: classes[type(m)][i] for m in layers} for i in (0, 1))
    return OtherCode('rotary embeddings', compiled, plain)


def rotating_classes(kind: type[nn.Module]) -> tuple[type[nn.Module], type[nn.Module]] | None:
    """
    Return two classes like ``kind``; None if it rotates otherwise.

    The first rotates by a compiled function, and the second computes the same by plain operations.
    """
    forward: Any = inspect.unwrap(kind.forward)
    name = next((n for n in ROTARY if n in forward.__code__.co_names), '')
    function = forward.__globals__.get(name)
    if rotary_form(function) != FORM:
        return None
    return (with_function(kind, forward, name, CompiledRotation(function)),
            with_function(kind, forward, name, PlainRotation(FORM)))


class CompiledRotation:
    """Takes the place of a model's function that rotates queries and keys."""

    def __init__(self, function: Callable[..., Any]) -> None:
        """Keep the model's own function for other arguments."""
        self._function = function

    def __call__(self, query: Tensor, key: Tensor, *angles: Any, **others: Any) -> Any:
        """Return queries and keys, ``[1, heads, tokens, size]``, rotated."""
        shape = (1, query.shape[2], query.shape[3])
        if (others or len(angles) != 2 or len(query) != 1 or key.shape[2:] != query.shape[2:]
                or {x.shape for x in angles} != {shape}
                or {x.dtype for x in (key, *angles)} != {query.dtype}):
            return self._function(query, key, *angles, **others)
        return _Rotation.apply(query, *angles), _Rotation.apply(key, *angles)


class _Rotation(torch.autograd.Function):
    """The rotation of queries or keys, ``[1, heads, tokens, size]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.angles = tuple(array(angle[0].detach().contiguous()) for angle in (cos, sin))
        return _rotated(kernels.rotate, x.detach(), *ctx.angles)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _rotated(kernels.rotate_backward, gradients[0], *ctx.angles), None, None


def _rotated(kernel: Callable[..., None], x: Tensor, cos: np.ndarray, sin: np.ndarray) -> Tensor:
    of_tokens = x[0].transpose(0, 1).contiguous()       # as a linear layer writes them
    out = torch.empty_like(of_tokens)
    kernel(array(out), array(of_tokens), cos, sin)
    return out.transpose(0, 1)[None]
