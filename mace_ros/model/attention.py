# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Attention over one packed row of tokens, with keys and values in a paged cache.

transformers' model code calls :func:`packed_attention` through its
``AttentionInterface``; what the row holds is told by the :class:`AttentionMetadata` that the
model's attention layers share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
import mmap
from typing import Any

import torch
from torch import nn, Tensor
import torch.nn.functional as F
from transformers import AttentionInterface

from mace_ros.model import cpu_attention

NAME = 'mace_packed'

TILED = 64          # queries from which PyTorch multiplies in tiles, and then ...
SHAPE_STEP = 32     # ... the lengths that it may see are multiples of this

# Arguments of the interface that change nothing here: dropout is off, and the row tells
# positions and who sees whom.
_REDUNDANT = {'dropout', 'position_ids', 'position_embeddings', 'cache_position',
              'past_key_values'}


class KVCache:
    """
    Keys and values of all layers; ``[cache slots, heads, head size]`` each.

    On a CPU, addresses are reserved: a slot takes memory from the first time it is written
    until it is dropped (:meth:`drop_from`). Elsewhere all of it is taken at once and for good,
    since device graphs hold its addresses.
    """

    def __init__(self, shapes: Sequence[tuple[int, int, int]], slots: int, dtype: torch.dtype,
                 device: torch.device) -> None:
        """``shapes`` holds, for each layer, KV heads, key size and value size."""
        self._pages: list[tuple[mmap.mmap, int]] = []     # with the bytes of a slot

        def made(heads: int, size: int) -> Tensor:
            if device.type != 'cpu':
                return torch.zeros(slots, heads, size, dtype=dtype, device=device)
            slot_bytes = heads * size * dtype.itemsize
            pages = mmap.mmap(-1, slots * slot_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._pages.append((pages, slot_bytes))
            return torch.frombuffer(pages, dtype=dtype).view(slots, heads, size)

        self.keys = [made(h, k) for h, k, _ in shapes]
        self.values = [made(h, v) for h, _, v in shapes]

    @property
    def nbytes(self) -> int:
        """Device memory held, if every slot is in use."""
        return sum(t.nbytes for t in self.keys + self.values)

    @property
    def slot_bytes(self) -> int:
        """Memory of one token in all layers."""
        return self.nbytes // self.keys[0].shape[0]

    def drop_from(self, slot: int) -> None:
        """Give the memory of this slot, and of those behind it, back; it is zero afterwards."""
        for pages, slot_bytes in self._pages:
            first = -(-slot * slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            if first < len(pages):
                pages.madvise(mmap.MADV_DONTNEED, first, len(pages) - first)

    @torch.no_grad()
    def move(self, old: Tensor, new: Tensor) -> None:
        """Copy what lies in the slots ``old`` to the slots ``new``; they have none in common."""
        for tensor in self.keys + self.values:
            tensor.index_copy_(0, new, tensor.index_select(0, old))


@dataclass(frozen=True)
class Observed:
    """Tokens of a block whose attention is noted: where they, and what they see, lie in it."""

    queries: slice     # of the block's tokens
    keys: slice        # of the block's keys: from the first of the sequence to the last query
    target: Tensor     # [tokens of the sequence], fp32: what each gets, summed over the layers

    def look(self, query: Tensor, key: Tensor, scaling: float | None, softcap: float | None,
             sinks: Tensor | None) -> None:
        """Add the attention of one layer, the mean of its heads; shapes as in SDPA."""
        query, key = query[0, :, self.queries].float(), key[0, :, self.keys].float()
        (heads, tokens, size), keys = query.shape, key.shape[1]
        grouped = query.reshape(key.shape[0], -1, size)
        scale = size ** -0.5 if scaling is None else scaling
        scores = (grouped @ key.transpose(1, 2) * scale).view(heads, tokens, keys)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        later = torch.ones(tokens, keys, dtype=torch.bool, device=key.device)
        scores.masked_fill_(later.triu(keys - tokens + 1), float('-inf'))
        if sinks is not None:
            column = sinks.float().view(-1, 1, 1).expand(-1, tokens, 1)
            scores = torch.cat([scores, column], 2)
        self.target[:keys] += torch.softmax(scores, 2)[..., :keys].sum((0, 1)) / heads


class EarlierKV:
    """
    Keys and values of what comes before a chunk of a row, at one layer.

    ``[1, KV heads, tokens, head size]``, none before the first chunk. ``own`` becomes those of
    the chunk when the layer attends.
    """

    def __init__(self, key: Tensor | None = None, value: Tensor | None = None) -> None:
        self.key, self.value = key, value
        self.own: tuple[Tensor, Tensor] | None = None

    def extended(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return them with those of the chunk, which are noted."""
        self.own = key, value
        if self.key is None or self.value is None:
            return key, value
        return torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)


@dataclass
class AttentionMetadata:
    """
    Who sees whom in the packed row of a pass; masks are made once and shared by the layers.

    First come the decode rows, one token each: row i sees the tokens at
    ``decode_slots[i, :decode_lengths[i]]`` of the cache, itself included. Then comes the
    block: chunks of sequences in any order. A token of the block sees the keys of its own
    sequence (``query_sequence == key_sequence``) up to its own place in it. The keys are the
    block's own (``key_slots`` None), after those of ``earlier`` if there are any, or those at
    ``key_slots`` of the cache: the block's own and what came before them. Without
    ``write_slots`` the cache is not touched.

    If the keys are the block's own, its first ``shared`` tokens may be what all others begin
    with: a sequence of which each token is a key for all of them.
    """

    write_slots: Tensor | None = None     # [tokens]
    decode_slots: Tensor | None = None    # [decode rows, longest]
    decode_lengths: Tensor | None = None  # [decode rows]
    query_sequence: Tensor | None = None     # [block tokens]
    query_position: Tensor | None = None     # [block tokens]
    key_sequence: Tensor | None = None       # [keys]
    key_position: Tensor | None = None       # [keys]
    key_slots: Tensor | None = None       # [keys]
    # Set if the block is nothing but sequences from their beginnings, or one that goes on from
    # ``earlier``: their lengths. Each attends by itself then, without a mask, unless a window
    # is shorter.
    lengths: tuple[int, ...] = ()
    shared: int = 0
    earlier: EarlierKV | None = None
    masks: dict[tuple[str, int | None], Tensor] = field(default_factory=dict)
    observed: Sequence[Observed] = ()

    def decode_mask(self, window: int | None) -> Tensor:
        """Return ``[rows, 1, 1, longest]``, true where a decode row may look."""
        key = ('decode', window)
        if key not in self.masks:
            assert self.decode_slots is not None and self.decode_lengths is not None
            place = torch.arange(self.decode_slots.shape[1], device=self.decode_slots.device)
            last = self.decode_lengths[:, None] - 1
            mask = place[None] <= last
            if window is not None:
                mask &= place[None] > last - window
            self.masks[key] = mask[:, None, None]
        return self.masks[key]

    def is_plain(self, window: int | None) -> bool:
        """Return whether each sequence of the block attends causally to itself alone."""
        if not self.lengths or self.key_sequence is None:
            return False
        longest = (self.shared + max(self.lengths) if self.earlier is None
                   else self.key_sequence.shape[0])
        return window is None or window >= longest

    def block_mask(self, window: int | None) -> Tensor:
        """Return ``[block tokens, keys]``, true where one may look."""
        key = ('block', window)
        if key not in self.masks:
            assert self.query_sequence is not None and self.query_position is not None
            assert self.key_sequence is not None and self.key_position is not None
            distance = self.query_position[:, None] - self.key_position[None]
            mask = self.query_sequence[:, None] == self.key_sequence[None]
            mask[:, :self.shared] = True
            mask &= distance >= 0
            if window is not None:
                mask &= distance < window
            self.masks[key] = mask
        return self.masks[key]


def whole_sequences(lengths: Sequence[int], device: torch.device, *, shared: int = 0,
                    together: bool = False) -> AttentionMetadata:
    """
    Return the row of whole sequences one after the other, without cache: for training.

    The first ``shared`` tokens are the first one, which all others go on from. Are they
    ``together``, all attend behind one mask on a CPU as well.
    """
    owner = torch.repeat_interleave(
        torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device))
    place = torch.cat([torch.arange(n, device=device) for n in lengths])
    place[shared:] += shared
    # Elsewhere one kernel for all, with a mask, is faster than one for each.
    apart = len(lengths) == 1 or (device.type == 'cpu' and not together)
    return AttentionMetadata(
        query_sequence=owner, query_position=place, key_sequence=owner, key_position=place,
        lengths=tuple(lengths) if apart else (), shared=shared)


class ForwardContext:
    """What the attention layers of one model share: its cache and the current row."""

    def __init__(self) -> None:
        self.row = AttentionMetadata()
        self.cache: KVCache | None = None
        # While set, layers report their KV shapes here; how the cache is sized at load.
        self.shapes: dict[int, tuple[int, int, int]] | None = None
        # Meanwhile, names of arguments that the layers gave and that would be ignored.
        self.ignored: set[str] = set()


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: Tensor | None = None, *, scaling: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, is_causal: bool | None = None, **others: Any,
) -> tuple[Tensor, None]:
    """
    Attend within each sequence of the packed row.

    ``query``, ``key`` and ``value`` are ``[1, heads, tokens, head size]``, ``s_aux`` holds
    one logit per head that takes part in the softmax without a value (an attention sink);
    returns ``[1, tokens, heads, value size]``. Called by transformers.
    """
    state: ForwardContext = module.mace_attention  # type: ignore[assignment]
    layer: int = module.layer_idx  # type: ignore[assignment]
    row = state.row
    if state.shapes is not None:
        state.shapes[layer] = (key.shape[1], key.shape[3], value.shape[3])
        others |= {'attention_mask': attention_mask, 'bidirectional': is_causal is False}
        given = {k for k, v in others.items() if v is not None and v is not False}
        state.ignored |= given - _REDUNDANT
    parts = []
    if row.write_slots is not None:
        assert state.cache is not None
        keys, values = state.cache.keys[layer], state.cache.values[layer]
        keys.index_copy_(0, row.write_slots, key[0].transpose(0, 1))
        values.index_copy_(0, row.write_slots, value[0].transpose(0, 1))
        if row.decode_slots is not None:
            parts.append(_decode(query, keys, values, row, scaling, sliding_window, softcap, s_aux))
    if row.query_sequence is not None:
        first = query.shape[2] - row.query_sequence.shape[0]
        if row.key_slots is None:
            q, k, v = (x[:, :, first:] for x in (query, key, value))
            if row.earlier is not None:
                k, v = row.earlier.extended(k, v)
        else:
            q = query[:, :, first:]
            k = keys.index_select(0, row.key_slots).transpose(0, 1)[None]
            v = values.index_select(0, row.key_slots).transpose(0, 1)[None]
        for observed in row.observed:
            # What lies behind a window is of no use to the layer.
            if sliding_window is None or sliding_window >= observed.target.shape[0]:
                observed.look(q, k, scaling, softcap, s_aux)
        if row.is_plain(sliding_window):
            keyed = row.lengths if row.earlier is None else (k.shape[2],)
            queries = q.split(row.lengths, 2)
            keys_of, values_of = (x.split(keyed, 2) for x in (k, v))
            if row.shared:
                keys_of, values_of = (_after_first(x) for x in (keys_of, values_of))
            outs = [attend(a, b, c, None, scaling, softcap, s_aux)
                    for a, b, c in zip(queries, keys_of, values_of, strict=True)]
        else:
            outs = [attend(q, k, v, row.block_mask(sliding_window), scaling, softcap, s_aux)]
        parts += [out[0].transpose(0, 1) for out in outs]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _after_first(parts: Sequence[Tensor]) -> list[Tensor]:
    first, *others = parts
    return [first, *(torch.cat([first, x], 2) for x in others)]


def _decode(query: Tensor, keys: Tensor, values: Tensor, row: AttentionMetadata,
            scaling: float | None, window: int | None, softcap: float | None,
            sinks: Tensor | None) -> Tensor:
    """Attend for the decode rows; returns ``[rows, heads, value size]``."""
    assert row.decode_slots is not None
    rows, longest = row.decode_slots.shape
    kv_heads, size = keys.shape[1], query.shape[3]
    # The query heads that share a KV head stand in for query tokens: no KV is repeated.
    q = query[0, :, :rows].transpose(0, 1).reshape(rows, kv_heads, -1, size)
    slots = row.decode_slots.view(-1)
    k = keys.index_select(0, slots).view(rows, longest, kv_heads, -1).transpose(1, 2)
    v = values.index_select(0, slots).view(rows, longest, kv_heads, -1).transpose(1, 2)
    out = attend(q, k, v, row.decode_mask(window), scaling, softcap, sinks)
    return out.reshape(rows, query.shape[1], -1)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
           scaling: float | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """
    Scaled dot-product attention. Shapes as in PyTorch's SDPA.

    ``mask`` None is causal, and the queries are the last of the sequence.
    """
    grouped = query.shape[1] != key.shape[1]
    tokens, keys = query.shape[2], key.shape[2]
    if softcap is None and sinks is None:
        if cpu_attention.suits(query):
            return cpu_attention.attend_causally(query, key, value, scaling, mask)
        if mask is None and 1 < tokens < keys:    # SDPA would take them for the first
            mask = cpu_attention.visible(tokens, keys, query.device)
        if tokens >= TILED and query.device.type == 'cpu' and query.dtype == torch.bfloat16:
            query, key, value, mask = _of_few_shapes(query, key, value, mask)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None and tokens > 1,
            scale=scaling, enable_gqa=grouped)
        return out[:, :, :tokens]
    if grouped:
        repeats = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(repeats, dim=1)
        value = value.repeat_interleave(repeats, dim=1)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = cpu_attention.visible(tokens, keys, query.device)
    scores = scores.masked_fill(~mask, float('-inf'))
    if sinks is not None:
        # Heads in order: [heads, 1], or in a decode row [KV heads, heads of each].
        column = sinks.to(scores.dtype).view(1, scores.shape[1], -1, 1)
        scores = torch.cat([scores, column.expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., :keys]
    return weights.to(query.dtype) @ value


def _of_few_shapes(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """
    Return them with queries and keys appended that nothing looks at.

    On a CPU that multiplies bfloat16 in tiles (AMX), PyTorch 2.13 makes kernels for each shape
    and keeps them for ever: for each length of a prompt, and of what is before it.
    """
    queries, keys = (-x.shape[2] % SHAPE_STEP for x in (query, key))
    if mask is not None:
        mask = F.pad(mask, (0, keys, 0, queries))
        mask[..., mask.shape[-2] - queries:, 0] = True     # or their softmax is not a number
    return (F.pad(query, (0, 0, 0, queries)), F.pad(key, (0, 0, 0, keys)),
            F.pad(value, (0, 0, 0, keys)), mask)


AttentionInterface.register(NAME, packed_attention)
