# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Layers of a fine-tune step that are divided by tokens, for steps too long for one piece.

A layer runs forward chunk by chunk, and backward from the last chunk to the first. What
couples the chunks are keys and values: those of earlier chunks are kept from the forward, and
the gradients that later chunks give them go into the backward of their own chunk. So the
gradients are those of the undivided layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mace_ros.model.attention import AttentionMetadata, EarlierKV
from mace_ros.model.model_shell import run_layer
from mace_ros.model.packed_model import PackedModel


def chunks_of(tokens: int, most: int) -> list[slice]:
    """Return chunks of about one size, of ``most`` tokens at most."""
    count = -(-tokens // most)
    bounds = [tokens * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]


class ChunkedLayers:
    """The layers over one row of whole sequences, a chunk of its tokens at a time."""

    def __init__(self, model: PackedModel, row: AttentionMetadata, ids: Tensor, positions: Tensor,
                 chunks: Sequence[slice]) -> None:
        """``row`` is of the whole; ``ids`` and ``positions`` are ``[1, tokens]``."""
        self._model = model
        self._chunks = tuple(chunks)
        self._rows = [_chunk_of(row, chunk) for chunk in chunks]
        self._calls = []
        first = []
        with torch.no_grad():
            for chunk, own in zip(self._chunks, self._rows, strict=True):
                with model.training(own):
                    x, calls = model.skeleton.call_layers(ids[:, chunk], positions[:, chunk])
                first.append(x[0])
                self._calls.append(calls)
        self.first = torch.cat(first)    # the first layer's input: [tokens, width]
        # Of each layer, keys and values of the chunks that are done and not yet done backward.
        self._kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in model.layers]
        # What later chunks have given those of the layer that goes backward.
        self._pulls: tuple[Tensor, Tensor] | None = None

    @property
    def sizes(self) -> list[int]:
        """Tokens of the chunks."""
        return [chunk.stop - chunk.start for chunk in self._chunks]

    def restart(self) -> None:
        """Forget what was computed."""
        self._kept = [[] for _ in self._kept]
        self._pulls = None

    def forward(self, index: int, x: Tensor, y: Tensor, *, keep: bool) -> bool:
        """
        Run a layer over the next chunk of its input ``x``, and write into ``y``.

        ``[tokens, width]`` both. With ``keep``, there will be a backward. Returns whether
        the layer is through.
        """
        kept = self._kept[index]
        number = len(kept)
        chunk = self._chunks[number]
        earlier = self._earlier(index, number)
        with torch.no_grad():
            y[chunk] = self._run(index, number, x[None, chunk], earlier)[0]
        assert earlier.own is not None
        key, value = earlier.own
        kept.append((key.detach(), value.detach()))
        complete = len(kept) == len(self._chunks)
        if complete and not keep:
            kept.clear()
        return complete

    def is_whole(self, index: int) -> bool:
        """Whether a layer is through, and not a chunk of it went backward."""
        return len(self._kept[index]) == len(self._chunks)

    def backward(self, index: int, x: Tensor, gradient: Tensor) -> bool:
        """
        Go backward through a layer's last chunk that is left.

        ``gradient`` is that of the layer's output, ``[tokens, width]``; where chunks are done,
        it becomes that of its input ``x``. Returns whether the layer is through.
        """
        kept = self._kept[index]
        number = len(kept) - 1
        chunk = self._chunks[number]
        earlier = self._earlier(index, number)
        kept.pop()
        leaves = [t.requires_grad_() for t in (earlier.key, earlier.value) if t is not None]
        own = x[None, chunk].detach().requires_grad_()
        with torch.enable_grad():
            y = self._run(index, number, own, earlier)
        assert earlier.own is not None
        outputs, gradients = [y], [gradient[None, chunk]]
        if self._pulls is not None:
            outputs += earlier.own
            gradients += [pull[:, :, chunk] for pull in self._pulls]
        torch.autograd.backward(outputs, gradients)
        assert own.grad is not None
        gradient[chunk] = own.grad[0]
        if not leaves:
            self._pulls = None
            return True
        key, value = (leaf.grad for leaf in leaves)
        assert key is not None and value is not None
        if self._pulls is None:
            self._pulls = key, value
        else:
            for pull, more in zip(self._pulls, (key, value), strict=True):
                pull[:, :, :chunk.start] += more
        return False

    def _earlier(self, index: int, number: int) -> EarlierKV:
        """Return the keys and values before a chunk of a layer."""
        before = self._kept[index][:number]
        if not before:
            return EarlierKV()
        keys, values = zip(*before, strict=True)
        return EarlierKV(torch.cat(keys, 2), torch.cat(values, 2))

    def _run(self, index: int, number: int, x: Tensor, earlier: EarlierKV) -> Tensor:
        row = self._rows[number]
        row.earlier = earlier
        try:
            with self._model.training(row):
                return run_layer(self._model.layers[index], x, self._calls[number][index])
        finally:
            row.earlier = None


def _chunk_of(row: AttentionMetadata, chunk: slice) -> AttentionMetadata:
    """Return the row of a chunk, whose keys are all up to its own."""
    owner, place = row.query_sequence, row.query_position
    assert owner is not None and place is not None
    alone = len(row.lengths) == 1
    return AttentionMetadata(
        query_sequence=owner[chunk], query_position=place[chunk], key_sequence=owner[:chunk.stop],
        key_position=place[:chunk.stop], shared=row.shared,
        lengths=(chunk.stop - chunk.start,) if alone else ())
