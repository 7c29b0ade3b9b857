# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Sample the next token of each row of logits.

The order is that of transformers: what :mod:`mace_ros.model.logit_changes` changes, temperature,
top_k, top_p, min_p. A token is drawn as the winner of an exponential race: the largest ratio of
probability and an exponential random number, which depends on seed, position and token only. So
what else is in a batch changes a draw only where the two best ratios are equal but for rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mace_ros.model.logit_changes import change_logits, LogitChanges, places
from mace_ros.model.upload import to_device

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
        """Whether sampling is the argmax of unchanged logits, without log-probabilities."""
        return self.temperature == 0 and self.changes.is_none and self.alternatives is None


class Row(NamedTuple):
    """
    The sampling parameters and the history of a row of logits.

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


def sample(logits: Tensor, rows: Sequence[Row], best: Tensor | None = None) -> Sampled:
    """
    Sample one token for each row of ``logits`` (``[rows, vocabulary]``, fp32), which may change.

    ``best`` are the tokens of the largest logits, ``[rows]``, if they are known already; where all
    rows are greedy, they are returned.
    A seed reproduces its response whatever else is in the batch. Does not wait for the device.
    """
    if all(row.mask is None and row.sampling.is_plain for row in rows):
        return Sampled(logits.argmax(-1) if best is None else best)
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
    device = logits.device
    temperature, top_k, top_p, min_p = to_device(np.array([(
        max(s.temperature, MIN_TEMPERATURE), s.top_k or candidates, s.top_p, s.min_p)
        for s, *_ in rows], dtype=np.float32), device).split(1, -1)
    states = to_device(_states(
        [row.sampling.seed for row in rows],
        [len(row.ids) - row.prompt_tokens for row in rows])[:, None], device)
    if not candidates:
        tokens = torch.arange(logits.shape[-1], device=device)
        # Relative to the best token, so that a tiny temperature does not overflow.
        scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
        scaled.masked_fill_(scaled < min_p.log(), -torch.inf)
        return (scaled - _exponentials(states, tokens).log_()).argmax(-1)
    values, tokens = (logits.topk(candidates) if candidates < logits.shape[-1]
                      else logits.sort(dim=-1, descending=True, stable=True))
    scaled = (values - values[:, :1]) / temperature
    weights = scaled.exp()
    sums = weights.cumsum(-1)
    # Each limit keeps the tokens before a place in the order, and always the first.
    kept = top_k.long().clamp(max=candidates)
    mass = top_p * sums.gather(-1, kept - 1)
    for inside in (sums - weights < mass, weights >= min_p):
        kept = torch.minimum(kept, inside.sum(-1, keepdim=True)).clamp(min=1)
    scaled.masked_fill_(torch.arange(candidates, device=device) >= kept, -torch.inf)
    best = (scaled - _exponentials(states, tokens).log_()).argmax(-1, keepdim=True)
    return tokens.gather(-1, best)[:, 0]


def _states(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """Return a random number of 64 bits for each seed and position, by SplitMix64."""
    state = np.zeros(len(seeds), dtype=np.uint64)
    for values in (seeds, positions):
        state = state + np.array([v % 2**64 for v in values], dtype=np.uint64)
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state.astype(np.int64)


def _exponentials(states: Tensor, tokens: Tensor) -> Tensor:
    """
    Return an exponentially distributed number for each row's state (``[rows, 1]``) and token.

    The same for a state and token on any device. It has the relative precision of fp32 near 0.
    """
    # Multiplications are modulo 2**64; these are the factors of SplitMix64 as signed numbers.
    mixed = tokens * -0x61C8864680B583EB + states
    # Right shifts copy the sign, which the masks remove.
    mixed ^= mixed >> 32 & 2**32 - 1
    mixed *= -0x40A7B892E31B1A47
    mixed ^= mixed >> 29 & 2**35 - 1
    mixed *= -0x6B2FB644ECCEEE15
    mixed ^= mixed >> 32 & 2**32 - 1
    uniform = (mixed >> 24 & 2**40 - 1).to(torch.float32) * 2.0**-40
    return -torch.log1p(-uniform.clamp_(2.0**-41, 1 - 2.0**-24))


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
