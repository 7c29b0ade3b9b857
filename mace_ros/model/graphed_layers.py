# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Decoder layers for training passes of a fixed length, which CUDA graphs can replay.

The layers run on fixed addresses: the attention metadata, and the arguments that the model
passes to each layer (such as rotary embeddings), are copied into the tensors of the first call.
A shorter step is padded with a sequence of its own, to which no other sequence attends and
which has no targets. Shorter prefixes are padded with keys to which no token attends.

A step that keeps its layers' autograd graphs replays a forward and a backward of each. One that
keeps none, such as one whose forward piggybacked, replays both at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias
import weakref

import torch
from torch import nn, Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mace_ros.model.attention import whole_sequences
from mace_ros.model.capturing import captured, capturing
from mace_ros.model.checked_passes import random_adapter
from mace_ros.model.graph_check import limit, relative_error
from mace_ros.model.lora_mapping import TRAINING_SLOT
from mace_ros.model.merged_linear import MergedLinear
from mace_ros.model.model_shell import run_layer
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.prefix_kv import PackedPrefixes

PREFIX_TOKENS = 128     # of all prefixes of a step; with longer ones, a step runs eagerly

# A layer's output, the gradient of its input, and those of its weights.
_Results: TypeAlias = tuple[Tensor | None, ...]


class WrongGradients(RuntimeError):
    """Captured layers do not compute what the same layers compute eagerly."""


class GraphedLayers:
    """All decoder layers of a model for training passes of ``tokens`` tokens."""

    prefix_tokens = PREFIX_TOKENS

    def __init__(self, model: PackedModel, tokens: int) -> None:
        """Allocate the metadata and the layers' arguments; the layers run eagerly at first."""
        self.tokens = tokens
        self._prefixes = _empty_prefixes(model)
        self.metadata = whole_sequences((tokens,), model.device, prefixes=self._prefixes)
        self.metadata.lengths = ()      # the sequences are separated by a mask alone
        ids = model.tensor([[0] * tokens])
        with torch.no_grad(), model.training(self.metadata):
            hidden, calls = model.shell.call_layers(ids, model.tensor([list(range(tokens))]))
            # One pass through all layers builds the masks that they need.
            for layer, call in zip(model.layers, calls, strict=True):
                run_layer(layer, hidden, call)
        self._calls = _cloned(calls)
        self._layers = [_EagerLayer(layer, call)
                        for layer, call in zip(model.layers, self._calls, strict=True)]
        self._weights = [_adapter_weights(layer) for layer in model.layers]
        self._graphed: list[_GraphedLayer] = []
        self._input, self._gradient = (torch.zeros_like(hidden) for _ in range(2))
        self._recomputed = [_RecomputedLayer(layer, weights, self._input, self._gradient)
                            for layer, weights in zip(self._layers, self._weights, strict=True)]
        self._user: weakref.ref[object] | None = None

    def begin(self, user: object, lengths: Sequence[int], calls: Sequence[dict[str, Any]],
              prefixes: PackedPrefixes | None = None) -> None:
        """
        Copy in sequences of these lengths, ``tokens`` in total, and the layers' arguments.

        ``prefixes`` have at most ``prefix_tokens`` tokens. Does nothing if the last call came
        from the same ``user``. What layers have kept for the backward of an earlier user is lost
        as soon as they run.
        """
        if self.holds(user):
            return
        self._user = weakref.ref(user)
        assert self.metadata.query_sequence is not None
        fresh = whole_sequences(
            lengths, self.metadata.query_sequence.device, prefixes=prefixes)
        before = 0 if prefixes is None else sum(prefixes.lengths)
        for window, mask in self.metadata.masks.items():
            own = fresh.block_mask(window)
            mask[:, :before], mask[:, before:self.prefix_tokens] = own[:, :before], False
            mask[:, self.prefix_tokens:] = own[:, before:]
        if prefixes is not None:
            for old, new in zip((*self._prefixes.keys, *self._prefixes.values),
                                (*prefixes.keys, *prefixes.values), strict=True):
                old[:, :, :before] = new
        copied = set()
        for old, new in zip(tree_leaves(self._calls), tree_leaves(list(calls)), strict=True):
            if isinstance(old, Tensor) and id(old) not in copied:
                old.copy_(new)
                copied.add(id(old))

    def holds(self, user: object) -> bool:
        """Return whether ``user`` was the last to begin."""
        return self._user is not None and self._user() is user

    def run(self, index: int, x: Tensor) -> Tensor:
        """
        Return the output of a layer, ``[1, tokens, width]``, whose autograd graph is kept.

        All forwards must precede all backwards, since the CUDA graphs share memory.
        """
        if self._graphed:
            return self._graphed[index](x)
        return self._layers[index](x)

    @torch.no_grad()
    def backward(self, index: int, x: Tensor, gradient: Tensor) -> Tensor:
        """
        Recompute a layer for its input ``x``, and add to the gradients of its weights.

        ``gradient`` is that of its output. Returns that of ``x``, valid until the next call. All
        of them are ``[1, tokens, width]``. Later layers come first: the gradients of weights are
        valid until the backward of the same layer or of a later one.
        """
        self._input.copy_(x)
        self._gradient.copy_(gradient)
        for weight, found in zip(
                self._weights[index], self._recomputed[index].gradients(), strict=True):
            if found is not None:
                weight.grad = found if weight.grad is None else weight.grad + found
        return self._gradient

    def capture(self, model: PackedModel, stream: torch.cuda.Stream, pool: Any) -> None:
        """
        Replay a CUDA graph of each :meth:`backward` from now on.

        Raises ``CaptureFailed`` if a layer can't be captured, or another exception, such as
        :class:`WrongGradients`; then these layers must not be used.
        """
        with model.training(self.metadata):
            # In the order in which a step replays them: a replay may overwrite the gradients that
            # graphs captured after it have left, since they got the memory that it uses only while
            # it runs.
            for layer in reversed(self._recomputed):
                layer.capture(stream, pool)
        self._check(model)

    def capture_kept(self, model: PackedModel) -> None:
        """
        Replay CUDA graphs of each :meth:`run` and its backward from now on.

        They take memory for what all layers keep. Call this after every :meth:`capture`: torch
        holds autograd graphs that belong to another stream. Raises what :meth:`capture` does, and
        then leaves these layers as they were.
        """
        inputs = [torch.zeros_like(self._input).requires_grad_() for _ in self._layers]
        pool = torch.cuda.graph_pool_handle()
        with capturing(pool), torch.enable_grad(), model.training(self.metadata):
            graphed = torch.cuda.make_graphed_callables(
                tuple(layer.with_weights for layer in self._layers),
                tuple((x, *w) for x, w in zip(inputs, self._weights, strict=True)),
                allow_unused_input=True, pool=pool)
        self._graphed = [
            _GraphedLayer(g, w) for g, w in zip(graphed, self._weights, strict=True)]
        try:
            self._check(model)
        except Exception:
            self._graphed = []
            raise

    def _check(self, model: PackedModel) -> None:
        """Compare outputs and gradients with those of the same layers run eagerly."""
        error = self.error(model)
        if error > limit(model):
            raise WrongGradients(f'gradients under graphs are off by {error:.2g} (relative)')

    def error(self, model: PackedModel) -> float:
        """
        Return the largest relative error of a layer's output and gradients, for random values.

        All layers run in the order of a step before any is compared: so what a replay overwrites
        is found out, too.
        """
        x, gradient = (torch.randn(
            like.shape, generator=torch.Generator(like.device).manual_seed(seed),
            dtype=like.dtype, device=like.device)
            for seed, like in enumerate((self._input, self._gradient)))
        with random_adapter(model, TRAINING_SLOT), model.training(self.metadata):
            found = [self._recompute_all(x, gradient)]
            if self._graphed:
                found.append(self._run_all(x, gradient))
            return max(
                relative_error(ours, theirs)
                for index, layer in enumerate(self._layers)
                for expected in [_results(layer, x, gradient, self._weights[index])]
                for results in found
                for ours, theirs in zip(results[index], expected, strict=True)
                if ours is not None and theirs is not None)

    def _recompute_all(self, x: Tensor, gradient: Tensor) -> list[_Results]:
        """Return the results of each layer's :meth:`backward`, without its output."""
        found: list[_Results] = [()] * len(self._layers)
        for index in reversed(range(len(self._layers))):
            weights = self._weights[index]
            for weight in weights:      # a step that was given up may have left some
                weight.grad = None
            own = self.backward(index, x, gradient).clone()
            found[index] = (None, own, *(w.grad for w in weights))
            for weight in weights:
                weight.grad = None
        return found

    def _run_all(self, x: Tensor, gradient: Tensor) -> list[_Results]:
        """Return the results of each layer's :meth:`run` and its backward."""
        leaf = x.clone().requires_grad_()
        with torch.enable_grad():
            outputs = [self.run(index, leaf) for index in range(len(self._layers))]
        found: list[_Results] = [()] * len(self._layers)
        for index in reversed(range(len(self._layers))):
            found[index] = (outputs[index].detach(), *torch.autograd.grad(
                outputs[index], (leaf, *self._weights[index]), gradient, allow_unused=True))
        return found


def _results(layer: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor,
             weights: tuple[Tensor, ...]) -> _Results:
    """Return the results of a layer for the gradient of its output."""
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        y = layer(leaf)
    return (y.detach(), *torch.autograd.grad(y, (leaf, *weights), gradient, allow_unused=True))


class _EagerLayer:
    """A decoder layer with its arguments."""

    def __init__(self, layer: nn.Module, call: dict[str, Any]) -> None:
        self._layer, self._call = layer, call

    def __call__(self, x: Tensor) -> Tensor:
        return run_layer(self._layer, x, self._call)

    def with_weights(self, x: Tensor, *weights: Tensor) -> Tensor:
        """Run the layer; only the gradients of a function's arguments are captured."""
        return self(x)


class _RecomputedLayer:
    """A layer's forward and backward in one; computed eagerly until it is captured."""

    def __init__(self, layer: _EagerLayer, weights: tuple[Tensor, ...], x: Tensor,
                 gradient: Tensor) -> None:
        """Read the layer's input from ``x`` and the gradient of its output from ``gradient``."""
        self._layer, self._weights, self._x, self._gradient = layer, weights, x, gradient
        self._replay: Callable[[], None] | None = None
        self._found: tuple[Tensor | None, ...] = ()

    def capture(self, stream: torch.cuda.Stream, pool: Any) -> None:
        """Replay a CUDA graph from now on."""
        self._replay, self._found = captured(self._compute, stream, pool)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """
        Return the gradients of the weights, which the next replay overwrites.

        The gradient of the input takes the place of that of the output.
        """
        if self._replay is None:
            return self._compute()
        self._replay()
        return self._found

    def _compute(self) -> tuple[Tensor | None, ...]:
        x = self._x.detach().requires_grad_()
        with torch.enable_grad():
            y = self._layer(x)
        own, *found = torch.autograd.grad(
            y, (x, *self._weights), self._gradient, allow_unused=True)
        self._gradient.copy_(own)
        # In the order of the weights in memory, as the fused optimizer needs them.
        return tuple(x if x is None else x.contiguous() for x in found)


class _GraphedLayer:
    """A captured decoder layer with its trainable weights."""

    def __init__(self, graphed: Any, weights: tuple[Tensor, ...]) -> None:
        self._graphed, self._weights = graphed, weights

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._graphed(x, *self._weights)
        return y


def _adapter_weights(layer: nn.Module) -> tuple[nn.Parameter, ...]:
    """Return the master weights of a decoder layer."""
    return tuple(p for linear in layer.modules() if isinstance(linear, MergedLinear)
                 for s in linear.adapted for p in (s.a, s.b) if p is not None)


def _cloned(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the same calls with cloned tensors; tensors that layers share stay shared."""
    clones: dict[int, Tensor] = {}

    def clone(x: Any) -> Any:
        return clones.setdefault(id(x), x.clone()) if isinstance(x, Tensor) else x

    result: list[dict[str, Any]] = tree_map(clone, calls)
    return result


def _empty_prefixes(model: PackedModel) -> PackedPrefixes:
    """Return one prefix of zeros, of :data:`PREFIX_TOKENS` tokens."""
    keys, values = (
        tuple(x.new_zeros(1, x.shape[1], PREFIX_TOKENS, x.shape[2]) for x in cached)
        for cached in (model.kv_cache.keys, model.kv_cache.values))
    return PackedPrefixes((PREFIX_TOKENS,), (0,), keys, values)
