# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Parts of a model's layers that take fewer kernels than in the model's own code.

A decode row keeps a GPU busy for so short a time that each kernel counts. Norms and rotary
embeddings of transformers are replaced in passes that write the KV cache, if their code computes
what a kernel here computes, which is tested with random values on the CPU. On CUDA, training runs
the model's own code; for CPUs see :mod:`mace_ros.model.cpu_layers`.
:mod:`mace_ros.model.fused_check` tests the kernels on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import copy
from dataclasses import dataclass
import inspect
from itertools import product
from types import FunctionType
from typing import Any

import torch
from torch import nn, Tensor

from mace_ros.model.attention import ForwardContext
from mace_ros.model.layer_operators import normalize, Pairing, plain_norm, plain_rotation
from mace_ros.model.packed_model import PackedModel

# Names of the function that rotates, in the code of most families and of DeepSeek.
ROTARY = ('apply_rotary_pos_emb', 'apply_rotary_emb')
TOLERANCE = 1e-4                    # of values of about 1 in fp32


class OtherCode:
    """
    Modules that can run other code: subclasses of their classes.

    A module that takes another one's place would change the names of weights.
    """

    def __init__(self, name: str, classes: Mapping[nn.Module, type[nn.Module]],
                 plain: Mapping[nn.Module, type[nn.Module]] | None = None) -> None:
        """
        Take the class that each module is to get.

        Those of ``plain`` compute the same without kernels, and round where these do; None: the
        modules' own classes.
        """
        self.name = name
        self._classes = [(module, type(module), other) for module, other in classes.items()]
        self._plain = plain or {}

    @property
    def applies(self) -> bool:
        """Whether any module can run other code."""
        return bool(self._classes)

    def use(self) -> None:
        """Let the modules run the other code."""
        for module, _, other in self._classes:
            module.__class__ = other

    def use_plain(self) -> None:
        """Let the modules compute the same by plain operations."""
        for module, own, _ in self._classes:
            module.__class__ = self._plain.get(module, own)

    def undo(self) -> None:
        """Let the modules run their own code."""
        for module, own, _ in self._classes:
            module.__class__ = own


# -- norms -------------------------------------------------------------------------------


def fused_norms(model: PackedModel) -> OtherCode:
    """Return the RMSNorms and the like of a model, one kernel each instead of eight or more."""
    norms = [m for m in model.model.modules() if is_norm(m)]
    kinds = {type(m): m for m in norms}
    known = {kind: found for kind, norm in kinds.items() if (found := norm_kind(norm)) is not None}
    fused, plain = (
        {kind: norm_class(kind, model.context, found, compute) for kind, found in known.items()}
        for compute in (normalize, plain_norm))
    norms = [m for m in norms if type(m) in known]
    return OtherCode('norms', {m: fused[type(m)] for m in norms},
                     {m: plain[type(m)] for m in norms})


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm by its name and its weight, and not PyTorch's kernel."""
    return (type(module).__name__.endswith(('RMSNorm', 'LayerNorm'))
            and not isinstance(module, nn.LayerNorm) and eps_of(module) is not None
            and isinstance(weight := getattr(module, 'weight', None), nn.Parameter)
            and weight.dim() in (1, 2) and getattr(module, 'bias', None) is None)


def eps_of(norm: nn.Module) -> Any:
    """Return what a norm adds to the mean square; None if it has no such attribute."""
    return getattr(norm, 'variance_epsilon', getattr(norm, 'eps', None))


def norm_kind(norm: nn.Module) -> dict[str, bool] | None:
    """Return arguments of :func:`normalize` that make it ``norm``; None if there are none."""
    own: Any = copy.deepcopy(norm).to_empty(device='cpu').float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        own.weight.copy_(torch.randn(own.weight.shape, generator=generator))
        x = torch.randn(1, 3, *own.weight.shape, generator=generator)
        for relative, centered in product((False, True), repeat=2):
            kind = {'relative': relative, 'centered': centered}
            found = plain_norm(x, own.weight, eps_of(own), **kind)
            if torch.allclose(found, own(x), rtol=TOLERANCE, atol=TOLERANCE):
                return kind
    return None


def norm_class(kind: type[nn.Module], context: ForwardContext, found: Mapping[str, bool],
               compute: Callable[..., Tensor]) -> type[nn.Module]:
    """Return a class like ``kind`` with another forward in passes that write the cache."""
    def forward(self: Any, x: Tensor) -> Any:
        if context.metadata.write_slots is None:
            return kind.forward(self, x)
        return compute(x, self.weight, eps_of(self), **found)

    return type(kind.__name__, (kind,), {'forward': forward})


# -- rotary embeddings -------------------------------------------------------------------


@dataclass(frozen=True)
class RotaryForm:
    """How a function takes its angles, after queries and keys, and what it rotates by them."""

    pairing: Pairing
    # Maps its angle arguments to the cosines and sines that ``pairing`` takes.
    columns: Callable[..., tuple[Tensor, Tensor]]
    arguments: int = 2      # number of its angle arguments


def as_given(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return the arguments."""
    return cos, sin


def first_half(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns of which a function repeats each."""
    pairs = cos.shape[-1] // 2
    return cos[..., :pairs], sin[..., :pairs]


def of_complex(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Return the real and imaginary parts."""
    parts = torch.view_as_real(angles)
    return parts[..., 0], parts[..., 1]


ROTARY_FORMS = (
    RotaryForm(Pairing(), as_given),                                        # Llama
    RotaryForm(Pairing(shared=True), as_given),                             # gpt-oss
    RotaryForm(Pairing(interleaved=True), as_given),                        # Cohere
    RotaryForm(Pairing(interleaved=True, shared=True), first_half),         # GLM
    RotaryForm(Pairing(interleaved=True, shared=True), of_complex, 1))      # DeepSeek


def fused_rotary(model: PackedModel) -> OtherCode:
    """Return rotary embeddings and writes to the KV cache, one kernel instead of twelve."""
    layers = [m for m in model.model.modules() if hasattr(m, 'mace_attention')]
    classes = {kind: found for kind in set(map(type, layers))
               if (found := rotary_classes(kind, model.context)) is not None}
    layers = [m for m in layers if type(m) in classes]
    fused, plain = ({m: classes[type(m)][i] for m in layers} for i in (0, 1))
    return OtherCode('rotary embeddings', fused, plain)


class DeferredRotation:
    """
    Takes the place of a model's function that rotates queries and keys.

    In a pass that writes the KV cache, it leaves the rotation to :func:`packed_attention`, whose
    kernel rotates and writes at once.
    """

    def __init__(self, context: ForwardContext, function: Callable[..., Any],
                 form: RotaryForm) -> None:
        """Keep the model's own function for other passes."""
        self._context, self._function, self._form = context, function, form

    def __call__(self, query: Tensor, key: Tensor, *angles: Any, **others: Any) -> Any:
        """Return queries and keys, ``[1, heads, tokens, size]``, rotated or to be rotated."""
        form = self._form
        if (self._context.metadata.write_slots is None or others
                or len(angles) != form.arguments or query.stride(3) != 1 or key.stride(3) != 1):
            return self._function(query, key, *angles, **others)
        self._context.rotation = *form.columns(*angles), form.pairing
        return query, key


class PlainRotation:
    """
    Takes the place of the same function, and rounds where the kernel does: once.

    A model's own code in 16 bits rounds three times. Where biases make keys large, that is another
    answer.
    """

    def __init__(self, form: RotaryForm) -> None:
        """Take what the function rotates."""
        self._form = form

    def __call__(self, query: Tensor, key: Tensor, *angles: Any, **_: Any) -> tuple[Tensor, ...]:
        """Return queries and keys, rotated."""
        cos, sin = (x[:, None].float() for x in self._form.columns(*angles))
        rotated = cos.shape[-1] * (2 if self._form.pairing.shared else 1)
        return tuple(torch.cat([
            plain_rotation(x[..., :rotated].float(), cos, sin, self._form.pairing).type_as(x),
            x[..., rotated:]], -1) for x in (query, key))


def rotary_classes(kind: type[nn.Module], context: ForwardContext,
                   ) -> tuple[type[nn.Module], type[nn.Module]] | None:
    """
    Return two classes like ``kind``; None if it rotates otherwise.

    The first defers the rotation, and the second computes the same by plain operations.
    """
    forward: Any = inspect.unwrap(kind.forward)
    name = next((n for n in ROTARY if n in forward.__code__.co_names), '')
    function = forward.__globals__.get(name)
    form = rotary_form(function)
    if form is None:
        return None
    return (with_function(kind, forward, name, DeferredRotation(context, function, form)),
            with_function(kind, forward, name, PlainRotation(form)))


def with_function(kind: type[nn.Module], forward: Any, name: str,
                  function: Callable[..., Any]) -> type[nn.Module]:
    """
    Return a class like ``kind``, whose ``forward`` sees another function under a global name.

    Other models of the process do not change.
    """
    changed = FunctionType(forward.__code__, forward.__globals__ | {name: function},
                           forward.__name__, forward.__defaults__, forward.__closure__)
    changed.__kwdefaults__ = forward.__kwdefaults__
    return type(kind.__name__, (kind,), {'forward': changed})


def rotary_form(function: Any) -> RotaryForm | None:
    """Return what a function computes; None if it is not known."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    query, key = values(1, 2, 3, 8), values(1, 1, 3, 8)
    samples = ((values(1, 3, 8), values(1, 3, 8)), (values(1, 3, 4), values(1, 3, 4)),
               (values(1, 3, 4, dtype=torch.complex64),))
    for form, angles in product(ROTARY_FORMS, samples):
        try:
            cos, sin = (x[:, None] for x in form.columns(*angles))
            if all(torch.allclose(found, plain_rotation(x, cos, sin, form.pairing),
                                  rtol=TOLERANCE, atol=TOLERANCE)
                   for found, x in zip(function(query, key, *angles), (query, key), strict=True)):
                return form
        except (RuntimeError, TypeError, ValueError):   # it takes other arguments
            continue
    return None


# -- adapters ----------------------------------------------------------------------------


class FusedLoRA:
    """The update of tokens under different adapters, by :mod:`mace_ros.model.mixed_lora`."""

    name = 'adapters'
    applies = True

    def __init__(self, model: PackedModel) -> None:
        """Take the mapping that the model's layers share."""
        self._mapping = model.lora_mapping

    def use(self) -> None:
        """Multiply each token with its own slot only."""
        self._mapping.fused = True

    def use_plain(self) -> None:
        """Multiply all tokens with all slots."""
        self.undo()

    def undo(self) -> None:
        """Multiply all tokens with all slots."""
        self._mapping.fused = False


# -- attention ---------------------------------------------------------------------------


class FusedChunks:
    """The attention of chunks with a softcap or sinks, by :mod:`mace_ros.model.block_attention`."""

    name = 'attention of chunks'

    def __init__(self, model: PackedModel) -> None:
        """Take what the model's layers share."""
        self._context = model.context

    @property
    def applies(self) -> bool:
        """Whether a layer has a softcap or sinks."""
        return self._context.changes_scores

    def use(self) -> None:
        """Read keys where they are in the cache."""
        self._context.block_kernel = True

    def use_plain(self) -> None:
        """Compute by plain operations."""
        self.undo()

    def undo(self) -> None:
        """Compute by plain operations."""
        self._context.block_kernel = False
