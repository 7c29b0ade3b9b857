# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Choose the next token of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def sample(logits: Tensor, rows: Sequence[tuple[Sampling, int]]) -> Tensor:
    """
    Return one token id for each row of ``logits`` (``[rows, vocabulary]``, fp32): ``[rows]``.

    ``rows`` gives each row's sampling and how many tokens its answer has: a seed gives
    the same answer again, whatever else shares the batch. Does not wait for the device.
    """
    chosen = logits.argmax(-1)
    for i, (sampling, position) in enumerate(rows):
        if sampling.temperature > 0:
            chosen[i] = _draw(logits[i], sampling, position)
    return chosen


def _draw(logits: Tensor, sampling: Sampling, position: int) -> Tensor:
    # From the best one down, so that no temperature is too small to divide by.
    probabilities = torch.softmax((logits - logits.max()) / sampling.temperature, -1)
    if sampling.top_p < 1.0:
        ordered, order = probabilities.sort(descending=True)
        # Keep every token before which less than top_p is covered, and always the first.
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p
        outside[0] = False
        probabilities = torch.zeros_like(probabilities).scatter_(
            0, order, ordered.masked_fill(outside, 0.0))
    generator = torch.Generator(device=logits.device)
    generator.manual_seed((sampling.seed * 1_000_003 + position) % 2**63)
    return torch.multinomial(probabilities, 1, generator=generator)[0]
