# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The hybrid forward: decode rows, prefill chunks and fine-tune tokens in one pass.

The pass runs transformers' own model code over one packed row of tokens
(``[1, tokens]``, explicit positions); attention and linears are told by shared state
which sequence and which adapter each token belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
import math
from typing import Any

import numpy as np
import torch
from torch import nn, Tensor
from transformers import PreTrainedModel

from mace_ros.model import self_check
from mace_ros.model.architectures import (
    check_supported,
    context_length,
    decoder_layers,
    longest_window,
    UnsupportedModel,
)
from mace_ros.model.attention import (
    AttentionMetadata,
    ForwardContext,
    KVCache,
    NAME,
    Observed,
    whole_sequences,
)
from mace_ros.model.cuda_graph_runner import CudaGraphRunner
from mace_ros.model.graphed_layers import GraphedLayers
from mace_ros.model.lora import LoRAMapping, replace_head, replace_linears
from mace_ros.model.model_shell import hidden_of, ModelShell
from mace_ros.model.spans import (
    BLOCK_TOKENS,
    cache_slots,
    FinetuneRows,
    is_decode_row,
    OBSERVED_TOKENS,
    Span,
)


class PackedModel:
    """A causal language model of transformers, made to run packed rows."""

    def __init__(self, model: PreTrainedModel, *, kv_tokens: int, kv_bytes: float = math.inf,
                 int8: bool = False) -> None:
        """
        Convert ``model`` in place; ``int8`` rounds its linear layers' weights to 8 bits.

        The KV cache holds ``kv_tokens``, or what fits into ``kv_bytes``.

        Raises :class:`UnsupportedModel`, also if the packed pass or the fine-tune layers
        do not compute what the model's own forward computes on a few random tokens.
        """
        check_supported(model)
        self.model = model.eval().requires_grad_(False)
        self.device = model.device
        self.dtype = model.dtype
        self.layers = decoder_layers(model)
        self.context_length = context_length(model)
        self.window = longest_window(model, self.context_length)
        self.adapters = LoRAMapping()
        self.attention = ForwardContext()
        self.static = CudaGraphRunner(self)
        self.graphed_layers: list[GraphedLayers] = []     # for training, the shortest first
        with self_check.short_windows(model, self.context_length):
            ids = self_check.check_tokens(model, self.context_length)
            reference = self_check.own_logits(model, ids)
            inside = set(map(id, self.layers.modules()))
            outside = [m for m in model.modules() if id(m) not in inside]
            self.groups = replace_linears(model, outside, self.adapters)
            head = replace_head(model, model.get_output_embeddings(), self.adapters)
            model.set_attn_implementation(NAME)
            for module in model.modules():
                if hasattr(module, 'layer_idx'):
                    module.mace_attention = self.attention
            self.skeleton = ModelShell(model, self.layers)
            with self_check.failing_by_name(model.config.model_type):
                shapes = self._kv_shapes()
            self.attention.cache = KVCache(shapes, 2 * BLOCK_TOKENS, self.dtype, self.device)
            self_check.compare(self, ids, reference)
        if int8:     # after the comparison, which is about the code and not about rounding
            for group in [*self.groups, *head]:
                group.round_to_int8()
        block_bytes = self.attention.cache.slot_bytes * BLOCK_TOKENS
        self.kv_blocks = int(min(-(-kv_tokens // BLOCK_TOKENS), max(kv_bytes // block_bytes, 1)))
        self.scratch_block = self.kv_blocks     # that of padding
        self.attention.cache = KVCache(
            shapes, (self.kv_blocks + 1) * BLOCK_TOKENS, self.dtype, self.device)

    block_tokens = BLOCK_TOKENS

    @torch.no_grad()
    def run(self, spans: Sequence[Span], finetune: FinetuneRows | None = None) -> Tensor:
        """
        Compute one packed pass.

        Returns the fp32 logits ``[spans that want them, vocabulary]`` in the order of
        ``spans``, valid until the next pass. The layer inputs of ``finetune``'s tokens are
        stored in its buffers.
        """
        if self.static:
            static = self.static.run(spans, finetune)
            if static is not None:
                return static
        decode = [s for s in spans if is_decode_row(s)]
        order = decode + [s for s in spans if not is_decode_row(s)]
        packed = order + (list(finetune.spans) if finetune else [])
        ids: list[int] = []
        positions: list[int] = []
        keep = {}
        for span in packed:
            ids.extend(span.tokens)
            positions.extend(range(span.position, span.position + len(span.tokens)))
            if span.wants_logits:
                keep[id(span)] = len(ids) - 1
        used = {s.slot for s in packed}
        slots = used.pop() if len(used) == 1 else self.tensor(
            [s.slot for s in packed for _ in s.tokens])
        return self.forward_row(
            self._row(decode, packed[len(decode):]), self.tensor(ids), self.tensor(positions),
            slots, self.tensor([keep[id(s)] for s in spans if s.wants_logits]),
            finetune.hidden if finetune else ())

    def forward_row(self, row: AttentionMetadata, ids: Tensor, positions: Tensor,
                    slots: int | Tensor, keep: Tensor, saved: Sequence[Tensor]) -> Tensor:
        """
        Run the model over one row; returns the fp32 logits of the rows ``keep``.

        ``ids``, ``positions`` and ``slots`` (or one adapter slot for all) are ``[tokens]``.
        ``saved`` takes, for the last tokens of the row, each layer's input and the last
        layer's output: ``[some tokens, width]`` each.
        """
        self.attention.row = row
        if isinstance(slots, int):
            self.adapters.slot = slots
        else:
            every = torch.arange(self.adapters.slots, device=slots.device)
            self.adapters.choice = (slots[:, None] == every).to(self.dtype)
        try:
            with self._saving(saved):
                output = self.model(input_ids=ids[None], position_ids=positions[None],
                                    use_cache=False, logits_to_keep=keep)
        finally:
            self._forget()
        logits: Tensor = output.logits[0].float()
        return logits

    def move_blocks(self, moved: Mapping[int, int]) -> None:
        """Copy KV blocks to where they lie from now on, by their old numbers."""
        assert self.attention.cache is not None
        old, new = (torch.from_numpy(cache_slots(list(x), len(moved) * BLOCK_TOKENS)).to(
            self.device) for x in (moved.keys(), moved.values()))
        self.attention.cache.move(old, new)

    def drop_blocks(self, first: int) -> None:
        """Give the memory of this KV block and those behind it back, where that can be."""
        assert self.attention.cache is not None
        self.attention.cache.drop_from(first * BLOCK_TOKENS)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given, so that its time can be told."""
        if self.device.type == 'cuda':
            torch.cuda.synchronize()

    def tensor(self, values: Any) -> Tensor:
        """Return integers as a tensor on the device."""
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def _row(self, decode: Sequence[Span], chunks: Sequence[Span]) -> AttentionMetadata:
        """Say where each token's keys and values are written and which ones it sees."""
        row, write = AttentionMetadata(), []
        if decode:
            longest = max(s.place for s in decode) + 1
            slots = np.zeros((len(decode), longest), dtype=np.int64)
            for i, span in enumerate(decode):
                # Masked places are its own, too: 0 * NaN of another sequence would be NaN.
                slots[i] = span.blocks[0] * BLOCK_TOKENS
                slots[i, :span.place + 1] = cache_slots(span.blocks, span.place + 1)
                write.append(slots[i, span.place:span.place + 1])
            row.decode_slots = torch.from_numpy(slots).to(self.device)
            row.decode_lengths = self.tensor([s.place + 1 for s in decode])
        if chunks:
            self._add_block(row, chunks, write)
        row.write_slots = torch.from_numpy(np.concatenate(write)).to(self.device)
        return row

    def _add_block(self, row: AttentionMetadata, chunks: Sequence[Span],
                   write: list[np.ndarray]) -> None:
        """Say what the tokens of ``chunks`` see, and append where they are written."""
        slots = [s.slots() for s in chunks]
        write += [all_slots[s.place:] for s, all_slots in zip(chunks, slots, strict=True)]
        row.observed = list(_observed(chunks))
        fresh = all(s.place == 0 for s in chunks)
        if fresh:
            block = whole_sequences([len(s.tokens) for s in chunks], self.device)
            row.query_sequence, row.query_position = block.query_sequence, block.query_position
            row.key_sequence, row.key_position = block.key_sequence, block.key_position
            row.lengths = block.lengths
            return
        places = [np.arange(len(x)) for x in slots]
        owners = [np.full(len(x), i) for i, x in enumerate(slots)]
        first = [s.place for s in chunks]
        row.key_slots, row.key_sequence, row.key_position = (
            self._joined(x) for x in (slots, owners, places))
        row.query_sequence, row.query_position = (
            self._joined([x[n:] for x, n in zip(y, first, strict=True)]) for y in (owners, places))

    def _joined(self, arrays: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(self.device)

    @contextmanager
    def _saving(self, saved: Sequence[Tensor]) -> Iterator[None]:
        """While open, keep each layer's input, and the last output, of the row's last tokens."""
        if not saved:
            yield
            return
        count = saved[0].shape[0]

        # Hooks must return None: anything else would replace what the layer gets or gives.
        def save_input(target: Tensor, _: nn.Module, args: tuple[Any, ...]) -> None:
            target.copy_(args[0][0, -count:])

        def save_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            saved[-1].copy_(hidden_of(output)[0, -count:])

        hooks = [layer.register_forward_pre_hook(partial(save_input, target))
                 for layer, target in zip(self.layers, saved, strict=False)]
        hooks.append(self.layers[-1].register_forward_hook(save_output))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def training(self, row: AttentionMetadata) -> Iterator[None]:
        """While open, ``row`` (whole sequences) is computed under the master weights."""
        self.attention.row = row
        self.adapters.training = True
        try:
            yield
        finally:
            self.adapters.training = False
            self._forget()

    def _forget(self) -> None:
        """Let go of the tensors of a pass."""
        self.attention.row = AttentionMetadata()
        self.adapters.choice = None
        for group in self.groups:
            group.forget()

    def _kv_shapes(self) -> list[tuple[int, int, int]]:
        """Find each layer's KV heads and head sizes by running one token."""
        kind = self.model.config.model_type
        self.attention.shapes = {}
        self.attention.row = whole_sequences((1,), self.device)
        with torch.no_grad():
            self.model(input_ids=self.tensor([[0]]), position_ids=self.tensor([[0]]),
                       use_cache=False, logits_to_keep=self.tensor([]))
        shapes, self.attention.shapes = self.attention.shapes, None
        self._forget()
        if sorted(shapes) != list(range(len(self.layers))):
            raise UnsupportedModel(
                f'{kind}: only layers {sorted(shapes)} of '
                f'{len(self.layers)} use the attention interface with keys of their own')
        if self.attention.ignored:
            raise UnsupportedModel(
                f'{kind}: its attention needs {", ".join(sorted(self.attention.ignored))}, '
                'which the packed pass does not heed')
        return [shapes[i] for i in range(len(self.layers))]


def _observed(chunks: Sequence[Span]) -> Iterator[Observed]:
    """Yield where in the block the tokens lie whose attention is asked for."""
    queries = keys = 0
    for span in chunks:
        tokens = len(span.tokens)
        if span.attention is not None:
            skipped = max(span.attention.shape[0] - OBSERVED_TOKENS - span.place, 0)
            if skipped < tokens:
                yield Observed(slice(queries + skipped, queries + tokens),
                               slice(keys, keys + span.place + tokens), span.attention)
        queries, keys = queries + tokens, keys + span.place + tokens
