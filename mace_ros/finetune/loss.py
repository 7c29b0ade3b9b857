# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The head of a fine-tune step: scores of all weighted tokens, and the gradient of the loss.

The loss is the weighted mean cross-entropy of all weighted tokens, plus the mean loss of all
preferences. A sample that is ``worse`` in a preference has no cross-entropy. Since a preference
couples two sequences, the head then runs twice: to score all tokens, and to learn from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
import math
from typing import NamedTuple

import torch
from torch import Tensor

from mace_ros.finetune.sample import PackedSamples, Preference, Sample, SampleScore, SoftTargets
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.workspace import Workspace

# Candidates that soft targets keep for each weighted token.
SOFT_TARGET_TOKENS = 32


class _Chunk(NamedTuple):
    """Weighted tokens of one HEAD segment; each tensor begins with ``[weighted tokens]``."""

    rows: Tensor            # packed tokens whose logits predict them
    tokens: Tensor          # their ids
    shares: Tensor          # of each in the cross-entropy
    targets: Tensor         # [..., candidates] token ids
    probabilities: Tensor   # [..., candidates]


class HeadLoss:
    """Computes scores and gradients from the last hidden states, one chunk at a time."""

    def __init__(self, model: PackedModel, packed: PackedSamples, *, head_tokens: int,
                 learns: bool, preferences: Sequence[Preference],
                 total_weight: float | None) -> None:
        """
        Split the weighted tokens into chunks of ``head_tokens``.

        ``total_weight`` normalises the cross-entropy; None is the weight of these samples.
        """
        self._model = model
        self._samples = packed.samples
        self._learns = learns
        self._preferences = tuple(preferences)
        imitated = [1.0] * len(self._samples)
        for pair in self._preferences:
            imitated[pair.worse] = 0.0
        self._columns = self._gather(packed, imitated, total_weight)
        self._chunks = self._split(head_tokens)
        self._workspace = Workspace(model.device)
        # Of the last layer's output, [tokens and padding, width]; the backward takes it.
        self._gradient: Tensor | None = None
        self.restart()

    def restart(self) -> None:
        """Drop all scores and gradients."""
        self._gradient = None
        self._scores: list[Tensor] = []
        self._candidates: list[tuple[Tensor, Tensor]] = []
        self._preference_shares: list[Tensor] = []      # of each chunk's rows
        self._learned = 0                               # chunks whose gradient is computed
        self.release()

    def release(self) -> None:
        """Free the memory that chunks take while they run."""
        self._workspace.clear()

    @property
    def sizes(self) -> list[int]:
        """Weighted tokens of each chunk."""
        return [len(chunk.rows) for chunk in self._chunks]

    @property
    def runs_twice(self) -> bool:
        """Whether all chunks are scored before the first one is learned from."""
        return bool(self._preferences)

    @property
    def scored(self) -> bool:
        """Whether all chunks are scored."""
        return len(self._scores) == len(self._chunks)

    def take_gradient(self) -> Tensor:
        """Return the gradient of the last hidden states, and keep nothing but the scores."""
        self.release()
        gradient, self._gradient = self._gradient, None
        assert gradient is not None
        return gradient

    # -- chunks ----------------------------------------------------------------------

    def limit(self, head_tokens: int) -> None:
        """Split larger chunks into such of ``head_tokens``; only before the first one has run."""
        if max(self.sizes) > head_tokens:
            self._chunks = self._split(head_tokens)

    def _split(self, head_tokens: int) -> list[_Chunk]:
        return [_Chunk(*parts)
                for parts in zip(*(c.split(head_tokens) for c in self._columns), strict=True)]

    def _gather(self, packed: PackedSamples, imitated: Sequence[float],
                total_weight: float | None) -> tuple[Tensor, ...]:
        """Return the columns of a chunk, for all weighted tokens."""
        rows, tokens, weights, start = [], [], [], 0
        for sample, factor in zip(self._samples, imitated, strict=True):
            for i in range(1, len(sample.tokens)):
                if sample.weights[i]:
                    rows.append(start + i - 1 - sample.adapted_from)
                    tokens.append(sample.tokens[i])
                    weights.append(sample.weights[i] * factor)
            start += sample.own_tokens
        total = math.fsum(weights) if total_weight is None else total_weight
        shares = torch.tensor(weights) / (total or 1.0)
        device = self._model.device
        return (torch.tensor(rows, device=device), torch.tensor(tokens, device=device),
                shares.to(device), *self._targets(tokens))

    def _targets(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return candidates and their probabilities: soft targets, or 1 for the token itself."""
        soft = [s.soft_targets for s in self._samples]
        candidates = max((t.tokens.shape[1] for t in soft if t is not None), default=1)
        targets = self._model.tensor(tokens)[:, None].repeat(1, candidates)
        probabilities = torch.zeros(len(tokens), candidates, device=self._model.device)
        probabilities[:, 0] = 1.0
        for rows, own in zip(self._rows_by_sample(), soft, strict=True):
            if own is not None:
                targets[rows], probabilities[rows] = own.tokens, own.probabilities
        return targets, probabilities

    def _rows_by_sample(self) -> list[slice]:
        """Return the slice of each sample among all weighted tokens."""
        slices, start = [], 0
        for sample in self._samples:
            slices.append(slice(start, start + sample.weighted_tokens))
            start = slices[-1].stop
        return slices

    def run_chunk(self, last_hidden: Tensor) -> None:
        """
        Score the next chunk, learn from it, or both.

        ``last_hidden`` is the last layer's output, ``[tokens and padding, width]``.
        """
        scored = self.scored
        index = self._learned if scored else len(self._scores)
        chunk = self._chunks[index]
        rows, tokens, shares = chunk.rows, chunk.tokens, chunk.shares
        learns = self._learns and (scored or not self.runs_twice)
        hidden = last_hidden[rows].requires_grad_()
        with torch.set_grad_enabled(learns):
            logits = self._model.shell.logits(hidden)
        # By hand, since autograd would make more passes over the vocabulary, each in fresh memory.
        with torch.no_grad():
            values, probabilities = (self._workspace.tensor(name, logits.shape, torch.float32)
                                     for name in ('values', 'probabilities'))
            values.copy_(logits)
            torch.softmax(values, 1, out=probabilities)
            if not scored:
                self._score(values, probabilities, tokens)
            if not learns:
                return
            if self.runs_twice:
                if not self._preference_shares:
                    self._preference_shares = self._compute_preference_shares()
                shares = shares + self._preference_shares[index]
            share = shares[:, None]
            probabilities.mul_(share).scatter_add_(1, chunk.targets, -share * chunk.probabilities)
            gradient = self._workspace.tensor('gradient', logits.shape, logits.dtype)
            gradient.copy_(probabilities)
        logits.backward(gradient)
        assert hidden.grad is not None
        if self._gradient is None:
            self._gradient = torch.zeros_like(last_hidden)
        self._gradient[rows] = hidden.grad
        self._learned += 1

    def _score(self, values: Tensor, probabilities: Tensor, tokens: Tensor) -> None:
        """
        Store the scores of a chunk, and soft targets if the step does not learn.

        ``values`` are the logits, ``[tokens, vocabulary]``; those of the targets are overwritten.
        """
        if not self._learns:
            top = values.topk(min(SOFT_TARGET_TOKENS, values.shape[1]), 1)
            self._candidates.append((top.indices, torch.softmax(top.values, 1)))
        tokens = tokens[:, None]
        target = values.gather(1, tokens)
        values.scatter_(1, tokens, float('-inf'))
        best_other = values.amax(1, keepdim=True)
        # Log-sum-exp of the logits: the largest one, less the logarithm of its probability.
        normaliser = torch.maximum(target, best_other) - probabilities.amax(1, keepdim=True).log()
        self._scores.append(torch.cat([target - normaliser, target - best_other], 1))

    def _compute_preference_shares(self) -> list[Tensor]:
        """Return what the preferences add to the shares of each chunk's rows."""
        scores = self.scores()
        shares = [0.0] * len(scores)
        for pair in self._preferences:
            lead = (scores[pair.better].log_probability * scores[pair.better].tokens
                    - scores[pair.worse].log_probability * scores[pair.worse].tokens)
            factor = pair.beta * _sigmoid(-pair.beta * (lead - pair.reference))
            shares[pair.better] += factor / len(self._preferences)
            shares[pair.worse] -= factor / len(self._preferences)
        counts = torch.tensor([s.tokens for s in scores])
        rows = torch.tensor(shares).repeat_interleave(counts).to(self._model.device)
        return list(rows.split(self.sizes))

    # -- results ---------------------------------------------------------------------

    def scores(self) -> list[SampleScore]:
        """Return each sample's score."""
        table = torch.cat(self._scores).cpu()
        result = []
        for rows in self._rows_by_sample():
            part, count = table[rows], rows.stop - rows.start
            margin = float(part[:, 1].min()) if count else float('inf')
            result.append(SampleScore(
                log_probability=float(part[:, 0].mean()) if count else 0.0, tokens=count,
                exact=margin > 0, margin=margin))
        return result

    def soft_targets(self) -> list[Sample]:
        """Return the samples with this version's predictions as soft targets."""
        tokens, probabilities = (
            torch.cat(part) for part in zip(*self._candidates, strict=True))
        return [replace(sample, soft_targets=SoftTargets(tokens[rows], probabilities[rows]))
                for sample, rows in zip(self._samples, self._rows_by_sample(), strict=True)]


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0.0 else math.exp(x) / (1.0 + math.exp(x))
