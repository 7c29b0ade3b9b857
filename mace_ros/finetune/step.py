# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
A LoRA fine-tune step that can be suspended between any two segments.

Its forward either piggybacks on inference passes, in token chunks of any size, or runs alone
layer by layer. Its backward runs as segments: chunks of the head, one layer at a time, the
optimizer. An inference pass may run between any two segments. The gradients are those of the
undivided step, because the backward of a layer needs nothing but the layer's input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mace_ros.finetune.chunked_layers import ChunkedLayers, split_evenly
from mace_ros.finetune.loss import HeadLoss
from mace_ros.finetune.sample import (
    attended_tokens,
    PackedSamples,
    Preference,
    Sample,
    SampleScore,
)
from mace_ros.finetune.trainer import AccumulationWindow, Trainer
from mace_ros.memory.budget import head_rows, MIN_HEAD_ROWS
from mace_ros.model.attention import AttentionMetadata, whole_sequences
from mace_ros.model.cpu_attention import prefers_one_mask
from mace_ros.model.graphs import LayerGraphs
from mace_ros.model.lora_mapping import InputObserver, TRAINING_SLOT
from mace_ros.model.model_shell import run_layer
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.prefix_kv import PackedPrefixes, PrefixKV
from mace_ros.model.spans import PiggybackSpans, Span
from mace_ros.scheduling.plan import Segment, SegmentKind


class FinetuneStep:
    """
    One optimizer step over packed samples; see :mod:`mace_ros.finetune.loss` for the loss.

    Implements :class:`mace_ros.scheduling.plan.FinetuneWork`.

    Only the tokens that the adapter acts on are computed: keys and values of the tokens before
    them are the base model's. The time of a segment grows with the packed tokens. A large step is
    therefore done in parts, each a FinetuneStep, whose gradients accumulate in the trainer. If a
    part has more than ``chunk_tokens`` nevertheless, such as one long sequence, each layer runs in
    chunks.
    """

    def __init__(self, model: PackedModel, trainer: Trainer, samples: Sequence[Sample], *,
                 head_tokens: int | None = None, keep_graphs: bool = True,
                 may_piggyback: bool = True, learns: bool = True,
                 preferences: Sequence[Preference] = (),
                 window: AccumulationWindow | None = None, chunk_tokens: int | None = None,
                 oldest_correction_at: float = 0.0, observer: InputObserver | None = None,
                 pauses_when_scored: bool = False,
                 prefixes: Mapping[tuple[int, ...], PrefixKV] | None = None) -> None:
        """
        Pack the samples and plan the segments.

        - ``head_tokens``: size of a HEAD segment in tokens; None: what suits the device and the
          memory.
        - ``keep_graphs``: a forward that runs alone keeps the graph of each layer for the
          backward, instead of recomputing the layer there.
        - ``may_piggyback``: the forward may run in inference passes.
        - ``learns``: if false, the step ends after scoring.
        - ``preferences``: pairs of samples; all pairs of an optimizer step must be in one part.
        - ``window``: the optimizer step of which this is a part; None: the step is whole.
        - ``chunk_tokens``: a longer step runs alone, in chunks, and recomputes each layer.
        - ``oldest_correction_at``: arrival of the oldest correction in the step, in seconds.
        - ``observer``: receives the inputs of the adapted linear layers in the forward.
        - ``pauses_when_scored``: the runner stops once the loss is known, since the learner may
          give up the backward then.
        - ``prefixes``: keys and values for each sample's prefix, by its token ids.

        Raises ``ValueError`` if no token has a weight, and ``KeyError`` if a prefix is missing.
        """
        if not any(w for s in samples for w in s.weights[1:]):
            raise ValueError('a fine-tune step needs a token to learn: all weights are 0')
        self.model = model
        self.trainer = trainer
        self.samples = tuple(samples)
        self.learns = learns
        self.pauses_when_scored = pauses_when_scored
        self.preferences = tuple(preferences) if learns else ()
        self.oldest_correction_at = oldest_correction_at
        self.keep_graphs = keep_graphs and learns
        self._window = window
        self._observer = observer
        self._packed = PackedSamples(samples)
        self._prefixes = [(prefixes or {})[ids] for ids in self._packed.prefixes]
        self.tokens = self._packed.tokens
        self._blocks: list[list[int]] = []
        self._piggybacked = 0       # forward tokens that ran in inference passes
        self._alone = not (may_piggyback and learns)
        self._graphs: list[tuple[Tensor, Tensor]] = []      # each layer's input and output
        self._gradient: Tensor | None = None
        self._prepare_layers(chunk_tokens or self.tokens)
        self._loss = HeadLoss(
            model, self._packed, learns=learns,
            head_tokens=head_tokens or (
                head_rows(model.device.type) if self.keep_graphs else MIN_HEAD_ROWS),
            preferences=self.preferences,
            total_weight=None if window is None else window.weight)
        self._segments = self._plan_segments()

    def _prepare_layers(self, chunk_tokens: int) -> None:
        """Lay the tokens out for the layers, whole or in chunks."""
        model, packed = self.model, self._packed
        chunked = chunk_tokens < self.tokens
        if chunked:
            self._alone, self.keep_graphs = True, False
        # Captured layers can't call an observer.
        prefix_tokens = sum(p.tokens for p in self._prefixes)
        self._graphed = None if chunked or self._observer is not None else next(
            (x for x in model.graphed_layers
             if x.tokens >= self.tokens and x.prefix_tokens >= prefix_tokens), None)
        padding = self._graphed.tokens - self.tokens if self._graphed is not None else 0
        self._padded_lengths = (*packed.lengths, padding) if padding else packed.lengths
        self._packed_prefixes = PackedPrefixes.pack(
            self._prefixes, packed.prefix_of + (-1,) * bool(padding)) if self._prefixes else None
        # Undivided, the chunk is all that `lengths` counts for the budget, also for prefixes.
        self.chunk_tokens = chunk_tokens if chunked else sum(self.lengths)
        self.metadata = (whole_sequences(
            packed.lengths, model.device, prefixes=self._packed_prefixes,
            one_mask=prefers_one_mask(self.tokens, model.dtype, model.device))
            if self._graphed is None else self._graphed.metadata)
        ids = model.tensor([packed.ids + [0] * padding])
        positions = model.tensor([packed.positions + list(range(padding))])
        # Until the first layer's input is computed from them.
        self._input: tuple[Tensor, ...] = ids, positions
        self._calls: list[dict[str, Any]] = []      # each layer's arguments
        self._chunked = ChunkedLayers(
            model, self.metadata, ids, positions,
            split_evenly(self.tokens, chunk_tokens)) if chunked else None
        # Input of each layer, and the last layer's output: [tokens and padding, width].
        self._hidden: list[Tensor] = []
        self._output: Tensor | None = None      # of a chunked layer whose forward is running

    @property
    def begun(self) -> bool:
        """Whether the first layer's input is computed."""
        return bool(self._hidden) or self.done

    def begin(self) -> None:
        """Compute the first layer's input by the model's own code, unless that is done."""
        if self.begun:
            return
        if self._chunked is not None:
            first = self._chunked.first_input
        else:
            with torch.no_grad(), self.model.training(self.metadata):
                hidden, self._calls = self.model.shell.call_layers(*self._input)
            first = hidden[0]
        self._hidden, self._input = [first], ()

    # -- piggybacking ----------------------------------------------------------------

    @property
    def piggyback_tokens(self) -> int:
        """Forward tokens that may still piggyback on inference passes."""
        return 0 if self._alone else self.tokens - self._piggybacked

    @property
    def kv_tokens(self) -> tuple[int, ...]:
        """
        KV cache tokens of each prefix and of each sequence after its prefix, for piggybacking.

        Empty if it is over.
        """
        prefixes = (p.tokens for p in self._prefixes)
        return (*prefixes, *self._packed.lengths) if self.piggyback_tokens else ()

    def hold_blocks(self, blocks: list[list[int]]) -> None:
        """Hold KV blocks, a table for each of :attr:`kv_tokens`, and fill those of prefixes."""
        for prefix, table in zip(self._prefixes, blocks, strict=False):
            self.model.kv_cache.write(self.model.cache_slots(table, prefix.tokens), prefix)
        self._blocks = blocks

    @property
    def blocks(self) -> tuple[list[int], ...]:
        """The tables of held KV blocks."""
        return tuple(self._blocks)

    def take_blocks(self) -> list[list[int]]:
        """Return the tables of held KV blocks, and hold none."""
        blocks, self._blocks = self._blocks, []
        return blocks

    @property
    def holds_blocks(self) -> bool:
        """Whether KV blocks are held."""
        return bool(self._blocks)

    def piggyback_spans(self, tokens: int) -> PiggybackSpans:
        """Return the next ``tokens`` forward tokens for a hybrid pass."""
        if not 0 < tokens <= self.piggyback_tokens:
            raise ValueError(
                f'{tokens} tokens requested to piggyback, {self.piggyback_tokens} left')
        self.begin()
        if len(self._hidden) == 1:
            self._hidden += [torch.zeros_like(self._hidden[0]) for _ in self.model.layers]
        first, last = self._piggybacked, self._piggybacked + tokens
        own_blocks = self._blocks[len(self._prefixes):]
        spans, start = [], 0
        for sample, prefix, blocks in zip(
                self.samples, self._packed.prefix_of, own_blocks, strict=True):
            before, length = sample.adapted_from, sample.own_tokens
            begin, end = max(first - start, 0), min(last - start, length)
            if begin < end:
                spans.append(Span(
                    sample.tokens[before + begin:before + end], before + begin, blocks,
                    TRAINING_SLOT, False, prefix=before,
                    prefix_blocks=self._blocks[prefix] if before else ()))
            start += length
        return PiggybackSpans(spans, [h[first:last] for h in self._hidden])

    def piggybacked(self, tokens: int) -> None:
        """Count the tokens of :meth:`piggyback_spans` as computed, after their pass."""
        self._piggybacked += tokens
        if self._piggybacked == self.tokens:
            recomputed = Segment(SegmentKind.BACKWARD_RECOMPUTED, self.tokens)
            self._segments = [recomputed if s.kind is SegmentKind.BACKWARD else s
                              for s in self._segments if s.kind is not SegmentKind.FORWARD]

    # -- memory ----------------------------------------------------------------------

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence that determine its memory, padding and prefixes included."""
        padding = self._padded_lengths[len(self.samples):]
        return (*(s.own_tokens + attended_tokens(s.adapted_from) for s in self.samples), *padding)

    def save_memory(self, chunk_tokens: int) -> None:
        """Keep no graphs and compute ``chunk_tokens`` at once; only before the step has begun."""
        self.keep_graphs = False
        self._loss.limit(MIN_HEAD_ROWS)
        if chunk_tokens < self.chunk_tokens:
            self._prepare_layers(chunk_tokens)
        self._segments = self._plan_segments()

    def restart(self) -> bool:
        """
        Drop everything computed so far, and run alone from the start; weights are unchanged.

        Returns False, and does nothing, if only the optimizer's update is left.
        """
        if all(s.kind is SegmentKind.OPTIMIZER for s in self._segments):
            return False
        del self._hidden[1:]
        self._graphs.clear()
        self._gradient = None
        self._loss.restart()
        self._piggybacked, self._alone = 0, True
        self._output = None
        if self._chunked is not None:
            self._chunked.restart()
        self._segments = self._plan_segments()
        return True

    # -- segments --------------------------------------------------------------------

    def _plan_segments(self) -> list[Segment]:
        layers = len(self.model.layers)
        sizes = [self.tokens] if self._chunked is None else self._chunked.sizes
        backward = (SegmentKind.BACKWARD if self.keep_graphs
                    else SegmentKind.BACKWARD_RECOMPUTED)
        head = [Segment(SegmentKind.HEAD, n) for n in self._loss.sizes]
        scoring = [Segment(SegmentKind.FORWARD, n) for n in sizes] * layers + head
        if not self.learns:
            return scoring
        window = self._window or AccumulationWindow(0.0, self.tokens)
        return (scoring + (head if self._loss.runs_twice else [])
                + [Segment(backward, n) for n in reversed(sizes)] * layers
                + [Segment(SegmentKind.OPTIMIZER, window.tokens)] * window.ends)

    def segments(self) -> Iterator[Segment]:
        """
        Return the remaining segments in order.

        While only some forward tokens have piggybacked, there are none: the others must
        piggyback first.
        """
        if 0 < self._piggybacked < self.tokens:
            return iter(())
        return iter(self._segments)

    @property
    def scored(self) -> bool:
        """Whether all samples are scored."""
        return self._loss.scored

    @property
    def done(self) -> bool:
        """Whether the weights are updated, or the gradients of a part accumulated."""
        return not self._segments

    def run_segment(self) -> Segment:
        """Run the next segment and return it."""
        self.begin()
        segment = self._segments.pop(0)
        match segment.kind:
            case SegmentKind.FORWARD:
                self._forward(len(self._hidden) - 1)
            case SegmentKind.HEAD:
                self._loss.run_chunk(self._hidden[-1])
            case SegmentKind.BACKWARD | SegmentKind.BACKWARD_RECOMPUTED:
                self._backward(len(self._hidden) - 2)
            case SegmentKind.OPTIMIZER:
                self.trainer.update()
        if self.done:
            if self.learns and segment.kind is not SegmentKind.OPTIMIZER:
                self.trainer.accumulate()
            self._release()
        return segment

    def _release(self) -> None:
        """Free all tensors but the scores, for which the step may still be referenced."""
        self._hidden, self._calls, self._gradient = [], [], None
        self._loss.release()
        self.metadata = AttentionMetadata()
        self._chunked = None

    def _run_layer(self, index: int, x: Tensor) -> Tensor:
        """Return a layer's output for ``x``, ``[1, tokens and padding, width]``."""
        if self._graphed is None:
            return run_layer(self.model.layers[index], x, self._calls[index])
        return self._prepared(self._graphed).run(index, x)

    def _prepared(self, layers: LayerGraphs) -> LayerGraphs:
        """Return layers on fixed addresses, which hold this step's arguments."""
        layers.begin(self, self._padded_lengths, self._calls, self._packed_prefixes)
        return layers

    def _forward(self, index: int) -> None:
        self._alone = True
        if self._chunked is not None:
            self._forward_chunk(self._chunked, index)
            return
        x = self._hidden[index][None]
        with (torch.set_grad_enabled(self.keep_graphs),
              self.model.training(self.metadata, self._observer)):
            if self.keep_graphs:
                x = x.detach().requires_grad_()
            y = self._run_layer(index, x)
        if self.keep_graphs:
            self._graphs.append((x, y))
        # What a graph returns is overwritten when another step runs the same layers.
        output = y.detach()[0]
        self._hidden.append(output if self._graphed is None else output.clone())

    def _forward_chunk(self, layers: ChunkedLayers, index: int) -> None:
        x = self._hidden[index]
        if self._output is None:
            self._output = torch.empty_like(x)
        if layers.forward(index, x, self._output, keep=self.learns, observer=self._observer):
            self._hidden.append(self._output)
            self._output = None

    def _backward(self, index: int) -> None:
        if self._chunked is not None:
            self._backward_chunk(self._chunked, index)
            return
        gradient = self._output_gradient(index)
        self._hidden.pop()
        if self._graphed is not None and not self._graphed.holds(self):
            self._graphs.clear()    # another step has run on the same addresses meanwhile
        if self._graphed is not None and not self._graphs:
            with self.model.training(self.metadata):
                self._gradient = self._prepared(self._graphed).backward(
                    index, self._hidden[index][None], gradient[None])[0]
            return
        if self._graphs:
            x, y = self._graphs.pop()
        else:
            x = self._hidden[index][None].detach().requires_grad_()
            with torch.enable_grad(), self.model.training(self.metadata):
                y = self._run_layer(index, x)
        y.backward(gradient[None])
        assert x.grad is not None
        self._gradient = x.grad[0]

    def _backward_chunk(self, layers: ChunkedLayers, index: int) -> None:
        if layers.is_before_backward(index):
            self._gradient = self._output_gradient(index)
        assert self._gradient is not None
        if layers.backward(index, self._hidden[index], self._gradient):
            self._hidden.pop()

    def _output_gradient(self, index: int) -> Tensor:
        """Return the gradient of a layer's output, at the start of the layer's backward."""
        if index == len(self.model.layers) - 1:
            # Gradients may be left from a step that was abandoned in its backward.
            self.trainer.zero_grad(accumulated=self._window is None or self._window.begins)
            return self._loss.take_gradient()
        assert self._gradient is not None
        return self._gradient

    # -- results ---------------------------------------------------------------------

    def scores(self) -> list[SampleScore]:
        """Return each sample's score under the weights at the start of the step."""
        return self._loss.scores()

    def soft_targets(self) -> list[Sample]:
        """Return the samples with soft targets by this version; only if the step only scores."""
        return self._loss.soft_targets()
