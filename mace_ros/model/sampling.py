# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Sample the next token of each row of logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a request; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def sample(logits: Tensor, rows: Sequence[tuple[Sampling, int]]) -> Tensor:
    """
    Return one token id for each row of ``logits`` (``[rows, vocabulary]``, fp32): ``[rows]``.

    ``rows`` holds each row's sampling parameters and the number of tokens that its response
    has so far. A seed reproduces its response whatever else is in the batch. Does not wait for
    the device.
    """
    chosen = logits.argmax(-1)
    for i, (sampling, position) in enumerate(rows):
        if sampling.temperature > 0:
            chosen[i] = _draw(logits[i], sampling, position)
    return chosen


def _draw(logits: Tensor, sampling: Sampling, position: int) -> Tensor:
    # Subtract the maximum first, so that a tiny temperature does not overflow.
    probabilities = torch.softmax((logits - logits.max()) / sampling.temperature, -1)
    if sampling.top_p < 1.0:
        ordered, order = probabilities.sort(descending=True)
        # Keep each token that less than top_p precedes, and always the first.
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p
        outside[0] = False
        probabilities = torch.zeros_like(probabilities).scatter_(
            0, order, ordered.masked_fill(outside, 0.0))
    generator = torch.Generator(device=logits.device)
    generator.manual_seed((sampling.seed * 1_000_003 + position) % 2**63)
    return torch.multinomial(probabilities, 1, generator=generator)[0]
