# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
A LoRA fine-tune step that can stop anywhere.

Its forward either rides in inference passes, in token chunks of any size, or runs alone
layer by layer; its backward runs as segments: chunks of the head, one layer at a time,
the optimizer. Between any two pieces an inference pass may come; the gradients are those
of the undivided step, because a layer's input is all that its backward needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
import math
from typing import Any

import torch
from torch import Tensor

from mace_ros.finetune.chunked_layers import ChunkedLayers, chunks_of
from mace_ros.finetune.null_space import InputSubspace
from mace_ros.finetune.sample import (
    copied_tokens,
    Preference,
    Sample,
    SampleScore,
    shared_tokens,
    SoftTargets,
)
from mace_ros.memory.budget import HEAD_ROWS
from mace_ros.model.attention import AttentionMetadata, whole_sequences
from mace_ros.model.cpu_attention import are_few
from mace_ros.model.lora import LoRAManager, TRAINING_SLOT
from mace_ros.model.model_shell import run_layer
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.spans import FinetuneRows, Span
from mace_ros.scheduling.plan import Segment, SegmentKind


@dataclass(frozen=True)
class AccumulationWindow:
    """
    The optimizer step that a part belongs to: the weights and tokens of all its parts.

    Gradients are gathered from the part that ``begins`` it to the one that ``ends`` it, which
    the update follows.
    """

    weight: float
    tokens: int
    begins: bool = True
    ends: bool = True


# Tokens of each prediction that a teacher keeps.
SOFT_TARGET_TOKENS = 32


class Trainer:
    """The adapter that is being trained and its optimizer."""

    def __init__(self, bank: LoRAManager, learning_rate: float) -> None:
        self._bank = bank
        self._optimizer = torch.optim.AdamW(
            bank.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
        self._kept: list[Tensor] = []     # gradients of the parts before this one
        self.sync_slot()

    def sync_slot(self) -> None:
        """Copy the master weights to the slot that is trained and scored."""
        self._bank.write_slot(TRAINING_SLOT)

    def set_learning_rate(self, rate: float) -> None:
        """Use this rate from the next update on."""
        for group in self._optimizer.param_groups:
            group['lr'] = rate

    def start_backward(self, *, anew: bool = True) -> None:
        """Forget gradients that were given up on their way; ``anew``, those put by, too."""
        self._optimizer.zero_grad(set_to_none=True)
        if anew:
            self._kept = []

    def accumulate(self) -> None:
        """Put the gradients of a part by, for the update after the last part."""
        if self._kept:
            pairs = [(kept, p.grad) for kept, p
                     in zip(self._kept, self._bank.parameters(), strict=True) if p.grad is not None]
            torch._foreach_add_(*map(list, zip(*pairs, strict=True)))
        else:
            # Copied: those of a device graph are overwritten by its next replay.
            self._kept = [torch.zeros_like(p) if p.grad is None else p.grad.clone()
                          for p in self._bank.parameters()]
        self._optimizer.zero_grad(set_to_none=True)

    def update(self) -> None:
        """
        Apply the gradients to the master weights and to the slot that rides in passes.

        Gradients that are not finite change nothing: a weight that is not a number would
        reach, as 0 * NaN, all tokens that share a pass with the training slot.
        """
        if self._kept:
            for parameter, kept in zip(self._bank.parameters(), self._kept, strict=True):
                parameter.grad = kept if parameter.grad is None else kept.add_(parameter.grad)
            self._kept = []
        gradients = [p.grad for p in self._bank.parameters() if p.grad is not None]
        if torch.stack(torch._foreach_norm(gradients)).isfinite().all():
            self._optimizer.step()
            self._bank.project_update()
            self.sync_slot()
        self._optimizer.zero_grad(set_to_none=True)


class FinetuneStep:
    """
    One optimizer step over a batch of packed samples.

    Implements :class:`mace_ros.scheduling.plan.FinetuneWork`. The loss is the weighted
    mean cross-entropy of all weighted tokens, plus the mean of that of all preferences; what
    is ``worse`` in one of these has no cross-entropy. A preference couples two sequences:
    the head then runs twice, to score all tokens and to learn from them.

    What all prompts begin with, as chat templates make them, is computed once: the gradients
    are the same. Its pieces are as long as its sequences together. A step of many is done in
    parts, each one an object of its own, whose gradients add up to those of the undivided step.
    What is longer than ``piece_tokens`` nevertheless, such as one long sequence, runs each layer
    in chunks.
    """

    def __init__(self, model: PackedModel, trainer: Trainer, samples: Sequence[Sample], *,
                 head_tokens: int = HEAD_ROWS, keep_graphs: bool = True, may_piggyback: bool = True,
                 learns: bool = True, preferences: Sequence[Preference] = (),
                 imitation: float = 1.0, whole: AccumulationWindow | None = None,
                 piece_tokens: int | None = None, oldest_correction_at: float = 0.0,
                 directions: InputSubspace | None = None) -> None:
        """
        Plan the step; raises ``ValueError`` if no token has a weight.

        ``head_tokens`` bounds a HEAD segment. With ``keep_graphs``, a forward that runs
        alone keeps its layer graphs instead of computing each layer again. Without
        ``may_piggyback`` it always runs alone. One that does not learn ends with its scores.
        ``imitation`` weighs the cross-entropy of what is ``better`` in a preference. If it
        is a part, ``whole`` says of what; all preferences belong into one part. With more than
        ``piece_tokens`` it runs alone, and computes each layer again. ``directions`` is shown
        what goes into the adapted layers.
        """
        if not any(w for s in samples for w in s.weights[1:]):
            raise ValueError('a fine-tune step needs a token to learn: all weights are 0')
        self.model = model
        self.trainer = trainer
        self.samples = tuple(samples)
        self.learns = learns
        self.preferences = tuple(preferences) if learns else ()
        self._part_of = whole
        self.oldest_correction_at = oldest_correction_at
        self._directions = directions
        self._shared = shared_tokens(samples)
        self._copied = copied_tokens(self._shared)
        # What is computed, and where in its sequence it begins.
        self._stretches = [(s.tokens[self._shared:], self._shared) for s in samples]
        if self._shared:
            self._stretches.insert(0, (samples[0].tokens[:self._shared], 0))
        self._lengths = tuple(len(tokens) for tokens, _ in self._stretches)
        self.tokens = sum(self._lengths)
        self._blocks: list[list[int]] = []
        self._ridden = 0
        self._alone = not (may_piggyback and learns)
        self._graphs: list[tuple[Tensor, Tensor]] = []
        self.keep_graphs = keep_graphs and learns
        self._lay_out(piece_tokens or self.tokens)
        self._imitated = [1.0] * len(samples)
        for pair in self.preferences:
            self._imitated[pair.better], self._imitated[pair.worse] = imitation, 0.0
        self._targets = self._supervised(head_tokens)
        self._gradient: Tensor | None = None
        self._chunk_scores: list[Tensor] = []
        self._tops: list[tuple[Tensor, Tensor]] = []
        self._pulls: list[Tensor] = []      # of preferences, on each row of a chunk
        self._learned = 0                   # chunks that have their gradient
        self._segments = self._plan_segments()

    def _lay_out(self, piece_tokens: int) -> None:
        """Lay the tokens out for the layers: undivided, if they are not too many."""
        model = self.model
        divided = piece_tokens < self.tokens
        if divided:
            self._alone, self.keep_graphs = True, False
        # A captured layer shows nothing.
        self._static = None if divided or self._directions is not None else next(
            (x for x in model.graphed_layers if x.tokens >= self.tokens), None)
        padding = self._static.tokens - self.tokens if self._static is not None else 0
        self._padded = (*self._lengths, padding) if padding else self._lengths
        # By the memory that they take, all of them at once are a piece that divides nothing.
        self.piece_tokens = piece_tokens if divided else sum(self.lengths)
        self._row = (whole_sequences(
            self._lengths, model.device, shared=self._shared,
            together=are_few(self.tokens, model.dtype, model.device))
            if self._static is None else self._static.row)
        ids = [t for tokens, _ in self._stretches for t in tokens] + [0] * padding
        positions = [first + i for tokens, first in self._stretches for i in range(len(tokens))]
        positions += range(padding)
        packed = model.tensor([ids]), model.tensor([positions])
        self._calls: list[dict[str, Any]] = []
        self._divided: ChunkedLayers | None = None
        if divided:
            self._divided = ChunkedLayers(
                model, self._row, *packed, chunks_of(self.tokens, self.piece_tokens))
            first = self._divided.first
        else:
            with torch.no_grad(), model.training(self._row):
                hidden, self._calls = model.skeleton.call_layers(*packed)
            first = hidden[0]
        # Input of each layer, and the last layer's output: [tokens and padding, width].
        self._hidden: list[Tensor] = [first]
        self._output: Tensor | None = None      # of a divided layer that is not through

    def _supervised(self, head_tokens: int) -> list[tuple[Tensor, ...]]:
        """
        Return chunks of what is learned from.

        Rows that predict, tokens predicted, their shares in the cross-entropy, and the target
        of each row: tokens and their probabilities, ``[rows, some]``.
        """
        rows, tokens, weights, start = [], [], [], 0
        for sample, imitated in zip(self.samples, self._imitated, strict=True):
            for i in range(1, len(sample.tokens)):
                if sample.weights[i]:
                    rows.append(i - 1 + (start if i > self._shared else 0))
                    tokens.append(sample.tokens[i])
                    weights.append(sample.weights[i] * imitated)
            start += len(sample.tokens) - self._shared
        total = math.fsum(weights) if self._part_of is None else self._part_of.weight
        shares = torch.tensor(weights) / (total or 1.0)
        device = self.model.device
        columns = (torch.tensor(rows, device=device), torch.tensor(tokens, device=device),
                   shares.to(device), *self._target(tokens))
        return list(zip(*(c.split(head_tokens) for c in columns), strict=True))

    def _target(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return tokens and their probabilities: the teacher's, or all for the right token."""
        teachers = [s.soft_targets for s in self.samples]
        some = max((t.tokens.shape[1] for t in teachers if t is not None), default=1)
        targets = self.model.tensor(tokens)[:, None].repeat(1, some)
        probabilities = torch.zeros(len(tokens), some, device=self.model.device)
        probabilities[:, 0] = 1.0
        start = 0
        for sample, teacher in zip(self.samples, teachers, strict=True):
            rows = slice(start, start + sum(1 for w in sample.weights[1:] if w))
            start = rows.stop
            if teacher is not None:
                targets[rows], probabilities[rows] = teacher.tokens, teacher.probabilities
        return targets, probabilities

    # -- the forward that rides ------------------------------------------------------

    @property
    def piggyback_tokens(self) -> int:
        """Forward tokens that may still ride in inference passes."""
        return 0 if self._alone else self.tokens - self._ridden

    @property
    def kv_tokens(self) -> tuple[int, ...]:
        """KV cache tokens that each sequence needs while it rides; empty: none."""
        return self._lengths if self.piggyback_tokens else ()

    def hold_blocks(self, blocks: list[list[int]]) -> None:
        """Take the KV blocks for riding, one table per sequence."""
        self._blocks = blocks

    @property
    def blocks(self) -> tuple[list[int], ...]:
        """The KV blocks that are held."""
        return tuple(self._blocks)

    def take_blocks(self) -> list[list[int]]:
        """Give the KV blocks back."""
        blocks, self._blocks = self._blocks, []
        return blocks

    @property
    def holds_blocks(self) -> bool:
        """Whether KV blocks are held for riding."""
        return bool(self._blocks)

    def rows(self, tokens: int) -> FinetuneRows:
        """Return the next ``tokens`` forward tokens as rows for a hybrid pass."""
        if not 0 < tokens <= self.piggyback_tokens:
            raise ValueError(f'{tokens} tokens asked to ride, {self.piggyback_tokens} left')
        if len(self._hidden) == 1:
            self._hidden += [torch.zeros_like(self._hidden[0]) for _ in self.model.layers]
        first, last = self._ridden, self._ridden + tokens
        spans, start = [], 0
        for (own, position), blocks in zip(self._stretches, self._blocks, strict=True):
            begin, end = max(first - start, 0), min(last - start, len(own))
            if begin < end:
                spans.append(Span(
                    own[begin:end], position + begin, blocks, TRAINING_SLOT, False,
                    shared=position, shared_blocks=self._blocks[0] if position else ()))
            start += len(own)
        return FinetuneRows(spans, [h[first:last] for h in self._hidden])

    def piggybacked(self, tokens: int) -> None:
        """Note that the rows' pass has run."""
        self._ridden += tokens
        if self._ridden == self.tokens:
            again = Segment(SegmentKind.BACKWARD_RECOMPUTED, self.tokens)
            self._segments = [again if s.kind is SegmentKind.BACKWARD else s
                              for s in self._segments if s.kind is not SegmentKind.FORWARD]

    # -- its memory ------------------------------------------------------------------

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of the sequences, by the memory that they take, padding included."""
        return tuple(n + self._copied for n in self._padded)

    def save_memory(self, piece_tokens: int) -> None:
        """Keep no layer graphs, and compute so many tokens at once; only before it begins."""
        self.keep_graphs = False
        if piece_tokens < self.piece_tokens:
            self._lay_out(piece_tokens)
        self._segments = self._plan_segments()

    def restart(self) -> bool:
        """
        Begin anew without what was computed, alone; the weights have not changed meanwhile.

        Refuses, with False, when nothing is left but the update.
        """
        if all(s.kind is SegmentKind.OPTIMIZER for s in self._segments):
            return False
        del self._hidden[1:]
        self._graphs.clear()
        self._gradient = None
        self._chunk_scores.clear()
        self._tops.clear()
        self._pulls.clear()
        self._learned, self._ridden, self._alone = 0, 0, True
        self._output = None
        if self._divided is not None:
            self._divided.restart()
        self._segments = self._plan_segments()
        return True

    # -- the segments ----------------------------------------------------------------

    def _plan_segments(self) -> list[Segment]:
        layers = len(self.model.layers)
        sizes = [self.tokens] if self._divided is None else self._divided.sizes
        backward = (SegmentKind.BACKWARD if self.keep_graphs
                    else SegmentKind.BACKWARD_RECOMPUTED)
        head = [Segment(SegmentKind.HEAD, len(rows)) for rows, *_ in self._targets]
        scoring = [Segment(SegmentKind.FORWARD, n) for n in sizes] * layers + head
        if not self.learns:
            return scoring
        whole = self._part_of or AccumulationWindow(0.0, self.tokens)
        return (scoring + (head if self.preferences else [])
                + [Segment(backward, n) for n in reversed(sizes)] * layers
                + [Segment(SegmentKind.OPTIMIZER, whole.tokens)] * whole.ends)

    def segments(self) -> Iterator[Segment]:
        """
        Return the segments left, in their order.

        A forward of which some tokens rode goes on riding; there are none before its end.
        """
        if 0 < self._ridden < self.tokens:
            return iter(())
        return iter(self._segments)

    @property
    def scored(self) -> bool:
        """Whether the loss of all tokens is known."""
        return len(self._chunk_scores) == len(self._targets)

    @property
    def done(self) -> bool:
        """Whether the weights are updated, or the gradients of a part kept."""
        return not self._segments

    def run_segment(self) -> Segment:
        """Run the next segment and return it."""
        segment = self._segments.pop(0)
        match segment.kind:
            case SegmentKind.FORWARD:
                with self._shown():
                    self._forward_layer(len(self._hidden) - 1)
            case SegmentKind.HEAD:
                self._head()
            case SegmentKind.BACKWARD | SegmentKind.BACKWARD_RECOMPUTED:
                self._backward_layer(len(self._hidden) - 1)
            case SegmentKind.OPTIMIZER:
                self.trainer.update()
        if self.done:
            if self.learns and segment.kind is not SegmentKind.OPTIMIZER:
                self.trainer.accumulate()
            self._release()
        return segment

    def _release(self) -> None:
        """Free the tensors of the step, whoever may still hold it for its scores."""
        self._hidden, self._calls, self._gradient, self._row = [], [], None, AttentionMetadata()
        self._divided = None

    def _layer(self, index: int, x: Tensor, *, again: bool = False) -> Tensor:
        """Return a layer's output for ``x``, ``[1, tokens and padding, width]``."""
        if self._static is None:
            return run_layer(self.model.layers[index], x, self._calls[index])
        self._static.begin(self, self._padded, self._calls, shared=self._shared)
        return self._static.run(index, x, again=again)

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """Show the directions what goes into the adapted layers."""
        adapters = self.model.adapters
        adapters.watch = None if self._directions is None else self._directions.watch
        try:
            yield
        finally:
            adapters.watch = None

    def _forward_layer(self, index: int) -> None:
        self._alone = True
        if self._divided is not None:
            self._forward_chunk(self._divided, index)
            return
        x = self._hidden[index][None]
        with torch.set_grad_enabled(self.keep_graphs), self.model.training(self._row):
            if self.keep_graphs:
                x = x.detach().requires_grad_()
            y = self._layer(index, x)
        if self.keep_graphs:
            self._graphs.append((x, y))
        self._hidden.append(y.detach()[0])

    def _forward_chunk(self, divided: ChunkedLayers, index: int) -> None:
        x = self._hidden[index]
        if self._output is None:
            self._output = torch.empty_like(x)
        if divided.forward(index, x, self._output, keep=self.learns):
            self._hidden.append(self._output)
            self._output = None

    def _head(self) -> None:
        """Score the next chunk, learn from it, or both."""
        chunk = self._learned if self.scored else len(self._chunk_scores)
        rows, tokens, shares, targets, probabilities = self._targets[chunk]
        learns = self.learns and (self.scored or not self.preferences)
        hidden = self._hidden[-1][rows].requires_grad_()
        with torch.set_grad_enabled(learns):
            logits = self.model.skeleton.logits(hidden)
        # By hand what autograd makes of a cross-entropy: with fewer passes over the vocabulary.
        with torch.no_grad():
            log_p = torch.log_softmax(logits, 1, dtype=torch.float32)
            if not self.scored:
                self._score(log_p, tokens)
            if not learns:
                return
            if self.preferences:
                if not self._pulls:
                    self._pulls = self._preferred()
                shares = shares + self._pulls[chunk]
            share = shares[:, None]
            gradient = log_p.exp_().mul_(share).scatter_add_(1, targets, -share * probabilities)
        logits.backward(gradient.to(logits.dtype))
        assert hidden.grad is not None
        if self._gradient is None:
            self._gradient = torch.zeros_like(self._hidden[-1])
        # The last token of what is shared may predict the first one of several answers.
        self._gradient.index_add_(0, rows, hidden.grad)
        self._learned += 1

    def _score(self, log_p: Tensor, tokens: Tensor) -> None:
        """Keep the scores of a chunk's tokens and, if nothing is learned, what may teach others."""
        right = log_p.gather(1, tokens[:, None])
        best_other = log_p.scatter(1, tokens[:, None], float('-inf')).amax(1, keepdim=True)
        self._chunk_scores.append(torch.cat([right, right - best_other], 1))
        if not self.learns:
            top = log_p.topk(min(SOFT_TARGET_TOKENS, log_p.shape[1]), 1)
            self._tops.append((top.indices, torch.softmax(top.values, 1)))

    def _preferred(self) -> list[Tensor]:
        """Return, chunk by chunk, how strongly the preferences pull at each row's token."""
        scores = self.scores()
        pulls = [0.0] * len(scores)
        for pair in self.preferences:
            lead = (scores[pair.better].log_probability * scores[pair.better].tokens
                    - scores[pair.worse].log_probability * scores[pair.worse].tokens)
            doubt = _sigmoid(-pair.beta * (lead - pair.reference))
            pulls[pair.better] += pair.beta * doubt / len(self.preferences)
            pulls[pair.worse] -= pair.beta * doubt / len(self.preferences)
        counts = torch.tensor([s.tokens for s in scores])
        rows = torch.tensor(pulls).repeat_interleave(counts).to(self.model.device)
        return list(rows.split([len(rows) for rows, *_ in self._targets]))

    def _backward_layer(self, index: int) -> None:
        """Backward through the layer before the last hidden state that is still held."""
        index -= 1
        if self._divided is not None:
            self._backward_chunk(self._divided, index)
            return
        self._start_backward(index)
        self._hidden.pop()
        if self._graphs:
            x, y = self._graphs.pop()
        else:
            x = self._hidden[index][None].detach().requires_grad_()
            with torch.enable_grad(), self.model.training(self._row):
                y = self._layer(index, x, again=True)
        assert self._gradient is not None
        y.backward(self._gradient[None])
        assert x.grad is not None
        self._gradient = x.grad[0]

    def _backward_chunk(self, divided: ChunkedLayers, index: int) -> None:
        if divided.is_whole(index):
            self._start_backward(index)
        assert self._gradient is not None
        if divided.backward(index, self._hidden[index], self._gradient):
            self._hidden.pop()

    def _start_backward(self, index: int) -> None:
        """Forget gradients that were given up on their way, if this is the last layer."""
        if index == len(self.model.layers) - 1:
            self.trainer.start_backward(anew=self._part_of is None or self._part_of.begins)

    def scores(self) -> list[SampleScore]:
        """Return each sample's score under the weights that the step began with."""
        table = torch.cat(self._chunk_scores).cpu()
        result, start = [], 0
        for sample in self.samples:
            count = sum(1 for w in sample.weights[1:] if w)
            part = table[start:start + count]
            start += count
            margin = float(part[:, 1].min()) if count else float('inf')
            result.append(SampleScore(
                log_probability=float(part[:, 0].mean()) if count else 0.0, tokens=count,
                exact=margin > 0, margin=margin))
        return result

    def soft_targets(self) -> list[Sample]:
        """Return the samples with what this version predicts as their teacher, if it scored."""
        tokens, probabilities = (torch.cat(part) for part in zip(*self._tops, strict=True))
        result, start = [], 0
        for sample in self.samples:
            rows = slice(start, start + sum(1 for w in sample.weights[1:] if w))
            start = rows.stop
            result.append(replace(
                sample, soft_targets=SoftTargets(tokens[rows], probabilities[rows])))
        return result


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0.0 else math.exp(x) / (1.0 + math.exp(x))
