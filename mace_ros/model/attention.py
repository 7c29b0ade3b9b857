# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Attention over packed sequences, with a paged KV cache.

transformers' model code calls :func:`packed_attention` through its ``AttentionInterface``. The
attention layers of a model share a :class:`ForwardContext`, which holds the KV cache and the
:class:`AttentionMetadata` of the current pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn, Tensor
import torch.nn.functional as F
from transformers import AttentionInterface

from mace_ros.model import cpu_attention
from mace_ros.model.block_attention import attend_block
from mace_ros.model.kv_cache import KVCache
from mace_ros.model.layer_operators import Pairing, rotate_and_write
from mace_ros.model.observation_window import ObservationWindow
from mace_ros.model.paged_attention import PagedAttention
from mace_ros.model.prefix_kv import PackedPrefixes
from mace_ros.model.upload import to_device

NAME = 'mace_packed'

TILED_QUERIES = 64      # from this many queries on, PyTorch multiplies bfloat16 in tiles
SHAPE_MULTIPLE = 32     # to a multiple of this, lengths are then padded

# Most keys that decode rows copy for one call, unless a single row has more. A larger copy leaves a
# CPU's cache, which costs more than another call.
GATHERED_KEYS = 4096

# Arguments of the interface that have no effect here: dropout is off, and the metadata holds
# positions and masks.
_REDUNDANT = {'dropout', 'position_ids', 'position_embeddings', 'cache_position',
              'past_key_values'}


class PastKV:
    """
    Keys and values of one layer for the tokens before a chunk of a training sequence.

    Each is ``[1, KV heads, tokens, head size]``, or None before the first chunk. ``current``
    is set to the keys and values of the chunk when the layer attends.
    """

    def __init__(self, key: Tensor | None = None, value: Tensor | None = None) -> None:
        self.key, self.value = key, value
        self.current: tuple[Tensor, Tensor] | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the chunk's keys and values; return them appended to the past ones."""
        self.current = key, value
        if self.key is None or self.value is None:
            return key, value
        return torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)


@dataclass
class GatheredRows:
    """
    Decode rows that attend in one call, to a copy of their keys.

    Row i attends to the cache slots ``slots[i, :lengths[i]]``, which include its own.
    """

    slots: Tensor       # [rows, longest]
    lengths: Tensor     # [rows]
    # The slots of an only row, if they are consecutive: no keys are copied.
    run: slice | None = None
    masks: dict[int | None, Tensor] = field(default_factory=dict)     # by the window

    def mask(self, window: int | None) -> Tensor:
        """Return ``[rows, 1, 1, longest]``, true at the keys that a row attends to."""
        if window not in self.masks:
            position = torch.arange(self.slots.shape[1], device=self.slots.device)
            last = self.lengths[:, None] - 1
            mask = position[None] <= last
            if window is not None:
                mask &= position[None] > last - window
            self.masks[window] = mask[:, None, None]
        return self.masks[window]


@dataclass
class AttentionMetadata:
    """
    Which tokens of a packed pass attend to which keys.

    The pass begins with the decode rows, one token each: those of ``decode_rows`` one after the
    other, or with ``decode_tables`` row i attends to the first ``decode_lengths[i]`` slots of its
    KV blocks. The block follows: chunks of sequences in any order. A token of the block attends to
    the keys of its own sequence (``query_sequence == key_sequence``) up to its own position.

    The keys are one of:

    - the block's own (``key_slots`` is None), after those of ``prefixes`` and then of ``past``
      if given;
    - those at the cache slots ``key_slots``: the block's own and the ones before them.

    Without ``write_slots`` the cache is not accessed. With ``prefixes``, ``query_prefix`` holds
    for each token what ``key_sequence`` is for the keys of its prefix: a negative number, or the
    token's own ``query_sequence`` if it has no prefix.

    Masks are built on first use and shared by the layers.
    """

    write_slots: Tensor | None = None     # [tokens]
    decode_rows: Sequence[GatheredRows] = ()
    decode_tables: Tensor | None = None   # [decode rows, blocks], for paged attention
    decode_lengths: Tensor | None = None  # [decode rows], for paged attention
    query_sequence: Tensor | None = None  # [block tokens]
    query_position: Tensor | None = None  # [block tokens]
    query_prefix: Tensor | None = None    # [block tokens]
    key_sequence: Tensor | None = None    # [keys]
    key_position: Tensor | None = None    # [keys]
    key_slots: Tensor | None = None       # [keys]
    # Set if the block is only whole sequences, or one chunk after ``past``: their lengths. Each
    # then attends in a call of its own without a mask, unless a window is shorter.
    lengths: tuple[int, ...] = ()
    prefixes: PackedPrefixes | None = None
    past: PastKV | None = None
    masks: dict[int | None, Tensor] = field(default_factory=dict)     # by the window
    observation_windows: Sequence[ObservationWindow] = ()

    def attends_without_mask(self, window: int | None) -> bool:
        """Return whether each sequence of the block attends causally in a call of its own."""
        if not self.lengths or self.key_sequence is None:
            return False
        if self.past is not None:
            longest = self.key_sequence.shape[0]
        else:
            prefix = max(self.prefixes.lengths) if self.prefixes is not None else 0
            longest = prefix + max(self.lengths)
        return window is None or window >= longest

    def places(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return the sequence and the position of each token of the block, and of each key."""
        assert self.query_sequence is not None and self.query_position is not None
        assert self.key_sequence is not None and self.key_position is not None
        return (self.query_sequence, self.query_position), (self.key_sequence, self.key_position)

    def block_mask(self, window: int | None) -> Tensor:
        """Return ``[block tokens, keys]``, true at the keys that a token attends to."""
        if window not in self.masks:
            (sequence, position), (key_sequence, key_position) = self.places()
            mask = sequence[:, None] == key_sequence[None]
            if self.query_prefix is not None:
                mask |= self.query_prefix[:, None] == key_sequence[None]
            mask &= position[:, None] >= key_position[None]
            if window is not None:
                mask &= position[:, None] - window < key_position[None]
            self.masks[window] = mask
        return self.masks[window]


def whole_sequences(lengths: Sequence[int], device: torch.device, *,
                    prefixes: PackedPrefixes | None = None,
                    one_mask: bool = False) -> AttentionMetadata:
    """
    Return the metadata of whole sequences packed one after the other, without KV cache.

    ``prefixes`` come before them. With ``one_mask``, all sequences attend in one call behind a
    mask on a CPU as well.
    """
    def of_each_token(values: Sequence[int]) -> np.ndarray:
        return np.repeat(np.array(values, dtype=np.int64), lengths)

    sequence = of_each_token(range(len(lengths)))
    position = np.concatenate([np.arange(n) for n in lengths])
    # On other devices one kernel with a mask is faster than one kernel per sequence.
    separate = len(lengths) == 1 or (device.type == 'cpu' and not one_mask)
    metadata = AttentionMetadata(
        query_sequence=to_device(sequence, device), query_position=to_device(position, device),
        lengths=tuple(lengths) if separate else ())
    metadata.key_sequence, metadata.key_position = (
        metadata.query_sequence, metadata.query_position)
    if prefixes is not None:
        metadata.prefixes = prefixes
        metadata.query_prefix = to_device(of_each_token(
            [-1 - p if p >= 0 else i for i, p in enumerate(prefixes.of_sequence)]), device)
        position = position + of_each_token(
            [prefixes.lengths[p] if p >= 0 else 0 for p in prefixes.of_sequence])
        metadata.query_position = to_device(position, device)
        metadata.key_sequence = to_device(np.concatenate([
            *(np.full(n, -1 - p) for p, n in enumerate(prefixes.lengths)), sequence]), device)
        metadata.key_position = to_device(np.concatenate([
            *(np.arange(n) for n in prefixes.lengths), position]), device)
    return metadata


@dataclass(frozen=True)
class ScoreArguments:
    """How the attention layers of a model compute their weights; as in packed_attention()."""

    scaling: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    @property
    def changes_scores(self) -> bool:
        """Whether there is a softcap or sinks."""
        return self.softcap is not None or self.sinks is not None


class ForwardContext:
    """State that the attention layers of one model share: KV cache and current metadata."""

    def __init__(self) -> None:
        self.metadata = AttentionMetadata()
        self.kv_cache: KVCache | None = None
        self.paged: PagedAttention | None = None    # None: decode rows gather their keys
        # Whether chunks attend by a kernel where scores have a softcap or sinks.
        self.block_kernel = False
        # Cosines and sines by which the layer has yet to rotate its queries and keys.
        self.rotation: tuple[Tensor, Tensor, Pairing] | None = None
        # While set, each layer adds its KV shape; the cache is allocated from these shapes.
        self.kv_shapes: dict[int, tuple[int, int, int]] | None = None
        # Found meanwhile: how each layer's own code calls packed_attention().
        self.score_arguments: dict[int, ScoreArguments] = {}
        # Names of arguments that layers passed meanwhile and packed_attention() does not support.
        self.unsupported: set[str] = set()

    @property
    def changes_scores(self) -> bool:
        """Whether a layer has a softcap or sinks."""
        return any(each.changes_scores for each in self.score_arguments.values())


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: Tensor | None = None, *, scaling: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, is_causal: bool | None = None, **others: Any,
) -> tuple[Tensor, None]:
    """
    Attend within each sequence of a packed pass; transformers calls this function.

    ``query``, ``key`` and ``value`` are ``[1, heads, tokens, head size]``. ``s_aux`` holds
    one logit per head that takes part in the softmax without a value (an attention sink).
    Returns ``[1, tokens, heads, value size]``.
    """
    context: ForwardContext = module.mace_attention  # type: ignore[assignment]
    layer: int = module.layer_idx  # type: ignore[assignment]
    metadata = context.metadata
    if context.kv_shapes is not None:
        context.kv_shapes[layer] = (key.shape[1], key.shape[3], value.shape[3])
        others |= {'attention_mask': attention_mask, 'bidirectional': is_causal is False}
        given = {k for k, v in others.items() if v is not None and v is not False}
        context.unsupported |= given - _REDUNDANT
        context.score_arguments[layer] = ScoreArguments(scaling, sliding_window, softcap, s_aux)
    parts = []
    if metadata.write_slots is not None:
        assert context.kv_cache is not None
        keys, values = context.kv_cache.keys[layer], context.kv_cache.values[layer]
        if context.rotation is not None:
            (cos, sin, pairing), context.rotation = context.rotation, None
            # In latent attention, the part of a head that is rotated comes last.
            rotate_and_write(query, key, value, cos, sin, keys, values, metadata.write_slots,
                             pairing=pairing, first=getattr(module, 'qk_nope_head_dim', 0))
        else:
            keys.index_copy_(0, metadata.write_slots, key[0].transpose(0, 1))
            values.index_copy_(0, metadata.write_slots, value[0].transpose(0, 1))
        if metadata.decode_tables is not None:
            assert context.paged is not None and metadata.decode_lengths is not None
            rows = query[0, :, :metadata.decode_tables.shape[0]].transpose(0, 1)
            parts.append(context.paged.attend(
                rows, keys, values, metadata.decode_tables, metadata.decode_lengths,
                scaling=scaling, window=sliding_window, softcap=softcap, sinks=s_aux))
        if metadata.decode_rows:
            parts.append(_attend_decode_rows(
                query[0].transpose(0, 1), keys, values, metadata,
                ScoreArguments(scaling, sliding_window, softcap, s_aux)))
    if metadata.query_sequence is not None:
        first = query.shape[2] - metadata.query_sequence.shape[0]
        q = query[:, :, first:]
        for window in metadata.observation_windows:
            # A layer with a shorter window does not see dropped tokens in any case.
            if sliding_window is None or sliding_window >= window.target.shape[0]:
                k = key[:, :, first:] if metadata.key_slots is None else cached(keys, metadata)
                window.accumulate(q, k, scaling, softcap, s_aux)
        if (context.block_kernel and (softcap is not None or s_aux is not None)
                and metadata.key_slots is not None):
            parts.append(attend_block(
                q[0], keys, values, metadata.key_slots, *metadata.places(), scaling=scaling,
                window=sliding_window, softcap=softcap, sinks=s_aux))
        else:
            if metadata.key_slots is None:
                k, v = key[:, :, first:], value[:, :, first:]
                if metadata.past is not None:
                    k, v = metadata.past.extend(k, v)
            else:
                k, v = cached(keys, metadata), cached(values, metadata)
            outs = _attend_block(
                q, k, v, metadata, layer, scaling, sliding_window, softcap, s_aux)
            parts += [out[0].transpose(0, 1) for out in outs]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def cached(values: Tensor, metadata: AttentionMetadata) -> Tensor:
    """Return the keys or values of the block's slots of the cache, ``[1, heads, keys, size]``."""
    assert metadata.key_slots is not None
    return values.index_select(0, metadata.key_slots).transpose(0, 1)[None]


def _attend_block(query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata,
                  layer: int, scaling: float | None, window: int | None, softcap: float | None,
                  sinks: Tensor | None) -> list[Tensor]:
    """Attend for the block; returns ``[1, heads, tokens, value size]`` for each call."""
    prefixes = metadata.prefixes
    if not metadata.attends_without_mask(window):
        if prefixes is not None:
            key = torch.cat([prefixes.keys[layer], key], 2)
            value = torch.cat([prefixes.values[layer], value], 2)
        return [attend(query, key, value, metadata.block_mask(window), scaling, softcap, sinks)]
    lengths = metadata.lengths if metadata.past is None else (key.shape[2],)
    keys, values = key.split(lengths, 2), value.split(lengths, 2)
    if prefixes is not None:
        keys = prefixes.before_each(prefixes.keys[layer], keys)
        values = prefixes.before_each(prefixes.values[layer], values)
    return [attend(q, k, v, None, scaling, softcap, sinks)
            for q, k, v in zip(query.split(metadata.lengths, 2), keys, values, strict=True)]


def gathered_together(lengths: Sequence[int]) -> list[slice]:
    """Divide decode rows, the shortest first, into those that copy their keys at once."""
    starts = [0]
    for row, length in enumerate(lengths):
        if row > starts[-1] and (row + 1 - starts[-1]) * length > GATHERED_KEYS:
            starts.append(row)
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(lengths)], strict=True)]


def _attend_decode_rows(query: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata,
                        scores: ScoreArguments) -> Tensor:
    """
    Attend with ``metadata.decode_rows``, the first rows of ``query``, ``[tokens, heads, size]``.

    ``keys`` and ``values`` are the cache, ``[cache slots, KV heads, size]``. Returns ``[decode
    rows, heads, value size]``.
    """
    parts, first = [], 0
    for gathered in metadata.decode_rows:
        end = first + gathered.slots.shape[0]
        parts.append(attend_gathered(query[first:end], keys, values, gathered, scores.scaling,
                                     scores.window, scores.softcap, scores.sinks))
        first = end
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend_gathered(query: Tensor, keys: Tensor, values: Tensor, gathered: GatheredRows,
                    scaling: float | None, window: int | None, softcap: float | None,
                    sinks: Tensor | None) -> Tensor:
    """
    Attend for decode rows over a copy of their keys.

    ``query`` is ``[rows, heads, size]``; ``keys`` and ``values`` are the cache,
    ``[cache slots, KV heads, size]``. Returns ``[rows, heads, value size]``.
    """
    rows, longest = gathered.slots.shape
    kv_heads, size = keys.shape[1], query.shape[2]
    # The query heads that share a KV head take the place of query tokens: no KV is repeated.
    q = query.reshape(rows, kv_heads, -1, size)
    if gathered.run is not None:
        k, v = keys[gathered.run], values[gathered.run]
    else:
        slots = gathered.slots.view(-1)
        k, v = keys.index_select(0, slots), values.index_select(0, slots)
    k, v = (x.view(rows, longest, kv_heads, -1).transpose(1, 2) for x in (k, v))
    if (gathered.run is not None and (window is None or window >= longest)
            and softcap is None and sinks is None and q.shape[2] < TILED_QUERIES):
        out = _attend_fused(q, k, v, scale=scaling)
    else:
        out = attend(q, k, v, gathered.mask(window), scaling, softcap, sinks)
    return out.reshape(rows, query.shape[1], -1)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
           scaling: float | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """
    Scaled dot-product attention with softcap and sinks; shapes as in PyTorch's SDPA.

    Without a ``mask``, attention is causal and the queries are the sequence's last tokens.
    """
    grouped = query.shape[1] != key.shape[1]
    tokens, keys = query.shape[2], key.shape[2]
    if softcap is None and sinks is None:
        if cpu_attention.is_faster(query):
            return cpu_attention.attend_causally(query, key, value, scaling, mask)
        if mask is None and 1 < tokens < keys:    # SDPA would align them with the first keys
            mask = cpu_attention.causal_mask(tokens, keys, query.device)
        if grouped and mask is not None and query.device.type != 'cpu':
            return attend_folded(query, key, value, mask, scaling)
        if (tokens >= TILED_QUERIES and query.device.type == 'cpu'
                and query.dtype == torch.bfloat16):
            query, key, value, mask = _pad_shapes(query, key, value, mask)
        out = _attend_fused(
            query, key, value, attn_mask=mask, is_causal=mask is None and tokens > 1,
            scale=scaling, enable_gqa=grouped)
        return out[:, :, :tokens]
    return _attend_plainly(query, key, value, mask, scaling, softcap, sinks)


def _attend_fused(query: Tensor, key: Tensor, value: Tensor, **others: Any) -> Tensor:
    """Call SDPA; a CPU's fused kernel takes values of the same size as keys only."""
    size = value.shape[3]
    if query.device.type == 'cpu' and size < key.shape[3]:
        value = F.pad(value, (0, key.shape[3] - size))
    return F.scaled_dot_product_attention(query, key, value, **others)[..., :size]


def _attend_plainly(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
                    scaling: float | None, softcap: float | None,
                    sinks: Tensor | None) -> Tensor:
    """Attend as :func:`attend` does, by products and a softmax."""
    rows, heads, tokens, size = query.shape
    kv_heads, keys = key.shape[1:3]
    scale = size ** -0.5 if scaling is None else scaling
    # The query heads that share a KV head are rows of one product: no KV is repeated.
    folded = query.reshape(rows, kv_heads, -1, size)
    scores = (folded @ key.transpose(2, 3) * scale).view(rows, heads, tokens, keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = cpu_attention.causal_mask(tokens, keys, query.device)
    scores = scores.masked_fill(~mask, float('-inf'))
    if sinks is not None:
        # Heads in order: [heads, 1], or in a decode row [KV heads, heads of each].
        column = sinks.to(scores.dtype).view(1, scores.shape[1], -1, 1)
        scores = torch.cat([scores, column.expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., :keys].to(query.dtype)
    return (weights.reshape(rows, kv_heads, -1, keys) @ value).view(rows, heads, tokens, -1)


def attend_folded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor,
                   scaling: float | None) -> Tensor:
    """
    Attend behind ``mask``, ``[tokens, keys]``, with fewer KV heads than query heads.

    CUDA's flash kernel takes no mask, and its memory-efficient one no fewer KV heads: both at
    once would run as plain products in fp32. The query heads that share a KV head therefore take
    the place of query tokens.
    """
    _, heads, tokens, size = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    folded = query.reshape(1, kv_heads, groups * tokens, size)
    out = F.scaled_dot_product_attention(
        folded, key, value, attn_mask=mask.repeat(groups, 1), scale=scaling)
    return out.reshape(1, heads, tokens, -1)


def _pad_shapes(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """
    Append queries and keys, to which no real query attends, up to a common shape.

    On a CPU that multiplies bfloat16 in tiles (AMX), PyTorch 2.13 compiles a kernel for each
    shape, that is for each length of a prompt and its context, and never frees it.
    """
    queries, keys = (-x.shape[2] % SHAPE_MULTIPLE for x in (query, key))
    if mask is not None:
        mask = F.pad(mask, (0, keys, 0, queries))
        # A padding query needs a key, or its softmax would be NaN.
        mask[..., mask.shape[-2] - queries:, 0] = True
    return (F.pad(query, (0, 0, 0, queries)), F.pad(key, (0, 0, 0, keys)),
            F.pad(value, (0, 0, 0, keys)), mask)


AttentionInterface.register(NAME, packed_attention)
