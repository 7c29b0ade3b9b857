# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The bytes and texts of single tokens."""

from __future__ import annotations

from collections.abc import Collection
import threading

from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mace_ros.api.events import Logprob


class UnreadableVocabulary(RuntimeError):
    """The tokens of a tokenizer can't be read; the message is the library's."""


class Vocabulary:
    """The tokens of a model, indexed by their bytes; from any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_tokens: Collection[int],
                 size: int) -> None:
        """``size`` is the number of logits, ``end_tokens`` end an answer."""
        self.size = size
        self._tokenizer, self._end_tokens = tokenizer, sorted(end_tokens)
        self._lock = threading.Lock()
        self._index: LLTokenizer | None = None

    def index(self) -> LLTokenizer:
        """
        Return the index, which takes up to a second to make at the first call.

        Raises :class:`UnreadableVocabulary`.
        """
        with self._lock:
            if self._index is None:
                try:
                    self._index = from_tokenizer(
                        self._tokenizer, n_vocab=self.size, eos_token=self._end_tokens)
                except Exception as error:      # the library names no class
                    raise UnreadableVocabulary(str(error)) from error
            return self._index

    def logprob(self, token: int, value: float) -> Logprob:
        """Return the log-probability of a token with its text and bytes."""
        index = self.index()
        if index.is_special_token(token):
            return Logprob(token, str(self._tokenizer.convert_ids_to_tokens(token)), b'', value)
        found: bytes = index.decode_bytes([token])
        return Logprob(token, found.decode(errors='replace'), found, value)
