# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Sample the next token of each row of logits.

The order is that of transformers: what :mod:`mace_ros.model.logit_changes` changes, temperature,
top_k, top_p, min_p. Rows are drawn by inverting their cumulative distribution at one uniform
number each, which depends on the row's seed and position only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mace_ros.model.logit_changes import change_logits, LogitChanges, places, to_device

# Candidates of a row that is sampled from its top_k best tokens: the next of these numbers, so
# that the rows of a batch are ordered together, and in the same way whatever else is in it.
CANDIDATES = (64, 1024)
MIN_TEMPERATURE = 1e-30     # smaller ones are not exact in fp32
NO_CHANGES = LogitChanges()


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a request; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0              # 0: all tokens
    min_p: float = 0.0
    changes: LogitChanges = NO_CHANGES
    # Tokens whose log-probabilities are reported beside the sampled one's; None reports nothing.
    alternatives: int | None = None

    @cached_property
    def is_plain(self) -> bool:
        """Whether the next token is the best one, and nothing else is asked for."""
        return self.temperature == 0 and self.changes.is_none and self.alternatives is None


class Row(NamedTuple):
    """
    What a row of logits is sampled by.

    ``ids`` are the token ids of prompt and output so far. ``mask`` has a bit for each token of
    the vocabulary, the lowest first: 1 if the token may be next. None allows all.
    """

    sampling: Sampling
    ids: Sequence[int] = ()
    prompt_tokens: int = 0
    mask: bytes | None = None


class Scores(NamedTuple):
    """Log-probabilities of a sampled token and of the best tokens as (token id, value)."""

    logprob: float
    best: list[tuple[int, float]]


class Sampled(NamedTuple):
    """The sampled tokens on the device, ``[rows]``, and the log-probabilities asked for."""

    tokens: Tensor
    reports: _Reports | None = None

    def scores(self) -> dict[int, Scores]:
        """Wait for the device; return the log-probabilities by row."""
        return {} if self.reports is None else self.reports.scores(self.tokens)


def sample(logits: Tensor, rows: Sequence[Row]) -> Sampled:
    """
    Sample one token for each row of ``logits`` (``[rows, vocabulary]``, fp32), which may change.

    A seed reproduces its response whatever else is in the batch. Does not wait for the device.
    """
    if all(row.mask is None and row.sampling.is_plain for row in rows):
        return Sampled(logits.argmax(-1))
    reports = _Reports.of(logits, rows)
    change_logits(logits, [(r.sampling.changes, r.ids, r.prompt_tokens, r.mask) for r in rows])
    tokens = logits.argmax(-1)
    for candidates, chosen in _grouped(rows, logits.shape[-1]).items():
        drawn = places(chosen, len(rows), logits.device)
        tokens[drawn] = _draw(logits[drawn], [rows[i] for i in chosen], candidates)
    return Sampled(tokens, reports)


# -- drawing -----------------------------------------------------------------------------


def _grouped(rows: Sequence[Row], vocabulary: int) -> Mapping[int, list[int]]:
    """Return the rows to draw by the number of best tokens to order; 0 needs no order."""
    groups: dict[int, list[int]] = {}
    for i, (sampling, *_) in enumerate(rows):
        if sampling.temperature > 0:
            candidates = 0
            if sampling.top_k or sampling.top_p < 1.0:
                sizes = (c for c in CANDIDATES if sampling.top_k <= c < vocabulary)
                candidates = next(sizes, vocabulary) if sampling.top_k else vocabulary
            groups.setdefault(candidates, []).append(i)
    return groups


def _draw(logits: Tensor, rows: Sequence[Row], candidates: int) -> Tensor:
    """Return a token for each row: ``[rows]``."""
    parameters = np.array([(
        max(s.temperature, MIN_TEMPERATURE), s.top_k or candidates, s.top_p, s.min_p)
        for s, *_ in rows], dtype=np.float32)
    uniform = uniforms([row.sampling.seed for row in rows],
                       [len(row.ids) - row.prompt_tokens for row in rows])
    temperature, top_k, top_p, min_p, u = to_device(
        np.column_stack([parameters, uniform]), logits.device).split(1, -1)
    if not candidates:
        best = logits.max(-1, keepdim=True)
        # Weights relative to the best token, so that a tiny temperature does not overflow.
        weights = ((logits - best.values) / temperature).exp()
        weights = weights.masked_fill(weights < min_p, 0.0)
        sums = weights.cumsum(-1)
        found = torch.searchsorted(sums, u * sums[:, -1:], right=True).clamp(
            max=logits.shape[-1] - 1)
        # On CUDA the sums may decrease by a rounding error, and the search then miss its token.
        return torch.where(weights.gather(-1, found) > 0, found, best.indices)[:, 0]
    ordered = (logits.topk(candidates) if candidates < logits.shape[-1]
               else logits.sort(dim=-1, descending=True, stable=True))
    weights = ((ordered.values - ordered.values[:, :1]) / temperature).exp()
    sums = weights.cumsum(-1)
    # Each limit keeps the tokens before a place in the order, and always the first.
    kept = top_k.long().clamp(max=candidates)
    mass = top_p * sums.gather(-1, kept - 1)
    for inside in (sums - weights < mass, (weights >= min_p) & (weights > 0)):
        kept = torch.minimum(kept, inside.sum(-1, keepdim=True)).clamp(min=1)
    found = torch.searchsorted(sums, u * sums.gather(-1, kept - 1), right=True)
    return ordered.indices.gather(-1, torch.minimum(found, kept - 1))[:, 0]


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """Return a number in [0, 1) for each seed and position, of 23 bits, which fp32 can hold."""
    state = _mixed(np.array([s % 2**64 for s in seeds], dtype=np.uint64))
    state = _mixed(state + np.array(positions, dtype=np.uint64))
    return ((state >> np.uint64(41)) / 2.0**23).astype(np.float32)


def _mixed(state: np.ndarray) -> np.ndarray:
    """Return the output of SplitMix64 for each state, modulo 2**64."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


# -- log-probabilities ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Reports:
    """The model's log-probabilities of the rows that asked for them."""

    rows: list[int]
    alternatives: list[int]     # wanted of each row
    logprobs: Tensor            # [len(rows), vocabulary]
    best: Any                   # values and indices of the best tokens

    @classmethod
    def of(cls, logits: Tensor, rows: Sequence[Row]) -> _Reports | None:
        """Compute the log-probabilities before the logits are changed."""
        wanted = {i: n for i, (sampling, *_) in enumerate(rows)
                  if (n := sampling.alternatives) is not None}
        if not wanted:
            return None
        logprobs = logits[places(list(wanted), len(rows), logits.device)].log_softmax(-1)
        return cls(list(wanted), list(wanted.values()), logprobs,
                   logprobs.topk(max(wanted.values())))

    def scores(self, tokens: Tensor) -> dict[int, Scores]:
        """Return the values of the sampled tokens and of the alternatives, by row."""
        sampled = self.logprobs.gather(-1, tokens[self.rows][:, None])[:, 0].tolist()
        ids, values = self.best.indices.tolist(), self.best.values.tolist()
        return {row: Scores(logprob, list(zip(ids[i][:n], values[i][:n], strict=True)))
                for i, (row, n, logprob) in enumerate(
                    zip(self.rows, self.alternatives, sampled, strict=True))}
