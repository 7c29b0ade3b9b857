# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Training samples: making, weighting, and picking them in rotation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from mace_ros.finetune.sample import Sample
from mace_ros.model.chat import ChatTokenizer

T = TypeVar('T')


def first_within(samples: list[Sample], tokens: int, *, at_least: int = 0) -> list[Sample]:
    """Return the first samples that fit into ``tokens``, and no fewer than ``at_least``."""
    count = total = 0
    for each in samples:
        total += each.own_tokens
        if total > tokens and count >= at_least:
            break
        count += 1
    return samples[:count]


def rotate(samples: Sequence[T], count: int, offset: int) -> list[T]:
    """Return batch ``offset`` of ``count`` samples; over all batches each comes equally often."""
    if not samples:
        return []
    return [samples[i % len(samples)] for i in range(offset * count, (offset + 1) * count)]


def sample(chat: ChatTokenizer, prompt: Sequence[int], answer: Sequence[int],
           weight: float = 1.0) -> Sample:
    """
    Return a sample of an answer to a prompt, given by their token ids.

    Its loss is on the answer only; ``weight`` is that of each token. The adapter acts from the
    last user turn of the prompt on.
    """
    return Sample((*prompt, *answer), (0.0,) * len(prompt) + (weight,) * len(answer),
                  adapted_from=chat.adapted_from(prompt))


def weighted(sample: Sample, factor: float) -> Sample:
    """Return a sample whose weights are multiplied by ``factor``."""
    return replace(sample, weights=tuple(factor * w for w in sample.weights))


def interleaved(many: Sequence[T], few: Sequence[T]) -> list[T]:
    """Return all items, those of ``few`` spread evenly among ``many``."""
    result = list(many)
    every = len(many) // (len(few) + 1) + 1
    for i, each in enumerate(few):
        result.insert(i * every, each)
    return result
