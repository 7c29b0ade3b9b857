# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Decoder layers for training passes of a fixed length, which CUDA graphs can replay.

The layers run on fixed addresses: the attention metadata, and the arguments that the model
passes to each layer (such as rotary embeddings), are copied into the tensors of the first call.
A shorter step is padded with a sequence of its own, to which no other sequence attends and
which has no targets. Shorter prefixes are padded with keys to which no token attends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
import weakref

import torch
from torch import nn, Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mace_ros.model.attention import whole_sequences
from mace_ros.model.capturing import capturing
from mace_ros.model.merged_linear import MergedLinear
from mace_ros.model.model_shell import run_layer
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.prefix_kv import PackedPrefixes

PREFIX_TOKENS = 128     # of all prefixes of a step; with longer ones, a step runs eagerly


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
        self._width = hidden.shape[-1]
        self._calls = _cloned(calls)
        self._layers = [_EagerLayer(layer, call)
                        for layer, call in zip(model.layers, self._calls, strict=True)]
        self._graphed: list[_GraphedLayer] = []
        self._user: weakref.ref[object] | None = None

    def begin(self, user: object, lengths: Sequence[int], calls: Sequence[dict[str, Any]],
              prefixes: PackedPrefixes | None = None) -> None:
        """
        Copy in sequences of these lengths, ``tokens`` in total, and the layers' arguments.

        ``prefixes`` have at most ``prefix_tokens`` tokens. Does nothing if the last call came
        from the same ``user``.
        """
        if self._user is not None and self._user() is user:
            return
        self._user = weakref.ref(user)
        assert self.metadata.query_sequence is not None
        fresh = whole_sequences(
            lengths, self.metadata.query_sequence.device, prefixes=prefixes)
        before = 0 if prefixes is None else sum(prefixes.lengths)
        for (kind, window), mask in self.metadata.masks.items():
            assert kind == 'block'
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

    def run(self, index: int, x: Tensor, *, recompute: bool = False) -> Tensor:
        """
        Return the output of a layer, ``[1, tokens, width]``.

        With ``recompute``, in a backward, the layer runs eagerly: the graphs share memory that
        is valid only if all forwards precede all backwards.
        """
        if self._graphed and not recompute:
            return self._graphed[index](x)
        return self._layers[index](x)

    def capture(self, model: PackedModel) -> None:
        """
        Replay CUDA graphs from now on, forward and backward.

        Raises ``CaptureFailed`` if a layer can't be captured.
        """
        weights = [tuple(
            p for linear in layer.modules() if isinstance(linear, MergedLinear)
            for s in linear.adapted for p in (s.a, s.b) if p is not None)
            for layer in model.layers]
        inputs = [torch.zeros(1, self.tokens, self._width, dtype=model.dtype,
                              device=model.device, requires_grad=True) for _ in model.layers]
        pool = torch.cuda.graph_pool_handle()
        with capturing(pool), torch.enable_grad(), model.training(self.metadata):
            graphed = torch.cuda.make_graphed_callables(
                tuple(layer.with_weights for layer in self._layers),
                tuple((x, *w) for x, w in zip(inputs, weights, strict=True)),
                allow_unused_input=True, pool=pool)
        self._graphed = [_GraphedLayer(g, w) for g, w in zip(graphed, weights, strict=True)]


class _EagerLayer:
    """A decoder layer with its arguments."""

    def __init__(self, layer: nn.Module, call: dict[str, Any]) -> None:
        self._layer, self._call = layer, call

    def __call__(self, x: Tensor) -> Tensor:
        return run_layer(self._layer, x, self._call)

    def with_weights(self, x: Tensor, *weights: Tensor) -> Tensor:
        """Run the layer; only the gradients of a function's arguments are captured."""
        return self(x)


class _GraphedLayer:
    """A captured decoder layer with its trainable weights."""

    def __init__(self, graphed: Any, weights: tuple[Tensor, ...]) -> None:
        self._graphed, self._weights = graphed, weights

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._graphed(x, *self._weights)
        return y


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
