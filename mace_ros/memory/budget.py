# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""One budget of device memory for everything but the base model (no tensors here)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
import math

from mace_ros.memory.block_pool import BLOCK_TOKENS

MB = 1_000_000
MIN_KV_TOKENS = 256        # the smallest KV cache that can serve a request
KV_COPIES = 8              # of one layer's keys and values, while a chunk of it is trained
MIN_CHUNK_TOKENS = 16      # the smallest chunk in which a layer is trained
PREFIX_TOKENS = 256        # of prefixes that are kept for training
# Tokens of a fine-tune step's HEAD segment. Each reads the head's weights, which for up to these
# rows takes a GPU longer than the arithmetic. On a CPU, a segment of more rows would make a query
# wait for longer than it saves.
HEAD_ROWS, CUDA_HEAD_ROWS = 32, 64
MIN_HEAD_ROWS = 16         # of a step that keeps no graphs, to save memory


def head_rows(device: str) -> int:
    """Return the tokens of a HEAD segment on a type of device."""
    return CUDA_HEAD_ROWS if device == 'cuda' else HEAD_ROWS


@dataclass(frozen=True)
class Footprint:
    """
    Bytes that each kind of work takes on a device, as measured at load.

    ``graphs`` holds, for sequences of some lengths, the bytes that one layer keeps for its
    backward. If ``packed``, the sequences of a step may attend behind one mask, like one long
    sequence.
    """

    kv_block: int            # keys and values of one block, all layers
    adapters: int            # all slots, master weights, gradients and optimizer state
    layers: int
    hidden_token: int        # hidden state of one token
    logits_row: int          # logits of one token, fp32
    graphs: tuple[tuple[int, int], ...]    # (tokens, bytes), at least one
    packed: bool = False
    kernels: int = 0         # workspace of matrix products
    # While a layer attends:
    decode_row: int = 0      # of a decode row
    gathered: int = 0        # of decode rows that copy short contexts
    gathered_key: int = 0    # of each key of a decode row with a long one, beside its copy
    row_key: int = 0         # of each key for each decode row
    attended_key: int = 0    # of each key for each token of a chunk
    observed_key: int = 0    # of each key whose attention is summed up
    key: int = 0             # of each key
    head_rows: int = HEAD_ROWS

    def graph_bytes(self, tokens: int) -> float:
        """Return the size of one layer's graph for a sequence of ``tokens``."""
        lengths = [n for n, _ in self.graphs]
        i = bisect_left(lengths, tokens)
        if i == len(lengths):
            return self._extrapolated(tokens)
        high, more = self.graphs[i]
        low, less = self.graphs[i - 1] if i else (0, 0)
        return less + (more - less) * (tokens - low) / (high - low)

    def max_graph_bytes(self, tokens: int) -> float:
        """Return the largest size of one layer's graphs for sequences of ``tokens`` in total."""
        per_token = [size / n for n, size in self.graphs if n <= tokens]
        return max(self.graph_bytes(tokens), tokens * max(per_token, default=0.0))

    def _extrapolated(self, tokens: int) -> float:
        """Return the graph's size beyond the measured lengths, linear or quadratic."""
        n, more = self.graphs[-1]
        quadratic = 0.0
        if len(self.graphs) > 1:
            m, less = self.graphs[-2]
            quadratic = max((more / n - less / m) / (n - m), 0.0)
        return tokens * (more / n + quadratic * (tokens - n))

    def pass_bytes(self, tokens: int, rows: int, keys: int = 0) -> float:
        """
        Return what a pass of ``tokens``, ``rows`` of them decoding, takes while it runs.

        It attends to ``keys``; their copies are not counted.
        """
        # A layer without gradients needs no more than one that keeps its graph.
        return (self.graph_bytes(tokens) + 2 * tokens * self.hidden_token
                + rows * (2 * self.logits_row + self.decode_row) + self.gathered
                + keys * self.key_bytes(tokens, rows))

    def key_bytes(self, tokens: int, rows: int) -> int:
        """Return what a pass of ``tokens``, ``rows`` of them decoding, takes for each key."""
        # Decode rows attend before chunks do.
        return self.key + rows * self.row_key + max(
            self.gathered_key, tokens * self.attended_key, self.observed_key)

    def step_bytes(self, lengths: Sequence[int], *, keep_graphs: bool, learns: bool = True,
                   chunk_tokens: int | None = None) -> float:
        """
        Return what a fine-tune step over sequences of these lengths takes.

        If the sequences have more than ``chunk_tokens`` in total, the layers run in chunks.
        """
        tokens = sum(lengths)
        if chunk_tokens is not None and chunk_tokens < tokens:
            # The graph of a chunk that attends to all tokens; keys and values of all layers, and
            # copies of one layer's: concatenated, repeated for the query heads, and gradients.
            layer = self.graph_bytes(tokens) * chunk_tokens / tokens
            kv = self.kv_block * tokens / BLOCK_TOKENS * (1 + KV_COPIES / self.layers)
            return kv + self._step_bytes(tokens, layer, keep_graphs=False, learns=learns)
        layer = sum(map(self.graph_bytes, lengths))
        if self.packed:
            layer = max(layer, self.graph_bytes(tokens))
        return self._step_bytes(tokens, layer, keep_graphs, learns)

    def _step_bytes(self, tokens: int, layer: float, keep_graphs: bool, learns: bool) -> float:
        inputs = (self.layers + 1) * tokens * self.hidden_token
        # Of the head: logits, also in fp32, their probabilities, their gradient, and one more.
        head = 5 * (self.head_rows if keep_graphs else MIN_HEAD_ROWS) * self.logits_row
        if not learns:
            return inputs + head + layer
        # One more layer for the gradients in the backward.
        return inputs + head + layer * (self.layers + 1 if keep_graphs else 2)

    def min_step_bytes(self, lengths: Sequence[int], *, learns: bool = True,
                       chunk_tokens: int | None = None) -> float:
        """Return the least memory in which such a step can run, in chunks as small as needed."""
        # Chunks need keys and values in addition: a short step takes less without them.
        return min(self.step_bytes(lengths, keep_graphs=False, learns=learns, chunk_tokens=n)
                   for n in (chunk_tokens, MIN_CHUNK_TOKENS))

    def max_step_bytes(self, tokens: int) -> float:
        """Return the most that a step of ``tokens`` takes if it recomputes its layers."""
        return self._step_bytes(
            tokens, self.max_graph_bytes(tokens), keep_graphs=False, learns=True)


@dataclass(frozen=True)
class Grant:
    """Memory for a fine-tune step, and how the step must run within it."""

    bytes: float
    keep_graphs: bool       # whether the step may keep its layers' graphs
    chunk_tokens: int       # tokens of a layer that the step may compute at once


class MemoryBudget:
    """
    Divides the budget between serving and fine-tuning.

    Adapters and the largest pass come first, then the KV blocks of running requests, then a
    fine-tune step. The rest is KV blocks for the prefix cache.
    """

    def __init__(self, footprint: Footprint, total: float, *, max_blocks: int,
                 pass_tokens: int, rows: int, resident: bool = False) -> None:
        """
        ``total`` is in bytes and may be changed; at most ``max_blocks`` KV blocks are used.

        If the KV cache is ``resident``, it takes its memory whether blocks are used or not, and
        passes leave no gaps. Otherwise passes leave gaps in the heap, which are returned to the
        system later.
        """
        self.footprint = footprint
        self._resident = max_blocks * footprint.kv_block if resident else 0
        self._passes = 1 if resident else 2     # the running one, and the gaps of another
        self.total = total
        self.learning = 0.0     # bytes granted to the current step
        self.graphs = 0.0       # bytes of captured device graphs
        self._max_blocks = max_blocks
        self.limit_passes(pass_tokens, rows)

    def limit_passes(self, tokens: int, rows: int) -> None:
        """Set the size of the largest pass."""
        # The blocks of a cache that grows pay for their own keys.
        keys = self._max_blocks * BLOCK_TOKENS if self._resident else 0
        self._pass = self._passes * self.footprint.pass_bytes(tokens, rows, keys)
        self._keys = 0 if self._resident else (
            BLOCK_TOKENS * self.footprint.key_bytes(tokens, rows))

    @property
    def fixed(self) -> float:
        """Bytes that are always in use."""
        return (self.footprint.adapters + self.footprint.kernels + self._pass
                + self._resident + self.graphs)

    @property
    def minimum(self) -> float:
        """The smallest total with which a short request can be served."""
        return self.planned(-(-MIN_KV_TOKENS // BLOCK_TOKENS)) - self.learning

    @property
    def kv_capacity(self) -> int:
        """KV blocks for serving without a fine-tune step."""
        return self._blocks(self.total - self.fixed)

    @property
    def kv_limit(self) -> int:
        """KV blocks for serving beside the current step."""
        return self.kv_beside(self.learning)

    def kv_beside(self, learning: float) -> int:
        """Return the KV blocks for serving beside a step of ``learning`` bytes."""
        return self._blocks(self.total - self.fixed - learning)

    def grant(self, lengths: Sequence[int], *, held_blocks: int, keep_graphs: bool,
              learns: bool = True, chunk_tokens: int | None = None,
              urgent: bool = False) -> Grant | None:
        """
        Return the most memory for a step beside ``held_blocks``, or None if it must wait.

        The arguments describe the step as in :meth:`Footprint.step_bytes`. A step that would
        not fit into an empty cache gets smaller chunks. An ``urgent`` step also gets smaller
        chunks instead of waiting.
        """
        room, tokens = self._room(held_blocks), sum(lengths)
        chunk = min(chunk_tokens or tokens, tokens)

        def needed(keeps: bool) -> float:
            return self.footprint.step_bytes(
                lengths, keep_graphs=keeps, learns=learns, chunk_tokens=chunk)

        if keep_graphs and chunk == tokens and needed(True) <= room:
            return Grant(needed(True), True, chunk)
        while chunk > MIN_CHUNK_TOKENS and needed(False) > (room if urgent else self._room(0)):
            chunk = max(chunk // 2, MIN_CHUNK_TOKENS)
        return Grant(needed(False), False, chunk) if needed(False) <= room else None

    def step_tokens(self, most: int, *, held_blocks: int) -> int:
        """Return the tokens (0 to ``most``) of a step that fits if it recomputes its layers."""
        return bisect_right(range(1, most + 1), self._room(held_blocks),
                            key=self.footprint.max_step_bytes)

    def planned(self, blocks: int) -> float:
        """Return the bytes in use with this number of KV blocks."""
        return self.fixed + self.learning + blocks * self._block

    @property
    def _block(self) -> float:
        # While a layer attends, it copies the keys and values that chunks read, and without
        # paged attention also those of a long decode row.
        return self._keys + self.footprint.kv_block * (
            (0 if self._resident else 1) + 1 / self.footprint.layers)

    def _room(self, held_blocks: int) -> float:
        return self.total - self.fixed - held_blocks * self._block

    def _blocks(self, room: float) -> int:
        if room == math.inf:    # the free memory is unknown
            return self._max_blocks
        return int(max(min(room // self._block, self._max_blocks), 0))
