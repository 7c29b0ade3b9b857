# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The base model with the nearest correction in its prompt."""

from __future__ import annotations

from collections.abc import Sequence
import time

from bench.edits.baselines.plain_model import Conversation, PlainModel, user_turn
from bench.edits.edit_set import Edit
from bench.edits.edited_model import Learned, Reply
from bench.edits.memory import EditMemory
from mace_ros.api.settings import Settings


class InPrompt:
    """
    Puts the correction that a question resembles before it, as an earlier turn.

    Retrieval and its threshold are those of the node's scope: only what is done with the
    correction differs.
    """

    def __init__(self, settings: Settings, seed: int) -> None:
        """Load the model."""
        self._plain = PlainModel(settings, seed)
        self._memory = EditMemory(self._plain.chat.tokenizer)
        self._threshold = settings.adapter.scope_threshold

    def ask(self, questions: Sequence[str]) -> list[Reply]:
        """Return the answers to questions."""
        return self._plain.ask([self._conversation(question) for question in questions])

    def _conversation(self, question: str) -> Conversation:
        edit, similarity = self._memory.nearest(question)
        if edit is None or similarity < self._threshold:
            return [user_turn(question)]
        return [user_turn(edit.prompt), {'role': 'assistant', 'content': edit.target},
                user_turn(question)]

    def learn(self, edits: Sequence[Edit]) -> list[Learned]:
        """Remember the edits."""
        began = time.monotonic()
        for edit in edits:
            self._memory.add(edit)
        return [Learned('', 'LEARNED', time.monotonic() - began)] * len(edits)

    def restart(self) -> None:
        """Do nothing: only the robot is measured after a restart."""

    def close(self) -> None:
        """Do nothing: the model is freed with this object."""
