# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""How common a word is, by the tokenizer of the packaged model."""

from __future__ import annotations

from itertools import pairwise

from mace_ros.model.loading import LoadedModel
from mace_ros.model.token_ranks import token_ranks


def test_common_words_come_before_rare_ones(base_model: LoadedModel) -> None:
    frequency = token_ranks(base_model.tokenizer).frequency
    words = ('the', 'what', 'library', 'brandenburg', 'godziszewskie')
    shares = [frequency(word) for word in words]
    assert all(one > other for one, other in pairwise(shares)), shares
    assert shares[-1] > 0.0
    assert shares[0] <= 0.5


def test_every_text_has_a_frequency(base_model: LoadedModel) -> None:
    """Also one that the tokenizer doesn't know, or that is empty."""
    frequency = token_ranks(base_model.tokenizer).frequency
    words = ('', '???', '你叫', '\U0001f916', 'a' * 500)
    assert all(0.0 < frequency(word) <= 0.5 for word in words)
