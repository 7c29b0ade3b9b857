# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""One budget of device memory for all that is not the base model (no tensors here)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
import math

from mace_ros.memory.block_pool import BLOCK_TOKENS

MB = 1_000_000
LEAST_KV_TOKENS = 256      # with less, there is nothing to serve
KV_COPIES = 8              # of one layer's keys and values, while a chunk of it is learned
LEAST_PIECE = 16           # tokens of a layer that learning computes at once, at least
HEAD_ROWS = 16             # tokens of a fine-tune step's HEAD segment


@dataclass(frozen=True)
class Footprint:
    """
    Bytes that each kind of work takes on a device, as execution found them.

    ``graphs`` holds, for sequences of some lengths, what one layer keeps of them for its
    backward. If ``packed``, the sequences of a step may attend behind one mask, like one long one.
    """

    kv_block: int            # keys and values of one block, all layers
    adapters: int            # all slots, and the master weights with all that training adds
    layers: int
    hidden_token: int        # a token's hidden state
    logits_row: int          # logits of one token, fp32
    graphs: tuple[tuple[int, int], ...]    # (tokens, bytes), at least one
    packed: bool = False
    kernels: int = 0         # what products keep for themselves between passes

    def graph(self, tokens: int) -> float:
        """Return the bytes of one layer's graph of a sequence."""
        lengths = [n for n, _ in self.graphs]
        i = bisect_left(lengths, tokens)
        if i == len(lengths):
            return self._beyond(tokens)
        high, most = self.graphs[i]
        low, least = self.graphs[i - 1] if i else (0, 0)
        return least + (most - least) * (tokens - low) / (high - low)

    def most_graph(self, tokens: int) -> float:
        """Return the most that one layer keeps of sequences of so many tokens, however cut."""
        shorter = [size / n for n, size in self.graphs if n <= tokens]
        return max(self.graph(tokens), tokens * max(shorter, default=0.0))

    def _beyond(self, tokens: int) -> float:
        """Return the graph of a longer sequence than was counted: linear, or quadratic."""
        n, most = self.graphs[-1]
        square = 0.0
        if len(self.graphs) > 1:
            m, less = self.graphs[-2]
            square = max((most / n - less / m) / (n - m), 0.0)
        return tokens * (most / n + square * (tokens - n))

    def pass_bytes(self, tokens: int, rows: int) -> float:
        """Return what a pass of so many tokens takes while it runs, ``rows`` of them decoding."""
        # A layer without gradients holds no more than one that keeps its graph.
        return self.graph(tokens) + 2 * tokens * self.hidden_token + 2 * rows * self.logits_row

    def step_bytes(self, lengths: Sequence[int], *, keep_graphs: bool, learns: bool = True,
                   piece_tokens: int | None = None) -> float:
        """
        Return what a fine-tune step of sequences of these lengths takes.

        If they are more than ``piece_tokens``, its layers are computed in chunks of so many.
        """
        tokens = sum(lengths)
        if piece_tokens is not None and piece_tokens < tokens:
            # Of a chunk that looks at all of them; and the keys and values of all layers, with
            # copies of one layer's: joined, one for each query head, and gradients of them.
            layer = self.graph(tokens) * piece_tokens / tokens
            kept = self.kv_block * tokens / BLOCK_TOKENS * (1 + KV_COPIES / self.layers)
            return kept + self._step_bytes(tokens, layer, keep_graphs=False, learns=learns)
        layer = sum(map(self.graph, lengths))
        if self.packed:
            layer = max(layer, self.graph(tokens))
        return self._step_bytes(tokens, layer, keep_graphs, learns)

    def _step_bytes(self, tokens: int, layer: float, keep_graphs: bool, learns: bool) -> float:
        inputs = (self.layers + 1) * tokens * self.hidden_token
        # Of the head: logits, their probabilities, both for the gradient, and one more.
        head = 5 * HEAD_ROWS * self.logits_row
        if not learns:
            return inputs + head + layer
        # One more layer for the gradients on the way.
        return inputs + head + layer * (self.layers + 1 if keep_graphs else 2)

    def least_step_bytes(self, lengths: Sequence[int], *, learns: bool = True,
                         piece_tokens: int | None = None) -> float:
        """Return the least with which such a step can run, in pieces however much smaller."""
        # What is divided keeps more beside the pieces: a short step takes less without.
        return min(self.step_bytes(lengths, keep_graphs=False, learns=learns, piece_tokens=piece)
                   for piece in (piece_tokens, LEAST_PIECE))

    def most_step_bytes(self, tokens: int) -> float:
        """Return the most that a step of so many tokens takes that recomputes its layers."""
        return self._step_bytes(tokens, self.most_graph(tokens), keep_graphs=False, learns=True)


@dataclass(frozen=True)
class Grant:
    """
    Memory for a fine-tune step.

    And whether it may keep its layers' graphs with it, and how many tokens of a layer it may
    compute at once.
    """

    bytes: float
    keep_graphs: bool
    piece_tokens: int


class MemoryBudget:
    """
    Shares the budget between answers and learning.

    Adapters and the largest pass come first, then the KV blocks that running requests
    hold, then a fine-tune step. What is left is KV blocks for what may be of use again.
    """

    def __init__(self, footprint: Footprint, total: float, *, most_blocks: int,
                 pass_tokens: int, rows: int, resident: bool = False) -> None:
        """
        ``total`` is in bytes and may be changed; no more than ``most_blocks`` are used.

        If the KV cache is ``resident``, it takes its memory whether blocks are used or not, and
        passes leave nothing behind; else they leave gaps in the heap, which go back later on.
        """
        self.footprint = footprint
        self._resident = most_blocks * footprint.kv_block if resident else 0
        self._passes = 1 if resident else 2     # held at once: one, and the gaps of another
        self.total = total
        self.learning = 0.0     # bytes granted to the current step
        self._most_blocks = most_blocks
        self.limit_passes(pass_tokens, rows)

    def limit_passes(self, tokens: int, rows: int) -> None:
        """Take passes to be no larger than this."""
        self._pass = self._passes * self.footprint.pass_bytes(tokens, rows)

    @property
    def fixed(self) -> float:
        """Bytes that are taken in any case."""
        return (self.footprint.adapters + self.footprint.kernels + self._pass
                + self._resident)

    @property
    def least(self) -> float:
        """The smallest total with which a short answer can be given."""
        return self.planned(-(-LEAST_KV_TOKENS // BLOCK_TOKENS)) - self.learning

    @property
    def kv_capacity(self) -> int:
        """KV blocks that answers may have when nothing is being learned."""
        return self._blocks(self.total - self.fixed)

    @property
    def kv_limit(self) -> int:
        """KV blocks beside the current step."""
        return self.kv_beside(self.learning)

    def kv_beside(self, learning: float) -> int:
        """Return the KV blocks beside a step of so many bytes."""
        return self._blocks(self.total - self.fixed - learning)

    def grant(self, lengths: Sequence[int], *, held_blocks: int, keep_graphs: bool,
              learns: bool = True, piece_tokens: int | None = None,
              urgent: bool = False) -> Grant | None:
        """
        Return the most that a step may have beside ``held_blocks``; None: it must wait.

        The step is told as in :meth:`Footprint.step_bytes`. One that would not fit even
        beside nothing gets smaller pieces; one that is ``urgent``, rather than wait.
        """
        room, tokens = self._room(held_blocks), sum(lengths)
        piece = min(piece_tokens or tokens, tokens)

        def needed(keeps: bool) -> float:
            return self.footprint.step_bytes(
                lengths, keep_graphs=keeps, learns=learns, piece_tokens=piece)

        if keep_graphs and piece == tokens and needed(True) <= room:
            return Grant(needed(True), True, piece)
        while piece > LEAST_PIECE and needed(False) > (room if urgent else self._room(0)):
            piece = max(piece // 2, LEAST_PIECE)
        return Grant(needed(False), False, piece) if needed(False) <= room else None

    def step_tokens(self, most: int, *, held_blocks: int) -> int:
        """Return with how many tokens (0 to ``most``) any step fits that recomputes its layers."""
        room = self._room(held_blocks)
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.footprint.most_step_bytes(middle) <= room:
                low = middle
            else:
                high = middle - 1
        return low

    def planned(self, blocks: int) -> float:
        """Return the bytes of all that is planned, with so many KV blocks in use."""
        return self.fixed + self.learning + blocks * self._block

    @property
    def _block(self) -> float:
        # While a layer attends, what it reads of the cache is copied: keys and values, once.
        return self.footprint.kv_block * (
            (0 if self._resident else 1) + 1 / self.footprint.layers)

    def _room(self, held_blocks: int) -> float:
        return self.total - self.fixed - held_blocks * self._block

    def _blocks(self, room: float) -> int:
        if room == math.inf:    # how much is free is not known
            return self._most_blocks
        return int(max(min(room // self._block, self._most_blocks), 0))
