# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The frequency of words, estimated from the model's own tokenizer.

A tokenizer's vocabulary is in the order of frequency in its training text, in every language of
the model: the tokens of common words come first, and a rare word needs several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

CACHED_WORDS = 50000
MAX_PIECES = 6      # a word of more tokens is no rarer


class TokenRanks:
    """Estimates the frequency of words from the ranks of their tokens."""

    def __init__(self, encode: Callable[[str], Sequence[int]], *, first: int, size: int) -> None:
        """
        Use a tokenizer: ``encode`` returns a text's token ids, without special tokens.

        The ids of its vocabulary of ``size`` that are in order of frequency begin at ``first``.
        """
        self._encode, self._first, self._size = encode, first, size
        self.frequency = lru_cache(maxsize=CACHED_WORDS)(self._estimate)

    def _estimate(self, word: str) -> float:
        """Return the share of texts that have the word, above 0 and up to 0.5."""
        # Tokens differ with the case of the first letter, and with a space before it.
        spellings = (f' {word}', f' {word.capitalize()}', word, word.capitalize())
        return max(self._of_tokens(self._encode(spelling)) for spelling in spellings)

    def _of_tokens(self, ids: Sequence[int]) -> float:
        if len(ids) == 1:       # Zipf's law: the frequency is about one over the rank
            return 1 / (2 + max(ids[0] - self._first, 0))
        return 2.0 ** -min(len(ids), MAX_PIECES) / self._size


def token_ranks(tokenizer: PreTrainedTokenizerBase) -> TokenRanks:
    """Return the ranks of a model's tokenizer."""
    special = set(tokenizer.all_special_ids)
    ids = [i for token, i in tokenizer.get_vocab().items()
           if len(token) > 1 and not token.startswith('<') and i not in special]
    plain = tokenizer.backend_tokenizer
    return TokenRanks(
        lambda text: plain.encode(text, add_special_tokens=False).ids,
        first=min(ids, default=0), size=max(len(tokenizer), 1))
