# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Hybrid passes of fixed shapes on fixed addresses, which a CUDA graph can replay.

A pass of a small model is hundreds of kernels of a few microseconds each: launching them one by
one takes several times as long as running them. A graph launches all at once, but for one shape
and one set of addresses. Therefore a pass is padded to the next batch descriptor, and its
integers are copied into one static buffer. Padding tokens read and write a scratch block of the
KV cache that belongs to no sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.model.attention import AttentionMetadata, GatheredRows
from mace_ros.model.batch_descriptor import BatchDescriptor, Limits, UNLIMITED
from mace_ros.model.capturing import attempt, captured, CaptureFailed, Failure
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.spans import PiggybackSpans, Span

_PADDING = -1      # sequence id of padding tokens and keys


class PassOutputs:
    """Output buffers of captured passes, which share them: each pass overwrites the last one's."""

    def __init__(self, model: PackedModel, descriptors: Sequence[BatchDescriptor]) -> None:
        """Allocate buffers that are large enough for any of ``descriptors``."""
        config = model.model.config.get_text_config()
        rows = max((d.logits for d in descriptors), default=0)
        tokens = max((d.block for d in descriptors if d.saves), default=0)
        self.logits = torch.zeros(rows, config.vocab_size, device=model.device)
        # Of each row of logits: greedy sampling then launches no kernel after the graph.
        self.best_tokens = torch.zeros(rows, dtype=torch.long, device=model.device)
        # Each layer's input, and the last layer's output.
        self.hidden = [torch.zeros(tokens, config.hidden_size, dtype=model.dtype,
                                   device=model.device) for _ in range(len(model.layers) + 1)]


class CapturedPass:
    """Passes of one batch descriptor; computed eagerly until :meth:`capture` is called."""

    def __init__(self, model: PackedModel, descriptor: BatchDescriptor,
                 outputs: PassOutputs) -> None:
        """Allocate the input buffers; ``outputs`` must be large enough for the descriptor."""
        self.descriptor = descriptor
        self._model, self._outputs = model, outputs
        tokens = descriptor.tokens
        sizes = {
            'ids': tokens, 'positions': tokens, 'write': tokens, 'slots': tokens,
            'keep': descriptor.logits, 'decode_blocks': descriptor.decode * descriptor.blocks,
            'decode_lengths': descriptor.decode, 'query_sequence': descriptor.block,
            'query_position': descriptor.block, 'key_slots': descriptor.keys,
            'key_sequence': descriptor.keys, 'key_position': descriptor.keys}
        total = sum(sizes.values())
        on_cuda = model.device.type == 'cuda'
        self._host = torch.zeros(total, dtype=torch.long, pin_memory=on_cuda)
        self._device = torch.zeros(total, dtype=torch.long, device=model.device)
        self._host_views: dict[str, np.ndarray] = {}
        self._device_views: dict[str, Tensor] = {}
        start = 0
        for name, size in sizes.items():
            self._host_views[name] = self._host[start:start + size].numpy()
            self._device_views[name] = self._device[start:start + size]
            start += size
        self._replay: Callable[[], None] | None = None
        self._fill_with_padding()
        self._device.copy_(self._host)

    @torch.no_grad()
    def capture(self, stream: torch.cuda.Stream, pool: Any) -> None:
        """
        Replay a CUDA graph from now on.

        Raises ``CaptureFailed``, or another exception before anything was captured.
        """
        self._replay, _ = captured(self._compute, stream, pool)

    @torch.no_grad()
    def run(self, spans: Sequence[Span], piggyback: PiggybackSpans | None) -> Tensor:
        """
        Compute a pass of this descriptor, as :meth:`PackedModel.run` does.

        The next captured pass, of any descriptor, overwrites the logits.
        """
        logits, end = self._write(spans, piggyback)
        self._device.copy_(self._host, non_blocking=True)
        (self._replay or self._compute)()
        if piggyback is not None:
            rows = slice(end - piggyback.tokens, end)
            torch._foreach_copy_(        # one kernel on CUDA
                list(piggyback.hidden), [hidden[rows] for hidden in self._outputs.hidden])
        return self._outputs.logits[:logits]

    @property
    def best_tokens(self) -> Tensor:
        """The token of the largest logit of each row; valid as long as the logits are."""
        return self._outputs.best_tokens

    def _compute(self) -> None:
        """Run the model on the content of the device buffer."""
        descriptor, views = self.descriptor, self._device_views
        metadata = AttentionMetadata(write_slots=views['write'])
        if descriptor.decode:
            tables = views['decode_blocks'].view(descriptor.decode, descriptor.blocks)
            if self._model.context.paged is not None:
                metadata.decode_tables = tables
                metadata.decode_lengths = views['decode_lengths']
            else:
                offsets = torch.arange(BLOCK_TOKENS, device=self._device.device)
                slots = (tables[:, :, None] * BLOCK_TOKENS + offsets).view(descriptor.decode, -1)
                metadata.decode_rows = [GatheredRows(slots, views['decode_lengths'])]
        if descriptor.block:
            metadata.query_sequence = views['query_sequence']
            metadata.query_position = views['query_position']
            metadata.key_sequence = views['key_sequence']
            metadata.key_position = views['key_position']
            metadata.key_slots = views['key_slots']
        hidden = ([x[:descriptor.block] for x in self._outputs.hidden]
                  if descriptor.saves else [])
        logits = self._outputs.logits[:descriptor.logits]
        logits.copy_(self._model.forward_packed(
            metadata, views['ids'], views['positions'], views['slots'], views['keep'], hidden))
        torch.argmax(logits, -1, out=self._outputs.best_tokens[:descriptor.logits])

    def _fill_with_padding(self) -> None:
        """Make every token, key and decode row padding."""
        scratch = self._model.scratch_block
        first = scratch * BLOCK_TOKENS
        for name, value in {
                'ids': 0, 'positions': 0, 'write': first, 'slots': 0, 'keep': 0,
                'decode_blocks': scratch, 'decode_lengths': 1, 'query_sequence': _PADDING,
                'query_position': 0, 'key_slots': first, 'key_sequence': _PADDING,
                'key_position': 0}.items():
            self._host_views[name].fill(value)

    def _write(self, spans: Sequence[Span], piggyback: PiggybackSpans | None) -> tuple[int, int]:
        """
        Write a pass into the host buffer.

        Returns the number of logits wanted, and the end of its tokens in the block.
        """
        self._fill_with_padding()
        last: dict[int, int] = {}     # row of each span's last token, by the span's id
        self._write_decode([s for s in spans if len(s.tokens) == 1], last)
        chunks = [s for s in spans if len(s.tokens) > 1]
        end = self._write_block([*chunks, *(piggyback.spans if piggyback else ())], last)
        keep = [last[id(s)] for s in spans if s.wants_logits]
        self._host_views['keep'][:len(keep)] = keep
        return len(keep), end

    def _write_decode(self, spans: Sequence[Span], last: dict[int, int]) -> None:
        host = self._host_views
        tables = host['decode_blocks'].reshape(self.descriptor.decode, self.descriptor.blocks)
        for row, span in enumerate(spans):
            position = span.cache_position
            used = span.blocks[:position // BLOCK_TOKENS + 1]
            # Masked slots must be the row's own: 0 * NaN of another sequence would be NaN.
            tables[row] = used[0]
            tables[row, :len(used)] = used
            host['decode_lengths'][row] = position + 1
            host['ids'][row], host['positions'][row] = span.tokens[0], span.position
            host['write'][row] = used[-1] * BLOCK_TOKENS + position % BLOCK_TOKENS
            host['slots'][row] = span.adapter_slots[0]
            last[id(span)] = row

    def _write_block(self, spans: Sequence[Span], last: dict[int, int]) -> int:
        host, decode = self._host_views, self.descriptor.decode
        row, key = decode, 0
        for sequence, span in enumerate(spans):
            tokens, total = len(span.tokens), span.cache_position + len(span.tokens)
            slots, positions = span.slots(), np.arange(total)
            rows, keys = slice(row, row + tokens), slice(key, key + total)
            host['ids'][rows], host['slots'][rows] = span.tokens, span.adapter_slots
            host['positions'][rows] = positions[span.cache_position:] + span.dropped
            host['write'][rows] = slots[span.cache_position:]
            in_block = slice(row - decode, row - decode + tokens)
            host['query_sequence'][in_block] = sequence
            host['query_position'][in_block] = positions[span.cache_position:]
            host['key_slots'][keys], host['key_position'][keys] = slots, positions
            host['key_sequence'][keys] = sequence
            row, key = row + tokens, key + total
            last[id(span)] = row - 1
        return row - decode


class CudaGraphRunner:
    """Runs passes whose batch descriptor was prepared; all others are computed eagerly."""

    def __init__(self, model: PackedModel, limits: Limits = UNLIMITED) -> None:
        """Take the limits of the descriptors that will be prepared."""
        self._model, self.limits = model, limits
        self._passes: dict[BatchDescriptor, CapturedPass] = {}
        self.best_tokens: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of prepared descriptors."""
        return len(self._passes)

    def __contains__(self, descriptor: BatchDescriptor) -> bool:
        """Return whether passes of this descriptor are prepared."""
        return descriptor in self._passes

    def __iter__(self) -> Iterator[BatchDescriptor]:
        """Return an iterator over the prepared descriptors."""
        return iter(self._passes)

    def prepare(self, descriptor: BatchDescriptor) -> CapturedPass:
        """Run passes of this descriptor on fixed addresses from now on, without a graph."""
        prepared = self._passes[descriptor] = CapturedPass(
            self._model, descriptor, PassOutputs(self._model, [descriptor]))
        return prepared

    def run(self, spans: Sequence[Span], piggyback: PiggybackSpans | None) -> Tensor | None:
        """
        Compute a pass, as :meth:`PackedModel.run` does.

        Returns None, having computed nothing, if its descriptor is not prepared, if it observes
        attention, or if more tokens want logits than the descriptor has rows for.
        """
        if any(s.attention is not None for s in spans):
            return None
        descriptor = BatchDescriptor.of(spans, piggyback, self.limits)
        found = self._passes.get(descriptor)
        if found is None or sum(s.wants_logits for s in spans) > descriptor.logits:
            return None
        logits = found.run(spans, piggyback)
        self.best_tokens = found.best_tokens[:len(logits)]
        return logits

    def capture(self, descriptors: Iterable[BatchDescriptor]) -> Iterator[Failure | None]:
        """
        Capture a CUDA graph for each descriptor; yield None for each, or why there is none.

        The graphs never run at the same time, and share memory and outputs. They are captured
        on a stream of their own, because graphs from one stream share a cuBLAS workspace. If a pass
        fails before its capture, and not for lack of memory, its number of tokens is taken for the
        cause: with many, some models choose experts on the host. Passes of the same kind with as
        many tokens or more are then not tried.
        """
        descriptors = list(descriptors)
        outputs = attempt(partial(PassOutputs, self._model, descriptors))
        if isinstance(outputs, Failure):
            yield outputs
            return
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        failed: list[tuple[BatchDescriptor, Failure]] = []
        for descriptor in descriptors:
            failure = next((f for d, f in failed if (
                d.kind == descriptor.kind and d.tokens <= descriptor.tokens)), None)
            if failure is None:
                failure = attempt(partial(self._capture, descriptor, outputs, stream, pool))
                if failure is not None and not issubclass(
                        failure.kind, (torch.OutOfMemoryError, CaptureFailed)):
                    failed.append((descriptor, failure))
            yield failure

    def _capture(self, descriptor: BatchDescriptor, outputs: PassOutputs,
                 stream: torch.cuda.Stream, pool: Any) -> None:
        """Capture passes of one descriptor."""
        found = CapturedPass(self._model, descriptor, outputs)
        found.capture(stream, pool)
        self._passes[descriptor] = found
