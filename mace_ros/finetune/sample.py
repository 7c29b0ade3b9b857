# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What a fine-tune step learns from: sequences, what teaches them, and how well they are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

# Tokens that prompts must have in common to be computed once for all of them.
LEAST_SHARED = 8


@dataclass(frozen=True)
class SoftTargets:
    """
    What another version would predict, for each weighted token of a sample.

    Its most likely tokens, ``[weighted tokens, some]``, and their probabilities, which add
    up to 1.
    """

    tokens: Tensor
    probabilities: Tensor


@dataclass(frozen=True)
class Sample:
    """
    A training sequence: its tokens, and how much the prediction of each one counts.

    ``weights[i]`` belongs to ``tokens[i]`` and is 0 for prompt tokens (the first token
    is never predicted). With a ``teacher`` its predictions are learned, not the tokens.
    """

    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    soft_targets: SoftTargets | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Check that the lengths fit."""
        if len(self.tokens) != len(self.weights) or len(self.tokens) < 2:
            raise ValueError('a sample needs two or more tokens and a weight for each')

    @property
    def prompt(self) -> tuple[int, ...]:
        """Tokens before the first one that has a weight."""
        first = next((i for i, w in enumerate(self.weights) if w), len(self.tokens))
        return self.tokens[:first]


def shared_tokens(samples: Sequence[Sample]) -> int:
    """Return how many tokens all prompts begin with, if it pays to compute them once."""
    if len(samples) < 2:
        return 0
    # One token of each is its own, so that there is something to compute.
    prompts = [s.prompt[:len(s.tokens) - 1] for s in samples]
    first, last = min(prompts), max(prompts)    # what these have in common, all have
    count = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
                 min(len(first), len(last)))
    return count if count >= LEAST_SHARED else 0


def copied_tokens(shared: int) -> int:
    """Return how many tokens take as much memory as what each sequence copies of ``shared``."""
    # Keys and values of one layer, and how much its own tokens look at them.
    return 1 + shared // 32 if shared else 0


def packed_tokens(samples: Sequence[Sample]) -> int:
    """Return how many tokens a step over these samples computes."""
    return sum(len(s.tokens) for s in samples) - shared_tokens(samples) * (len(samples) - 1)


@dataclass(frozen=True)
class Preference:
    """
    Of a step's samples, by index: ``better`` is to become likelier than ``worse``.

    Direct preference optimisation (Rafailov et al. 2023): the loss is -log sigmoid(beta *
    (lead - reference)), where ``lead`` is log p(better) - log p(worse), summed over the
    weighted tokens, and ``reference`` the same under the reference adapter.
    """

    better: int
    worse: int
    reference: float
    beta: float = 0.1


@dataclass(frozen=True)
class SampleScore:
    """How the adapter that a step began with does on one sample's weighted tokens."""

    log_probability: float   # mean per token
    tokens: int
    exact: bool              # every token is the most likely one: greedy decoding gives it
    margin: float            # smallest lead of a right token's logit over the best other one
