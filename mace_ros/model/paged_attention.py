# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Decode attention that reads keys and values where they are in the paged KV cache.

PyTorch's kernels need the keys of a batch in one tensor: gathering them reads and writes all of
them once more, padded to the longest row. The kernel here (:mod:`paged_kernels`) takes block
tables. Its grid and its memory depend only on shapes, never on lengths, so that a CUDA graph can
hold it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.model.triton_operator import triton_operator

# A row's keys are split among at least MIN_SPLITS programs, since one row may be far longer than
# the others of its pass, at most MAX_SPLITS, and otherwise such that a pass has some programs for
# each processor of the device. A split has at least SPLIT_TOKENS.
MIN_SPLITS, MAX_SPLITS, SPLIT_TOKENS = 4, 32, 256
PROGRAMS_PER_PROCESSOR = 8
ALL_KEYS = 2 ** 30      # a window that is longer than any context


@dataclass(frozen=True)
class PagedAttention:
    """Decode attention over block tables, for a device with some ``processors``."""

    processors: int

    def splits(self, rows: int, kv_heads: int, blocks: int) -> int:
        """Return among how many programs the keys of a row of up to ``blocks`` are split."""
        busy = self.processors * PROGRAMS_PER_PROCESSOR // (rows * kv_heads)
        return min(max(busy, MIN_SPLITS), MAX_SPLITS, -(-blocks * BLOCK_TOKENS // SPLIT_TOKENS))

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, tables: Tensor,
               lengths: Tensor, *, scaling: float | None = None, window: int | None = None,
               softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
        """
        Attend with the last token of each sequence; return ``[rows, heads, value size]``.

        ``query`` is ``[rows, heads, key size]``; ``keys`` and ``values`` are the cache,
        ``[cache slots, KV heads, size]``. Row i attends to the first ``lengths[i]`` (at least 1)
        tokens in the KV blocks ``tables[i]``, or to the last ``window`` of them.
        """
        (rows, heads, size), value_size = query.shape, values.shape[2]
        splits = self.splits(rows, keys.shape[1], tables.shape[1])
        out = values.new_empty(rows, heads, value_size)
        partial, log_sums = (values.new_empty(shape, dtype=torch.float32) for shape in (
            (rows, heads, splits if splits > 1 else 0, value_size), (rows, heads, splits)))
        if query.stride(2) != 1:
            query = query.contiguous()
        torch.ops.mace_ros.attend_paged(
            out, partial, log_sums, query, keys, values, tables.contiguous(), lengths, sinks,
            size ** -0.5 if scaling is None else scaling,
            ALL_KEYS if window is None else window, softcap)
        return out


def row_bytes(heads: int, value_size: int, itemsize: int) -> int:
    """Return the most memory that a row of a pass takes while a layer attends, in bytes."""
    return heads * (MAX_SPLITS * 4 * (value_size + 1) + value_size * itemsize)


def find(device: torch.device) -> PagedAttention | None:
    """Return paged attention for a device; None if it has none or Triton is not installed."""
    if device.type != 'cuda' or find_spec('triton') is None:
        return None
    return PagedAttention(torch.cuda.get_device_properties(device).multi_processor_count)


@triton_operator(
    'attend_paged(Tensor(a!) out, Tensor(b!) partial, Tensor(c!) log_sums, Tensor query, '
    'Tensor keys, Tensor values, Tensor tables, Tensor lengths, Tensor? sinks, float scale, '
    'int window, float? softcap) -> ()')
def _launch(out: Tensor, partial: Tensor, log_sums: Tensor, query: Tensor, keys: Tensor,
            values: Tensor, tables: Tensor, lengths: Tensor, sinks: Tensor | None, scale: float,
            window: int, softcap: float | None) -> None:
    """Run the kernels; on a CPU, only Triton's interpreter can."""
    from mace_ros.model.paged_kernels import launch  # needs Triton

    launch(out, partial, log_sums, query, keys, values, tables, lengths, sinks, scale=scale,
           window=window, softcap=softcap, block_tokens=BLOCK_TOKENS, split_tokens=SPLIT_TOKENS,
           max_splits=MAX_SPLITS)
