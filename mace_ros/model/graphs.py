# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What may run a packed model faster on some devices: graphs, and fused parts of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from mace_ros.model.attention import AttentionMetadata
from mace_ros.model.prefix_kv import PackedPrefixes
from mace_ros.model.spans import PiggybackSpans, Span


class FastPasses(Protocol):
    """
    Passes of some shapes, computed in another way than by the model's own code.

    ``best_tokens`` are those of the last pass that was computed: for each row of its logits, the
    token of the largest, or None if they were not looked for. They are valid until the next pass.
    """

    best_tokens: Tensor | None

    def run(self, spans: Sequence[Span], piggyback: PiggybackSpans | None) -> Tensor | None:
        """Compute a pass as the model does, or return None if its shape is not covered."""


class LayerGraphs(Protocol):
    """All decoder layers on fixed addresses, for training passes of a fixed length."""

    tokens: int
    prefix_tokens: int      # of all prefixes together, at most
    metadata: AttentionMetadata

    def begin(self, user: object, lengths: Sequence[int], calls: Sequence[dict[str, Any]],
              prefixes: PackedPrefixes | None = None) -> None:
        """Copy in a packed batch of ``lengths`` and the layers' arguments for it."""

    def holds(self, user: object) -> bool:
        """Return whether ``user`` was the last to begin."""

    def run(self, index: int, x: Tensor) -> Tensor:
        """Return the output of a layer, ``[1, tokens, width]``, whose autograd graph is kept."""

    def backward(self, index: int, x: Tensor, gradient: Tensor) -> Tensor:
        """
        Recompute a layer for its input ``x``, and add to the gradients of its weights.

        ``gradient`` is that of its output. Returns that of ``x``, valid until the next call. All
        of them are ``[1, tokens, width]``.
        """


class FusedPart(Protocol):
    """A part of a model's layers that can take fewer kernels than in the model's own code."""

    @property
    def name(self) -> str:
        """What it is, for the log."""

    @property
    def applies(self) -> bool:
        """Whether the model has such a part."""

    def use(self) -> None:
        """Let the model use it from now on."""

    def use_plain(self) -> None:
        """Let the model compute the same by plain operations, to be compared with."""

    def undo(self) -> None:
        """Let the model run its own code again."""
