# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Hybrid passes of fixed shapes on fixed addresses, which a device graph can replay.

A pass of a small model is hundreds of kernels of a few microseconds: launched one by one
they take several times as long as the device needs. A graph launches them at once, but
for one shape and one set of addresses. So a pass is padded to the next bucket, and its
numbers are copied into one static buffer. Padding tokens see, and write to, a scratch
block of the KV cache that no sequence has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.model.attention import AttentionMetadata
from mace_ros.model.spans import FinetuneRows, Span

if TYPE_CHECKING:
    from mace_ros.model.packed_model import PackedModel

CHUNK_ENDS = 4    # chunks of a pass whose last token may want logits, beside the decode rows
_NOBODY = -1      # owner of padding tokens and keys


@dataclass(frozen=True)
class BatchDescriptor:
    """The shape that passes of at most this size are padded to."""

    decode: int     # decode rows
    blocks: int     # KV blocks of each decode row
    block: int      # tokens of prefill chunks, then fine-tune tokens
    keys: int       # keys that they may see
    saves: bool     # whether their layer inputs are kept, for fine-tune tokens

    @property
    def logits(self) -> int:
        """Tokens of which the head is computed."""
        return self.decode + (CHUNK_ENDS if self.block else 0)

    @staticmethod
    def of(spans: Sequence[Span], finetune: FinetuneRows | None) -> BatchDescriptor:
        """Return the smallest bucket that holds a pass."""
        riding = list(finetune.spans) if finetune else []
        decode = [s for s in spans if len(s.tokens) == 1]
        block = [s for s in spans if len(s.tokens) > 1] + riding
        tokens = sum(len(s.tokens) for s in block)
        longest = max((s.place + 1 for s in decode), default=0)
        size = rounded(tokens, 16, 2)
        keys = sum(s.place + len(s.tokens) for s in block)
        return BatchDescriptor(
            # Beside a block the rows are the smaller part: coarser steps, fewer graphs.
            decode=rounded(len(decode), *((4, 4) if block else (1, 2))),
            blocks=rounded(-(-longest // BLOCK_TOKENS), *((32, 4) if block else (8, 2))),
            # A padding token needs a key of padding, or its softmax would not be a number.
            block=size, keys=rounded(keys + (size > tokens), 256, 4), saves=bool(riding))


def rounded(n: int, least: int, factor: int) -> int:
    """Return the next of ``least``, ``least * factor``, ...; 0 stays 0."""
    size = least if n else 0
    while size < n:
        size *= factor
    return size


def buckets(max_rows: int, max_tokens: int, max_context: int) -> Iterator[BatchDescriptor]:
    """Yield the buckets of all passes within these limits, the most frequent first."""
    def sizes(least: int, factor: int, most: int) -> list[int]:
        found = [least]
        while found[-1] < most:
            found.append(found[-1] * factor)
        return found

    max_blocks = -(-max_context // BLOCK_TOKENS)
    for blocks in sizes(8, 2, max_blocks):
        for rows in sizes(1, 2, max_rows):
            yield BatchDescriptor(rows, blocks, 0, 0, False)
    for keys in sizes(256, 4, max_context + 1):
        for block in sizes(16, 2, max_tokens):
            if block > keys:
                continue
            yield BatchDescriptor(0, 0, block, keys, False)
            yield BatchDescriptor(0, 0, block, keys, True)
            for blocks in sizes(32, 4, max_blocks):
                for rows in sizes(4, 4, max_rows):
                    yield BatchDescriptor(rows, blocks, block, keys, False)
                    yield BatchDescriptor(rows, blocks, block, keys, True)


class Outputs:
    """What passes leave behind; one for all of them, since each overwrites the last one's."""

    def __init__(self, model: PackedModel, wanted: Sequence[BatchDescriptor]) -> None:
        """Reserve room for any of ``wanted``."""
        config = model.model.config.get_text_config()
        rows = max((b.logits for b in wanted), default=0)
        tokens = max((b.block for b in wanted if b.saves), default=0)
        self.logits = torch.zeros(rows, config.vocab_size, device=model.device)
        # Each layer's input, and the last one's output.
        self.saved = [torch.zeros(tokens, config.hidden_size, dtype=model.dtype,
                                  device=model.device) for _ in range(len(model.layers) + 1)]


class CapturedPass:
    """Passes of one bucket; computed eagerly until :meth:`capture` is called."""

    def __init__(self, model: PackedModel, bucket: BatchDescriptor, outputs: Outputs) -> None:
        """Reserve the inputs; ``outputs`` must have room for the bucket."""
        self.bucket = bucket
        self._model, self._outputs = model, outputs
        tokens = bucket.decode + bucket.block
        sizes = {
            'ids': tokens, 'positions': tokens, 'write': tokens, 'slots': tokens,
            'keep': bucket.logits, 'decode_blocks': bucket.decode * bucket.blocks,
            'decode_lengths': bucket.decode, 'query_sequence': bucket.block,
            'query_position': bucket.block, 'key_slots': bucket.keys, 'key_sequence': bucket.keys,
            'key_position': bucket.keys}
        total = sum(sizes.values())
        on_cuda = model.device.type == 'cuda'
        self._host = torch.zeros(total, dtype=torch.long, pin_memory=on_cuda)
        self._static = torch.zeros(total, dtype=torch.long, device=model.device)
        self._fill: dict[str, np.ndarray] = {}
        self._views: dict[str, Tensor] = {}
        start = 0
        for name, size in sizes.items():
            self._fill[name] = self._host[start:start + size].numpy()
            self._views[name] = self._static[start:start + size]
            start += size
        self._replay: Callable[[], None] = self._compute
        self._pad()
        self._static.copy_(self._host)

    @torch.no_grad()
    def capture(self, stream: torch.cuda.Stream, pool: Any) -> None:
        """Replay a device graph from now on; raises RuntimeError if it can't be captured."""
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(2):     # what libraries do at first is not to be replayed
                self._compute()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            self._compute()
        self._replay = graph.replay

    @torch.no_grad()
    def run(self, spans: Sequence[Span], finetune: FinetuneRows | None) -> Tensor:
        """
        Compute a pass of this bucket, as :meth:`PackedModel.run` does.

        The logits are overwritten by the next pass of any bucket.
        """
        wanted, end = self._write(spans, finetune)
        self._static.copy_(self._host, non_blocking=True)
        self._replay()
        if finetune is not None:
            rows = slice(end - finetune.tokens, end)
            for target, saved in zip(finetune.hidden, self._outputs.saved, strict=True):
                target.copy_(saved[rows])
        return self._outputs.logits[:wanted]

    def _compute(self) -> None:
        """Run the model on what is in the static buffer."""
        bucket, views = self.bucket, self._views
        row = AttentionMetadata(write_slots=views['write'])
        if bucket.decode:
            places = torch.arange(BLOCK_TOKENS, device=self._static.device)
            tables = views['decode_blocks'].view(bucket.decode, bucket.blocks, 1)
            row.decode_slots = (tables * BLOCK_TOKENS + places).view(bucket.decode, -1)
            row.decode_lengths = views['decode_lengths']
        if bucket.block:
            for name in ('query_sequence', 'query_position', 'key_sequence', 'key_position'):
                setattr(row, name, views[name])
            row.key_slots = views['key_slots']
        saved = [x[:bucket.block] for x in self._outputs.saved] if bucket.saves else []
        self._outputs.logits[:bucket.logits].copy_(self._model.forward_row(
            row, views['ids'], views['positions'], views['slots'], views['keep'], saved))

    def _pad(self) -> None:
        """Make every token, key and decode row padding."""
        scratch = self._model.scratch_block
        first = scratch * BLOCK_TOKENS
        for name, value in {
                'ids': 0, 'positions': 0, 'write': first, 'slots': 0, 'keep': 0,
                'decode_blocks': scratch, 'decode_lengths': 1, 'query_sequence': _NOBODY,
                'query_position': 0, 'key_slots': first, 'key_sequence': _NOBODY,
                'key_position': 0}.items():
            self._fill[name].fill(value)

    def _write(self, spans: Sequence[Span], finetune: FinetuneRows | None) -> tuple[int, int]:
        """
        Write a pass into the host's buffer.

        Returns how many logits are wanted, and where the last of its tokens is in the block.
        """
        self._pad()
        fill, decode = self._fill, self.bucket.decode
        tables = fill['decode_blocks'].reshape(decode, self.bucket.blocks)
        last: dict[int, int] = {}     # token of each span, by the span's id
        for row, span in enumerate(s for s in spans if len(s.tokens) == 1):
            used = span.blocks[:span.place // BLOCK_TOKENS + 1]
            # Masked places are its own, too: 0 * NaN of another sequence would be NaN.
            tables[row] = used[0]
            tables[row, :len(used)] = used
            fill['decode_lengths'][row] = span.place + 1
            fill['ids'][row], fill['positions'][row] = span.tokens[0], span.position
            fill['write'][row] = used[-1] * BLOCK_TOKENS + span.place % BLOCK_TOKENS
            fill['slots'][row] = span.slot
            last[id(span)] = row
        row, key = decode, 0
        chunks = [s for s in spans if len(s.tokens) > 1]
        for owner, span in enumerate([*chunks, *(finetune.spans if finetune else ())]):
            tokens, total = len(span.tokens), span.place + len(span.tokens)
            slots, places = span.slots(), np.arange(total)
            at, seen = slice(row, row + tokens), slice(key, key + total)
            fill['ids'][at], fill['slots'][at] = span.tokens, span.slot
            fill['positions'][at] = places[span.place:] + span.dropped
            fill['write'][at] = slots[span.place:]
            in_block = slice(row - decode, row - decode + tokens)
            fill['query_sequence'][in_block] = owner
            fill['query_position'][in_block] = places[span.place:]
            fill['key_slots'][seen], fill['key_position'][seen] = slots, places
            fill['key_sequence'][seen] = owner
            row, key = row + tokens, key + total
            last[id(span)] = row - 1
        wanted = [last[id(s)] for s in spans if s.wants_logits]
        fill['keep'][:len(wanted)] = wanted
        return len(wanted), row - decode


class CudaGraphRunner:
    """The buckets that are ready; all else is computed eagerly."""

    def __init__(self, model: PackedModel) -> None:
        """Begin with none."""
        self._model = model
        self._passes: dict[BatchDescriptor, CapturedPass] = {}

    def __len__(self) -> int:
        """Return how many buckets are ready."""
        return len(self._passes)

    def prepare(self, bucket: BatchDescriptor) -> CapturedPass:
        """Reserve a bucket's buffers and let passes use them from now on."""
        made = self._passes[bucket] = CapturedPass(
            self._model, bucket, Outputs(self._model, [bucket]))
        return made

    def run(self, spans: Sequence[Span], finetune: FinetuneRows | None) -> Tensor | None:
        """Compute a pass; None if its bucket is not ready, or attention is to be noted."""
        if any(s.attention is not None for s in spans):
            return None
        bucket = BatchDescriptor.of(spans, finetune)
        found = self._passes.get(bucket)
        if found is None or sum(s.wants_logits for s in spans) > bucket.logits:
            return None
        return found.run(spans, finetune)

    def capture(self, wanted: Iterable[BatchDescriptor]) -> Iterator[str]:
        """
        Capture a device graph for each bucket; yield '' for each, or why it can't be.

        They never run at once, and share memory and outputs. The stream is their own, because
        graphs that were captured on one stream share a workspace of cuBLAS.
        """
        wanted = list(wanted)
        try:
            outputs = Outputs(self._model, wanted)
        except RuntimeError as error:
            yield str(error)
            return
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        for bucket in wanted:
            try:
                static = CapturedPass(self._model, bucket, outputs)
                static.capture(stream, pool)
            except RuntimeError as error:     # no memory; experts that are chosen on the host
                torch.cuda.synchronize()
                yield str(error)
                continue
            self._passes[bucket] = static
            yield ''
