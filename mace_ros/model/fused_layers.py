# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Parts of a model's layers that take fewer kernels than in the model's own code.

A decode row keeps a GPU busy for so short a time that each kernel counts. Norms and rotary
embeddings of transformers are replaced in passes that write the KV cache, where their code computes
what a kernel here computes: it is asked on random values on the CPU. Training runs the model's own
code. Whether the device computes the same is for :mod:`mace_ros.model.fused_check`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import copy
import inspect
from types import FunctionType
from typing import Any

import torch
from torch import nn, Tensor

from mace_ros.model.attention import ForwardContext
from mace_ros.model.layer_operators import plain_rms_norm, plain_rotation, rms_norm
from mace_ros.model.packed_model import PackedModel

ROTARY = 'apply_rotary_pos_emb'     # the function's name in the code of most families
TOLERANCE = 1e-4                    # of values of about 1 in fp32


class OtherCode:
    """
    Modules that can run other code: subclasses of their classes.

    A module that takes another one's place would change the names of weights.
    """

    def __init__(self, name: str, classes: Mapping[nn.Module, type[nn.Module]]) -> None:
        """Take the class that each module is to get."""
        self.name = name
        self._classes = [(module, type(module), other) for module, other in classes.items()]

    def use(self) -> None:
        """Let the modules run the other code."""
        for module, _, other in self._classes:
            module.__class__ = other

    def undo(self) -> None:
        """Let the modules run their own code."""
        for module, own, _ in self._classes:
            module.__class__ = own


# -- norms -------------------------------------------------------------------------------


def fused_norms(model: PackedModel) -> OtherCode:
    """Return the RMSNorms of a model, one kernel each instead of eight."""
    norms = [m for m in model.model.modules() if is_rms_norm(m)]
    kinds = {type(m): m for m in norms}
    classes = {kind: norm_class(kind, model.context, relative=relative)
               for kind, norm in kinds.items() if (relative := relative_weight(norm)) is not None}
    return OtherCode('norms', {m: classes[type(m)] for m in norms if type(m) in classes})


def is_rms_norm(module: nn.Module) -> bool:
    """Return whether a module is an RMSNorm by its name and its weight."""
    return (type(module).__name__.endswith('RMSNorm') and eps_of(module) is not None
            and isinstance(weight := getattr(module, 'weight', None), nn.Parameter)
            and weight.dim() == 1)


def eps_of(norm: nn.Module) -> Any:
    """Return what an RMSNorm adds to the mean square; None if it has no such attribute."""
    return getattr(norm, 'variance_epsilon', getattr(norm, 'eps', None))


def relative_weight(norm: nn.Module) -> bool | None:
    """Return whether an RMSNorm's weight is relative to 1; None if it computes something else."""
    own: Any = copy.deepcopy(norm).to_empty(device='cpu').float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        own.weight.copy_(torch.randn(own.weight.shape, generator=generator))
        x = torch.randn(1, 3, len(own.weight), generator=generator)
        for relative in (False, True):
            found = plain_rms_norm(x, own.weight, eps_of(own), relative=relative)
            if torch.allclose(found, own(x), rtol=TOLERANCE, atol=TOLERANCE):
                return relative
    return None


def norm_class(kind: type[nn.Module], context: ForwardContext, *,
               relative: bool) -> type[nn.Module]:
    """Return a class like ``kind`` whose forward is one kernel in passes that write the cache."""
    def forward(self: Any, x: Tensor) -> Any:
        if context.metadata.write_slots is None:
            return kind.forward(self, x)
        return rms_norm(x, self.weight, eps_of(self), relative=relative)

    return type(kind.__name__, (kind,), {'forward': forward})


# -- rotary embeddings -------------------------------------------------------------------


def fused_rotary(model: PackedModel) -> OtherCode:
    """Return rotary embeddings and writes to the KV cache, one kernel instead of twelve."""
    layers = [m for m in model.model.modules() if hasattr(m, 'mace_attention')]
    classes = {kind: deferring for kind in set(map(type, layers))
               if (deferring := deferring_class(kind, model.context)) is not None}
    return OtherCode('rotary embeddings', {
        m: classes[type(m)] for m in layers if type(m) in classes})


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
    try:
        return all(torch.allclose(found, plain_rotation(x, cos, sin), rtol=TOLERANCE,
                                  atol=TOLERANCE)
                   for found, x in zip(function(query, key, cos, sin), (query, key), strict=True))
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
