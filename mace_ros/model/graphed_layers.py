# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Decoder layers for training rows of a fixed length, which device graphs can replay.

The layers are called on fixed addresses: the row, and what the model hands to each layer
(such as rotary embeddings), are copied into what was there at the beginning. A shorter
step is padded with a sequence of its own, which nobody else sees and nothing is learned
from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TYPE_CHECKING
import weakref

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mace_ros.model.attention import AttentionMetadata, whole_sequences
from mace_ros.model.lora import MergedLinear
from mace_ros.model.model_shell import run_layer

if TYPE_CHECKING:
    from mace_ros.model.packed_model import PackedModel

Layer = Callable[[Tensor], Tensor]


class GraphedLayers:
    """All layers of a model for training rows of ``tokens`` tokens."""

    def __init__(self, model: PackedModel, tokens: int) -> None:
        """Lay out the row and the layers' arguments; they are called eagerly at first."""
        self.tokens = tokens
        self.row = _masked((tokens,), model.device)
        ids = model.tensor([[0] * tokens])
        with torch.no_grad(), model.training(self.row):
            hidden, calls = model.skeleton.call_layers(ids, model.tensor([list(range(tokens))]))
            # Once through all layers makes the masks that they ask for.
            for layer, call in zip(model.layers, calls, strict=True):
                run_layer(layer, hidden, call)
        self._width = hidden.shape[-1]
        self._calls = _cloned(calls)
        self._eager: list[Layer] = [
            partial(_run, layer, call)
            for layer, call in zip(model.layers, self._calls, strict=True)]
        self._layers = self._eager
        self._user: Callable[[], object] = lambda: None

    def begin(self, user: object, lengths: Sequence[int], calls: Sequence[dict[str, Any]], *,
              shared: int = 0) -> None:
        """
        Set sequences of these lengths, ``tokens`` in all, and what the model calls with.

        The first ``shared`` tokens are what all begin with. Does nothing while ``user`` stays
        the same.
        """
        if user is self._user():
            return
        self._user = weakref.ref(user)
        assert self.row.query_sequence is not None
        fresh = _masked(lengths, self.row.query_sequence.device, shared=shared)
        for (kind, window), mask in self.row.masks.items():
            assert kind == 'block'
            mask.copy_(fresh.block_mask(window))
        done = set()
        for old, new in zip(tree_leaves(self._calls), tree_leaves(list(calls)), strict=True):
            if isinstance(old, Tensor) and id(old) not in done:
                old.copy_(new)
                done.add(id(old))

    def run(self, index: int, x: Tensor, *, again: bool = False) -> Tensor:
        """
        Return the output of a layer, ``[1, tokens, width]``, with a graph if ``x`` has one.

        ``again`` is a layer that is computed once more in its backward: eagerly, since the
        graphs share memory that is laid out for all forwards before all backwards.
        """
        return (self._eager if again else self._layers)[index](x)

    def capture(self, model: PackedModel) -> None:
        """
        Replay device graphs from now on, forward and backward.

        Raises RuntimeError if a layer can't be captured.
        """
        weights = [tuple(
            p for group in layer.modules() if isinstance(group, MergedLinear)
            for m in group.adapted for p in (m.a, m.b) if p is not None)
            for layer in model.layers]
        inputs = [torch.zeros(1, self.tokens, self._width, dtype=model.dtype,
                              device=model.device, requires_grad=True) for _ in model.layers]
        with torch.enable_grad(), model.training(self.row):
            graphed = torch.cuda.make_graphed_callables(
                # The gradients of weights are captured if they are arguments.
                tuple(_taking_weights(run) for run in self._eager),
                tuple((x, *w) for x, w in zip(inputs, weights, strict=True)),
                allow_unused_input=True)
        self._layers = [_giving_weights(g, w) for g, w in zip(graphed, weights, strict=True)]


def _taking_weights(run: Layer) -> Callable[..., Tensor]:
    return lambda x, *weights: run(x)


def _giving_weights(graphed: Callable[..., Any], weights: tuple[Tensor, ...]) -> Layer:
    return lambda x: graphed(x, *weights)


def _cloned(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the same calls with tensors of their own; what layers share they go on sharing."""
    clones: dict[int, Tensor] = {}

    def clone(x: Any) -> Any:
        return clones.setdefault(id(x), x.clone()) if isinstance(x, Tensor) else x

    result: list[dict[str, Any]] = tree_map(clone, calls)
    return result


def _run(layer: torch.nn.Module, call: dict[str, Any], x: Tensor) -> Tensor:
    return run_layer(layer, x, call)


def _masked(lengths: Sequence[int], device: torch.device, *, shared: int = 0) -> AttentionMetadata:
    """Return a row whose sequences are told apart by a mask alone."""
    row = whole_sequences(lengths, device, shared=shared)
    row.lengths = ()
    return row
