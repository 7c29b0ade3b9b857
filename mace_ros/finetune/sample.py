# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Training samples, their soft targets and preferences, and their packing into one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class SoftTargets:
    """
    Distillation targets for each weighted token of a sample.

    The most likely tokens under another version, ``[weighted tokens, candidates]``, and their
    probabilities, which sum to 1 for each weighted token.
    """

    tokens: Tensor
    probabilities: Tensor


@dataclass(frozen=True)
class Sample:
    """
    A training sequence, with a weight for the prediction of each token.

    ``weights[i]`` belongs to ``tokens[i]`` and is 0 for prompt tokens; the first token is never
    predicted. With ``soft_targets``, these are learned instead of the tokens. The adapter acts
    on the tokens from ``adapted_from`` on; those before it are the base model's.
    """

    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    soft_targets: SoftTargets | None = field(default=None, compare=False)
    adapted_from: int = 0

    def __post_init__(self) -> None:
        """Check that the lengths match."""
        if len(self.tokens) != len(self.weights) or len(self.tokens) < 2:
            raise ValueError('a sample needs two or more tokens and a weight for each')
        if self.adapted_from and any(self.weights[:self.adapted_from + 1]):
            raise ValueError('the adapter must act on the token before the first weighted one')

    @property
    def prefix(self) -> tuple[int, ...]:
        """Tokens before those that the adapter acts on."""
        return self.tokens[:self.adapted_from]

    @property
    def own_tokens(self) -> int:
        """Number of tokens that a step computes for the sample."""
        return len(self.tokens) - self.adapted_from

    @property
    def prompt(self) -> tuple[int, ...]:
        """Tokens before the first weighted one."""
        first = next((i for i, w in enumerate(self.weights) if w), len(self.tokens))
        return self.tokens[:first]

    @property
    def weighted_tokens(self) -> int:
        """Number of tokens whose prediction has a weight."""
        return sum(1 for w in self.weights[1:] if w)


@dataclass(frozen=True)
class Preference:
    """
    A pair of a step's samples, by index: ``better`` is to become more likely than ``worse``.

    Direct preference optimisation (Rafailov et al. 2023): the loss is -log sigmoid(beta *
    (lead - reference)), where ``lead`` is log p(better) - log p(worse), summed over the
    weighted tokens, and ``reference`` is the same under the reference adapter.
    """

    better: int
    worse: int
    reference: float
    beta: float = 0.1


@dataclass(frozen=True)
class SampleScore:
    """How well the adapter at the start of a step predicts one sample's weighted tokens."""

    log_probability: float   # mean per token
    tokens: int
    exact: bool              # whether greedy decoding gives these tokens
    margin: float            # smallest lead of a target's logit over the best other logit


def attended_tokens(prefix: int) -> int:
    """Return the tokens whose memory equals what a sequence needs to attend to its prefix."""
    # Keys and values of one layer, and the attention of its own tokens to them.
    return 1 + prefix // 32 if prefix else 0


class PackedSamples:
    """The adapted tokens of samples, packed one after the other, and the prefixes before them."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = tuple(samples)
        # Each prefix once, in order of appearance; and the index of each sample's, -1 for none.
        self.prefixes = list(dict.fromkeys(s.prefix for s in samples if s.prefix))
        self.prefix_of = tuple(
            self.prefixes.index(s.prefix) if s.prefix else -1 for s in samples)
        self.lengths = tuple(s.own_tokens for s in samples)
        self.tokens = sum(self.lengths)

    @property
    def ids(self) -> list[int]:
        """Token ids, ``[tokens]``."""
        return [t for s in self.samples for t in s.tokens[s.adapted_from:]]

    @property
    def positions(self) -> list[int]:
        """Position of each token in its sequence, ``[tokens]``."""
        return [i for s in self.samples for i in range(s.adapted_from, len(s.tokens))]
