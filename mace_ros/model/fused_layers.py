# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Parts of a model's layers that take fewer kernels than in the model's own code.

A decode row keeps a GPU busy for so short a time that each kernel counts. Each part here replaces
code of transformers where that code is known to compute the same, which it is asked on random
values on the CPU. Whether the device computes it, too, is for :mod:`mace_ros.model.fused_check`.
"""

from __future__ import annotations

from collections.abc import Callable
import copy
import inspect
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import nn, Tensor
import torch.nn.functional as F

from mace_ros.model.attention import ForwardContext
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.rotary import rotated

ROTARY = 'apply_rotary_pos_emb'     # the function's name in the code of most families
TOLERANCE = 1e-4                    # of values of about 1 in fp32


class FusedPart(Protocol):
    """A part of a model that can take fewer kernels."""

    name: str

    def use(self) -> None:
        """Let the model use it from now on."""

    def undo(self) -> None:
        """Let the model run its own code again."""


# -- norms -------------------------------------------------------------------------------


class FusedRMSNorm(nn.Module):
    """An RMSNorm that is one kernel of PyTorch, or three if its weight is relative to 1."""

    scale: Tensor | None

    def __init__(self, weight: nn.Parameter, eps: float, *, relative: bool) -> None:
        """Share the weight, ``[width]``; with ``relative``, inputs are scaled by 1 + weight."""
        super().__init__()
        self.weight, self.eps = weight, eps
        # In fp32: 16 bits would round 1 + weight, and the kernel takes one precision for all.
        self.register_buffer(
            'scale', 1.0 + weight.detach().float() if relative else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised ``x``, ``[..., width]``."""
        if self.scale is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.scale.shape, self.scale, self.eps).type_as(x)


class FusedNorms:
    """The RMSNorms of a model, also in training passes; eight kernels each in the model's code."""

    name = 'norms'

    def __init__(self, model: PackedModel) -> None:
        """Find the norms."""
        self._norms = [(parent, name, child, fused)
                       for parent in model.model.modules()
                       for name, child in parent.named_children()
                       if (fused := fused_norm(child)) is not None]

    def use(self) -> None:
        """Put the fused norms in the model's place."""
        for parent, name, _, fused in self._norms:
            setattr(parent, name, fused)

    def undo(self) -> None:
        """Put the model's own norms back."""
        for parent, name, own, _ in self._norms:
            setattr(parent, name, own)


def fused_norm(norm: nn.Module) -> FusedRMSNorm | None:
    """Return a norm that computes the same, or None for a module that is none of those known."""
    weight = getattr(norm, 'weight', None)
    eps = getattr(norm, 'variance_epsilon', getattr(norm, 'eps', None))
    if (not type(norm).__name__.endswith('RMSNorm') or eps is None
            or not isinstance(weight, nn.Parameter) or weight.dim() != 1):
        return None
    generator = torch.Generator().manual_seed(0)
    own: Any = copy.deepcopy(norm).to_empty(device='cpu').float()
    with torch.no_grad():
        own.weight.copy_(torch.randn(weight.shape, generator=generator))
        x = torch.randn(3, len(weight), generator=generator)
        for relative in (False, True):
            found = FusedRMSNorm(own.weight, eps, relative=relative)(x)
            if torch.allclose(found, own(x), rtol=TOLERANCE, atol=TOLERANCE):
                return FusedRMSNorm(weight, eps, relative=relative)
    return None


# -- rotary embeddings -------------------------------------------------------------------


class DeferredRotation:
    """
    Takes the place of a model's function that rotates queries and keys.

    In a pass that writes the KV cache, it leaves the rotation to :func:`packed_attention`, whose
    kernel rotates and writes at once.
    """

    def __init__(self, context: ForwardContext, function: Callable[..., Any]) -> None:
        """Keep the model's own function for other passes."""
        self._context, self._function = context, function

    def __call__(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any,
                 **kwargs: Any) -> Any:
        """Return queries and keys, ``[1, heads, tokens, size]``, rotated or to be rotated."""
        if (self._context.metadata.write_slots is None or args or kwargs
                or query.stride(3) != 1 or key.stride(3) != 1):
            return self._function(query, key, cos, sin, *args, **kwargs)
        self._context.rotation = cos, sin
        return query, key


class FusedRotary:
    """Rotary embeddings and writes to the KV cache; twelve kernels in the model's code."""

    name = 'rotary embeddings'

    def __init__(self, model: PackedModel) -> None:
        """Find the attention layers whose code can defer the rotation."""
        layers = [m for m in model.model.modules() if hasattr(m, 'mace_attention')]
        deferring = {kind: deferring_class(kind, model.context) for kind in map(type, layers)}
        self._layers = [(layer, type(layer), kind) for layer in layers
                        if (kind := deferring[type(layer)]) is not None]

    def use(self) -> None:
        """Let the layers defer the rotation."""
        for layer, _, deferring in self._layers:
            layer.__class__ = deferring

    def undo(self) -> None:
        """Let the layers rotate by the model's own function."""
        for layer, own, _ in self._layers:
            layer.__class__ = own


def deferring_class(kind: type[nn.Module], context: ForwardContext) -> type[nn.Module] | None:
    """
    Return a class like ``kind`` whose forward defers the rotation; None if it rotates otherwise.

    Only this class sees another function under the global name: other models of the process do
    not change.
    """
    forward: Any = inspect.unwrap(kind.forward)
    function = forward.__globals__.get(ROTARY)
    if ROTARY not in forward.__code__.co_names or not rotates_halves(function):
        return None
    deferring = FunctionType(
        forward.__code__, forward.__globals__ | {ROTARY: DeferredRotation(context, function)},
        forward.__name__, forward.__defaults__, forward.__closure__)
    deferring.__kwdefaults__ = forward.__kwdefaults__
    return type(kind.__name__, (kind,), {'forward': deferring})


def rotates_halves(function: Any) -> bool:
    """Return whether a function pairs the first half of a head's values with the second one."""
    generator = torch.Generator().manual_seed(0)
    query, key, cos, sin = (torch.randn(shape, generator=generator) for shape in (
        (1, 2, 3, 8), (1, 1, 3, 8), (1, 3, 8), (1, 3, 8)))
    expected = [rotated(x, cos, sin) for x in (query, key)]
    try:
        found = function(query, key, cos, sin)
        return all(torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)
                   for a, b in zip(found, expected, strict=True))
    except (RuntimeError, TypeError, ValueError):       # it takes other arguments
        return False


# -- adapters ----------------------------------------------------------------------------


class FusedLoRA:
    """The update of tokens under different adapters, by :mod:`mace_ros.model.mixed_lora`."""

    name = 'adapters'

    def __init__(self, model: PackedModel) -> None:
        """Take the mapping that the model's layers share."""
        self._mapping = model.lora_mapping

    def use(self) -> None:
        """Multiply each token with its own slot only."""
        self._mapping.fused = True

    def undo(self) -> None:
        """Multiply all tokens with all slots."""
        self._mapping.fused = False
