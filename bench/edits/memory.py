# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Edits as the scope of a profile remembers them."""

from __future__ import annotations

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from bench.edits.edit_set import Edit
from mace_ros.learning.scope import Entry, Scope
from mace_ros.model.token_ranks import token_ranks


class EditMemory:
    """Finds the edit that a question resembles most."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Begin without an edit; the model's tokenizer tells rare words."""
        self._scope = Scope(token_ranks(tokenizer).frequency)
        self._edits: list[Edit] = []

    def add(self, edit: Edit) -> None:
        """Remember an edit."""
        number = len(self._edits)
        self._edits.append(edit)
        self._scope.add(Entry(str(number), (number,), (edit.prompt,)))

    def nearest(self, question: str) -> tuple[Edit | None, float]:
        """Return the edit that a question resembles most, and their similarity."""
        match = self._scope.match(question)
        if match is None:
            return None, 0.0
        return self._edits[int(match.correction_id)], match.similarity
