# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Layers of a fine-tune step that run in chunks of tokens, for steps too long for one segment.

A layer runs forward from the first chunk to the last, and backward from the last to the first.
The chunks are coupled by keys and values: those of earlier chunks are kept from the forward,
and the gradients that they receive from later chunks enter the backward of their own chunk.
The gradients are therefore those of the undivided layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mace_ros.model.attention import AttentionMetadata, PastKV
from mace_ros.model.lora_mapping import InputObserver
from mace_ros.model.model_shell import run_layer
from mace_ros.model.packed_model import PackedModel


def split_evenly(tokens: int, most: int) -> list[slice]:
    """Return chunks of about equal size, of at most ``most`` tokens."""
    count = -(-tokens // most)
    bounds = [tokens * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]


class ChunkedLayers:
    """All layers over packed whole sequences, one chunk of tokens at a time."""

    def __init__(self, model: PackedModel, metadata: AttentionMetadata, ids: Tensor,
                 positions: Tensor, chunks: Sequence[slice]) -> None:
        """``metadata`` covers all tokens; ``ids`` and ``positions`` are ``[1, tokens]``."""
        self._model = model
        self._chunks = tuple(chunks)
        self._metadata = [_of_chunk(metadata, chunk) for chunk in chunks]
        self._calls = []
        first = []
        with torch.no_grad():
            for chunk, own in zip(self._chunks, self._metadata, strict=True):
                with model.training(own):
                    x, calls = model.shell.call_layers(ids[:, chunk], positions[:, chunk])
                first.append(x[0])
                self._calls.append(calls)
        self.first_input = torch.cat(first)    # of the first layer: [tokens, width]
        # Of each layer, keys and values of the chunks between their forward and their backward.
        self._kv: list[list[tuple[Tensor, Tensor]]] = [[] for _ in model.layers]
        # Gradients of past keys and values, in the layer whose backward runs.
        self._kv_gradients: tuple[Tensor, Tensor] | None = None

    @property
    def sizes(self) -> list[int]:
        """Tokens of each chunk."""
        return [chunk.stop - chunk.start for chunk in self._chunks]

    def restart(self) -> None:
        """Drop everything computed so far."""
        self._kv = [[] for _ in self._kv]
        self._kv_gradients = None

    def forward(self, layer: int, x: Tensor, y: Tensor, *, keep: bool,
                observer: InputObserver | None = None) -> bool:
        """
        Run a layer over the next chunk of its input ``x``, and write to its output ``y``.

        Both are ``[tokens, width]``. ``keep`` announces a backward. ``observer`` receives the
        inputs of the adapted linear layers. Returns whether this was the layer's last chunk.
        """
        kv = self._kv[layer]
        index = len(kv)
        chunk = self._chunks[index]
        past = self._past(layer, index)
        with torch.no_grad():
            y[chunk] = self._run(layer, index, x[None, chunk], past, observer)[0]
        assert past.current is not None
        key, value = past.current
        kv.append((key.detach(), value.detach()))
        complete = len(kv) == len(self._chunks)
        if complete and not keep:
            kv.clear()
        return complete

    def is_before_backward(self, layer: int) -> bool:
        """Return whether a layer's forward is complete and its backward has not begun."""
        return len(self._kv[layer]) == len(self._chunks)

    def backward(self, layer: int, x: Tensor, gradient: Tensor) -> bool:
        """
        Run the backward of a layer's last remaining chunk.

        ``gradient`` is that of the layer's output, ``[tokens, width]``. It is overwritten
        in place by the input gradient. Returns whether this was the layer's first chunk, that is
        the last one to run.
        """
        kv = self._kv[layer]
        index = len(kv) - 1
        chunk = self._chunks[index]
        past = self._past(layer, index)
        kv.pop()
        leaves = [t.requires_grad_() for t in (past.key, past.value) if t is not None]
        own = x[None, chunk].detach().requires_grad_()
        with torch.enable_grad():
            y = self._run(layer, index, own, past)
        assert past.current is not None
        outputs, gradients = [y], [gradient[None, chunk]]
        if self._kv_gradients is not None:
            outputs += past.current
            gradients += [g[:, :, chunk] for g in self._kv_gradients]
        torch.autograd.backward(outputs, gradients)
        assert own.grad is not None
        gradient[chunk] = own.grad[0]
        if not leaves:
            self._kv_gradients = None
            return True
        key, value = (leaf.grad for leaf in leaves)
        assert key is not None and value is not None
        if self._kv_gradients is None:
            self._kv_gradients = key, value
        else:
            for total, more in zip(self._kv_gradients, (key, value), strict=True):
                total[:, :, :chunk.start] += more
        return False

    def _past(self, layer: int, index: int) -> PastKV:
        """Return a layer's keys and values before a chunk."""
        before = self._kv[layer][:index]
        if not before:
            return PastKV()
        keys, values = zip(*before, strict=True)
        return PastKV(torch.cat(keys, 2), torch.cat(values, 2))

    def _run(self, layer: int, index: int, x: Tensor, past: PastKV,
             observer: InputObserver | None = None) -> Tensor:
        metadata = self._metadata[index]
        metadata.past = past
        try:
            with self._model.training(metadata, observer):
                return run_layer(self._model.layers[layer], x, self._calls[index][layer])
        finally:
            metadata.past = None


def _of_chunk(metadata: AttentionMetadata, chunk: slice) -> AttentionMetadata:
    """Return the metadata of a chunk, whose keys are all tokens up to its own."""
    assert metadata.query_sequence is not None and metadata.query_position is not None
    assert metadata.key_sequence is not None and metadata.key_position is not None
    alone = len(metadata.lengths) == 1
    prefixes, prefix = metadata.prefixes, metadata.query_prefix
    before = 0 if prefixes is None else sum(prefixes.lengths)
    return AttentionMetadata(
        query_sequence=metadata.query_sequence[chunk],
        query_position=metadata.query_position[chunk],
        query_prefix=None if prefix is None else prefix[chunk],
        key_sequence=metadata.key_sequence[:before + chunk.stop],
        key_position=metadata.key_position[:before + chunk.stop],
        prefixes=prefixes, lengths=(chunk.stop - chunk.start,) if alone else ())
