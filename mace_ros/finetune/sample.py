# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Training samples, their soft targets and preferences, and their packing into one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

# Length from which a common prefix of all prompts is computed only once.
MIN_SHARED_TOKENS = 8


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
    predicted. With ``soft_targets``, these are learned instead of the tokens.
    """

    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    soft_targets: SoftTargets | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Check that the lengths match."""
        if len(self.tokens) != len(self.weights) or len(self.tokens) < 2:
            raise ValueError('a sample needs two or more tokens and a weight for each')

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


def shared_tokens(samples: Sequence[Sample]) -> int:
    """Return the length of the common prefix of all prompts, or 0 if it is too short to share."""
    if len(samples) < 2:
        return 0
    # Each sample keeps at least one token of its own, so that there is something to compute.
    prompts = [s.prompt[:len(s.tokens) - 1] for s in samples]
    first, last = min(prompts), max(prompts)    # their common prefix is that of all prompts
    count = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
                 min(len(first), len(last)))
    return count if count >= MIN_SHARED_TOKENS else 0


def copied_tokens(shared: int) -> int:
    """Return the tokens whose memory equals a sequence's copy of a ``shared`` prefix."""
    # Keys and values of one layer, and the attention of its own tokens to them.
    return 1 + shared // 32 if shared else 0


def packed_tokens(samples: Sequence[Sample]) -> int:
    """Return the number of tokens that a step over these samples computes."""
    return sum(len(s.tokens) for s in samples) - shared_tokens(samples) * (len(samples) - 1)


class PackedSamples:
    """Samples packed one after the other; a shared prefix is a sequence of its own before them."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = tuple(samples)
        self.shared = shared_tokens(samples)
        # The tokens of each packed sequence, and the position of its first token.
        self.sequences = [(s.tokens[self.shared:], self.shared) for s in samples]
        if self.shared:
            self.sequences.insert(0, (samples[0].tokens[:self.shared], 0))
        self.lengths = tuple(len(tokens) for tokens, _ in self.sequences)
        self.tokens = sum(self.lengths)

    @property
    def ids(self) -> list[int]:
        """Token ids, ``[tokens]``."""
        return [t for tokens, _ in self.sequences for t in tokens]

    @property
    def positions(self) -> list[int]:
        """Position of each token in its sequence, ``[tokens]``."""
        return [first + i for tokens, first in self.sequences for i in range(len(tokens))]
