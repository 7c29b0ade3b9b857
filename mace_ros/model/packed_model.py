# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The hybrid forward: decode rows, prefill chunks and fine-tune tokens in one pass.

The pass runs transformers' own model code over one row of packed tokens (``[1, tokens]`` with
explicit positions). Shared state tells the attention layers which sequence each token belongs
to, and the linear layers which adapter it uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn, Tensor
from transformers import PreTrainedModel

from mace_ros.model.architectures import context_length, decoder_layers, longest_window
from mace_ros.model.attention import (
    AttentionMetadata,
    ForwardContext,
    gathered_together,
    GatheredRows,
    NAME,
    whole_sequences,
)
from mace_ros.model.cpu_matmul import PrepackedWeight
from mace_ros.model.graphs import FastPasses, FusedPart, LayerGraphs
from mace_ros.model.int4 import Int4Weight
from mace_ros.model.kv_cache import KVCache
from mace_ros.model.lora_linear import replace_head, replace_linears
from mace_ros.model.lora_mapping import InputObserver, LoRAMapping
from mace_ros.model.model_shell import hidden_of, ModelShell
from mace_ros.model.observation_window import ObservationWindow
from mace_ros.model.spans import (
    BLOCK_TOKENS,
    cache_slots,
    is_decode,
    OBSERVATION_TOKENS,
    PiggybackSpans,
    Span,
)
from mace_ros.model.upload import to_device


class PackedModel:
    """
    A causal language model of transformers that computes packed passes.

    Create it by :func:`mace_ros.model.packing.pack`, which checks that it computes the model's
    own logits and allocates the KV cache.
    """

    block_tokens = BLOCK_TOKENS

    def __init__(self, model: PreTrainedModel) -> None:
        """Convert ``model`` in place; there is no KV cache yet."""
        self.model = model.eval().requires_grad_(False)
        self.device = model.device
        self.dtype = model.dtype
        self.layers = decoder_layers(model)
        self.context_length = context_length(model)
        self.window = longest_window(model, self.context_length)
        self.lora_mapping = LoRAMapping()
        self.context = ForwardContext()
        self.fast_passes: FastPasses | None = None
        # The best token of each row of the last pass's logits, if its graph has found it; valid
        # until the next pass.
        self.best_tokens: Tensor | None = None
        self.fused_parts: list[FusedPart] = []      # in use
        self.graphed_layers: list[LayerGraphs] = []     # for training, the shortest first
        inside = set(map(id, self.layers.modules()))
        outside = [m for m in model.modules() if id(m) not in inside]
        self.linears = replace_linears(model, outside, self.lora_mapping)
        self.head = replace_head(model, model.get_output_embeddings(), self.lora_mapping)
        model.set_attn_implementation(NAME)
        for module in model.modules():
            if hasattr(module, 'layer_idx'):
                module.mace_attention = self.context
        self.shell = ModelShell(model, self.layers)
        self.kv_blocks = 0
        self.scratch_block = 0      # KV block of padding tokens

    @property
    def weight_dtype(self) -> str:
        """The precision of the linear layers' weights: a value of ``model.weight_dtype``."""
        first = self.linears[0]
        if isinstance(first.stored, Int4Weight):
            return 'int4'
        return 'int8' if first.int8 is not None else str(self.dtype).removeprefix('torch.')

    # -- KV cache --------------------------------------------------------------------

    @property
    def kv_cache(self) -> KVCache:
        """The tensors of the KV cache."""
        assert self.context.kv_cache is not None
        return self.context.kv_cache

    def allocate_kv_cache(self, shapes: Sequence[tuple[int, int, int]], blocks: int) -> None:
        """Allocate ``blocks`` KV blocks and a scratch block; ``shapes`` as in KVCache."""
        self.context.kv_cache = KVCache(
            shapes, (blocks + 1) * BLOCK_TOKENS, self.dtype, self.device)
        self.kv_blocks = self.scratch_block = blocks

    def cache_slots(self, blocks: Sequence[int], tokens: int) -> Tensor:
        """Return the cache slots of the first ``tokens`` tokens of a block table, ``[tokens]``."""
        return to_device(cache_slots(blocks, tokens), self.device)

    def move_blocks(self, moved: Mapping[int, int]) -> None:
        """Copy the content of KV blocks; ``moved`` maps old to new block numbers."""
        old, new = (self.cache_slots(list(x), len(moved) * BLOCK_TOKENS)
                    for x in (moved.keys(), moved.values()))
        self.kv_cache.move(old, new)

    def drop_blocks(self, first: int) -> None:
        """Free the memory of this KV block and all blocks after it, where possible."""
        self.kv_cache.drop_from(first * BLOCK_TOKENS)

    # -- passes ----------------------------------------------------------------------

    @torch.no_grad()
    def run(self, spans: Sequence[Span], piggyback: PiggybackSpans | None = None) -> Tensor:
        """
        Compute one packed pass.

        Returns the fp32 logits ``[spans that want them, vocabulary]`` in the order of ``spans``;
        they are valid until the next pass. The layer inputs of the fine-tune tokens are stored
        in the buffers of ``piggyback``.
        """
        self.best_tokens = None
        if self.fast_passes is not None and not is_pooled(spans):
            logits = self.fast_passes.run(spans, piggyback)
            if logits is not None:
                self.best_tokens = self.fast_passes.best_tokens
                return logits
        return self.run_plainly(spans, piggyback)

    @torch.no_grad()
    def run_plainly(self, spans: Sequence[Span],
                    piggyback: PiggybackSpans | None = None) -> Tensor:
        """Compute a pass as :meth:`run` does, by the model's own code."""
        # Rows of similar length attend together, where each copies its keys.
        decode = sorted((s for s in spans if is_decode(s)), key=lambda s: s.cache_position)
        order = decode + [s for s in spans if not is_decode(s)]
        packed = order + (list(piggyback.spans) if piggyback else [])
        ids: list[int] = []
        positions: list[int] = []
        last = {}     # row of the last token of each span, by the span's id
        for span in packed:
            ids.extend(span.tokens)
            positions.extend(range(span.position, span.position + len(span.tokens)))
            if span.wants_logits:
                last[id(span)] = len(ids) - 1
        slots = [slot for span in packed for slot in span.adapter_slots]
        with self._pooling(packed) if is_pooled(spans) else nullcontext():
            return self.forward_packed(
                self._attention_metadata(decode, packed[len(decode):]), self.tensor(ids),
                self.tensor(positions),
                slots[0] if len(set(slots)) == 1 else self.tensor(slots),
                self.tensor([last[id(s)] for s in spans if s.wants_logits]),
                piggyback.hidden if piggyback else ())

    def forward_packed(self, metadata: AttentionMetadata, ids: Tensor, positions: Tensor,
                       slots: int | Tensor, keep: Tensor, hidden: Sequence[Tensor]) -> Tensor:
        """
        Run the model over packed tokens; return the fp32 logits of the rows ``keep``.

        ``ids``, ``positions`` and ``slots`` (or one adapter slot for all tokens) are
        ``[tokens]``. Each layer's input and the last layer's output, for the last tokens of the
        pass, are copied to ``hidden``: ``[some tokens, width]`` each, or no buffers.
        """
        self.context.metadata = metadata
        if isinstance(slots, int):
            self.lora_mapping.slot = slots
        else:
            self.lora_mapping.mix(slots, self.dtype)
        try:
            with self._saving(hidden):
                output = self.model(input_ids=ids[None], position_ids=positions[None],
                                    use_cache=False, logits_to_keep=keep)
        finally:
            self.clear()
        logits: Tensor = output.logits[0].float()
        return logits

    @contextmanager
    def training(self, metadata: AttentionMetadata,
                 observer: InputObserver | None = None) -> Iterator[None]:
        """
        While open, layers run on the sequences of ``metadata`` under the training slot.

        ``observer`` receives the inputs of the adapted linear layers.
        """
        self.context.metadata = metadata
        self.lora_mapping.training, self.lora_mapping.observer = True, observer
        try:
            yield
        finally:
            self.lora_mapping.training, self.lora_mapping.observer = False, None
            self.clear()

    def clear(self) -> None:
        """Drop the tensors that a pass left in the shared state."""
        self.context.metadata, self.context.rotation = AttentionMetadata(), None
        self.lora_mapping.clear()
        for layer in self.linears:
            layer.clear()

    def round_to_int8(self) -> None:
        """Round the weights of all linear layers in place to 8 bits."""
        for layer in [*self.linears, *self.head]:
            layer.round_to_int8()

    def use_int4(self, weights: Mapping[str, Int4Weight]) -> None:
        """
        Use 4-bit weights by the names of merged layers.

        On a CPU the other layers are rounded to 8 bits; elsewhere there is no product for these.
        """
        for layer in [*self.linears, *self.head]:
            if layer.name in weights:
                layer.store(weights[layer.name])
            elif self.device.type == 'cpu':
                layer.round_to_int8()

    def prepack(self) -> None:
        """Store the weights that are dense in the order in which a CPU multiplies them."""
        for layer in [*self.linears, *self.head]:
            if layer.stored is None:
                layer.store(PrepackedWeight(layer.weight))

    @property
    def weights_nbytes(self) -> int:
        """Memory of the linear layers and the head, without adapters, in bytes."""
        return sum(layer.weight_nbytes for layer in (*self.linears, *self.head))

    @property
    def workspace_nbytes(self) -> int:
        """The most that a product with a stored weight takes while it runs, in bytes."""
        return max((layer.stored.workspace_nbytes(self.dtype) for layer in self.linears
                    if layer.stored is not None), default=0)

    def synchronize(self) -> None:
        """Wait until the device has finished all submitted work."""
        if self.device.type == 'cuda':
            torch.cuda.synchronize()

    def tensor(self, values: Any) -> Tensor:
        """Return integers as a tensor on the device."""
        return to_device(np.array(values, dtype=np.int64), self.device)

    # -- building the metadata -------------------------------------------------------

    def _attention_metadata(self, decode: Sequence[Span],
                            chunks: Sequence[Span]) -> AttentionMetadata:
        """
        Return the metadata of a pass.

        ``decode`` are its decode rows, the shortest context first, and ``chunks`` the other spans.
        """
        metadata, write = AttentionMetadata(), []
        if decode:
            add = self._add_decode_rows if self.context.paged is None else self._add_decode_tables
            write += add(metadata, decode)
        if chunks:
            write += self._add_block(metadata, chunks)
        metadata.write_slots = self._joined(write)
        return metadata

    def _add_decode_rows(self, metadata: AttentionMetadata,
                         decode: Sequence[Span]) -> list[np.ndarray]:
        """Add the cache slots of decode rows to the metadata; return those that they write."""
        write, gathered = [], []
        for rows in gathered_together([s.cache_position + 1 for s in decode]):
            lengths = [s.cache_position + 1 for s in decode[rows]]
            slots = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
            for row, span, length in zip(slots, decode[rows], lengths, strict=True):
                # Masked slots must be the row's own: 0 * NaN of another sequence would be NaN.
                row[:] = span.blocks[0] * BLOCK_TOKENS
                row[:length] = cache_slots(span.blocks, length)
                write.append(row[length - 1:length])
            run = None
            if len(slots) == 1 and (np.diff(slots[0]) == 1).all():
                run = slice(int(slots[0, 0]), int(slots[0, -1]) + 1)
            gathered.append(
                GatheredRows(to_device(slots, self.device), self.tensor(lengths), run))
        metadata.decode_rows = gathered
        return write

    def _add_decode_tables(self, metadata: AttentionMetadata,
                           decode: Sequence[Span]) -> list[np.ndarray]:
        """Add the block tables of decode rows to the metadata; return the slots they write."""
        used = [s.blocks[:s.cache_position // BLOCK_TOKENS + 1] for s in decode]
        tables = np.zeros((len(decode), max(map(len, used))), dtype=np.int64)
        for row, blocks in zip(tables, used, strict=True):
            row[:len(blocks)] = blocks
        metadata.decode_tables = to_device(tables, self.device)
        metadata.decode_lengths = self.tensor([s.cache_position + 1 for s in decode])
        return [np.array([blocks[-1] * BLOCK_TOKENS + s.cache_position % BLOCK_TOKENS])
                for s, blocks in zip(decode, used, strict=True)]

    def _add_block(self, metadata: AttentionMetadata,
                   chunks: Sequence[Span]) -> list[np.ndarray]:
        """Add the block of ``chunks`` to the metadata; return the slots that it writes."""
        slots = [s.slots() for s in chunks]
        first = [s.cache_position for s in chunks]
        write = [x[n:] for x, n in zip(slots, first, strict=True)]
        metadata.observation_windows = list(_observation_windows(chunks))
        if not any(first):
            block = whole_sequences([len(s.tokens) for s in chunks], self.device)
            metadata.query_sequence = block.query_sequence
            metadata.query_position = block.query_position
            metadata.key_sequence, metadata.key_position = block.key_sequence, block.key_position
            metadata.lengths = block.lengths
            return write
        positions = [np.arange(len(x)) for x in slots]
        sequences = [np.full(len(x), i) for i, x in enumerate(slots)]
        metadata.key_slots, metadata.key_sequence, metadata.key_position = map(
            self._joined, (slots, sequences, positions))
        metadata.query_sequence, metadata.query_position = (
            self._joined([x[n:] for x, n in zip(y, first, strict=True)])
            for y in (sequences, positions))
        return write

    def _joined(self, arrays: Sequence[np.ndarray]) -> Tensor:
        return to_device(np.concatenate(arrays), self.device)

    @contextmanager
    def _pooling(self, packed: Sequence[Span]) -> Iterator[None]:
        """While open, add up the last hidden states of the spans that ask for it."""
        def pool(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            rows = output[0][0].split([len(span.tokens) for span in packed])
            for span, states in zip(packed, rows, strict=True):
                if span.pooled is not None:
                    span.pooled.add_(states.float().sum(0))

        # The model below the head, whose output has passed the final norm.
        hook = self.model.base_model.register_forward_hook(pool)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def _saving(self, hidden: Sequence[Tensor]) -> Iterator[None]:
        """While open, copy each layer's input and the last output of the last tokens."""
        if not hidden:
            yield
            return
        count = hidden[0].shape[0]

        # A hook must return None: any other value would replace the layer's input or output.
        def save_input(target: Tensor, _: nn.Module, args: tuple[Any, ...]) -> None:
            target.copy_(args[0][0, -count:])

        def save_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            hidden[-1].copy_(hidden_of(output)[0, -count:])

        hooks = [layer.register_forward_pre_hook(partial(save_input, target))
                 for layer, target in zip(self.layers, hidden, strict=False)]
        hooks.append(self.layers[-1].register_forward_hook(save_output))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def is_pooled(spans: Sequence[Span]) -> bool:
    """Return whether the hidden states of a span are summed."""
    return any(span.pooled is not None for span in spans)


def _observation_windows(chunks: Sequence[Span]) -> Iterator[ObservationWindow]:
    """Yield the observation windows of the spans with ``attention``, as slices of the block."""
    queries = keys = 0
    for span in chunks:
        tokens, first = len(span.tokens), span.cache_position
        if span.attention is not None:
            skipped = max(span.attention.shape[0] - OBSERVATION_TOKENS - first, 0)
            if skipped < tokens:
                yield ObservationWindow(slice(queries + skipped, queries + tokens),
                                        slice(keys, keys + first + tokens), span.attention)
        queries, keys = queries + tokens, keys + first + tokens
