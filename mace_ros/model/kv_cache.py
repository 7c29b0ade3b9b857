# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The tensors of the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
import mmap

import torch
from torch import Tensor

from mace_ros.model.prefix_kv import PrefixKV


class KVCache:
    """
    Keys and values of all layers, ``[cache slots, heads, head size]`` each.

    On a CPU only addresses are reserved: a slot takes memory from its first write until it is
    dropped (:meth:`drop_from`). Other devices allocate all memory at once and keep it, since
    device graphs hold its addresses.
    """

    def __init__(self, shapes: Sequence[tuple[int, int, int]], slots: int, dtype: torch.dtype,
                 device: torch.device) -> None:
        """``shapes`` holds KV heads, key size and value size of each layer."""
        self._pages: list[tuple[mmap.mmap, int]] = []     # with the bytes of a slot

        def allocate(heads: int, size: int) -> Tensor:
            if device.type != 'cpu':
                return torch.zeros(slots, heads, size, dtype=dtype, device=device)
            slot_bytes = heads * size * dtype.itemsize
            pages = mmap.mmap(-1, slots * slot_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._pages.append((pages, slot_bytes))
            return torch.frombuffer(pages, dtype=dtype).view(slots, heads, size)

        self.keys = [allocate(h, k) for h, k, _ in shapes]
        self.values = [allocate(h, v) for h, _, v in shapes]

    @property
    def nbytes(self) -> int:
        """Device memory with every slot in use, in bytes."""
        return sum(t.nbytes for t in self.keys + self.values)

    @property
    def slot_bytes(self) -> int:
        """Memory of one token in all layers, in bytes."""
        return self.nbytes // self.keys[0].shape[0]

    def drop_from(self, slot: int) -> None:
        """Free the memory of this slot and all slots after it, where possible; zeros them."""
        for pages, slot_bytes in self._pages:
            first = -(-slot * slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            if first < len(pages):
                pages.madvise(mmap.MADV_DONTNEED, first, len(pages) - first)

    @torch.no_grad()
    def read(self, slots: Tensor) -> PrefixKV:
        """Copy the content of ``slots``, ``[tokens]``."""
        keys, values = (
            tuple(x.index_select(0, slots).transpose(0, 1)[None].contiguous() for x in tensors)
            for tensors in (self.keys, self.values))
        return PrefixKV(keys, values)

    @torch.no_grad()
    def write(self, slots: Tensor, prefix: PrefixKV) -> None:
        """Copy a prefix into ``slots``, ``[tokens]``."""
        for target, source in zip((*self.keys, *self.values), (*prefix.keys, *prefix.values),
                                  strict=True):
            target.index_copy_(0, slots, source[0].transpose(0, 1))

    @torch.no_grad()
    def move(self, old: Tensor, new: Tensor) -> None:
        """Copy the content of the slots ``old`` to the slots ``new``; they must be disjoint."""
        for tensor in self.keys + self.values:
            tensor.index_copy_(0, new, tensor.index_select(0, old))
