# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Earlier turns of conversations, so that a follow-up question has its context."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field


@dataclass
class Turn:
    """One question and its answer."""

    query_id: str
    question: str
    answer: str


@dataclass
class Conversation:
    """The turns of one conversation, oldest first, and its system prompt."""

    system: str = ''
    turns: list[Turn] = field(default_factory=list)


class Conversations:
    """The conversations used last; the oldest turns and conversations are forgotten."""

    def __init__(self) -> None:
        self._all: OrderedDict[str, Conversation] = OrderedDict()

    def get(self, conversation_id: str) -> Conversation:
        """Return a conversation, empty if it is new; the empty id is never kept."""
        if not conversation_id:
            return Conversation()
        return self._all.get(conversation_id) or Conversation()

    def reset(self, conversation_id: str) -> None:
        """Forget a conversation."""
        self._all.pop(conversation_id, None)

    def add(self, conversation_id: str, system: str, turn: Turn, *, max_turns: int,
            max_conversations: int) -> None:
        """
        Append a turn, and forget what is beyond the limits.

        Of more than ``max_turns`` the older half goes at once: prompts begin alike until then,
        and what they begin with need not be computed again for each question.
        """
        if not conversation_id:
            return
        conversation = self._all.setdefault(conversation_id, Conversation())
        self._all.move_to_end(conversation_id)
        conversation.system = system
        conversation.turns.append(turn)
        if len(conversation.turns) > max_turns:
            del conversation.turns[:len(conversation.turns) - (max_turns + 1) // 2]
        while len(self._all) > max_conversations:
            self._all.popitem(last=False)

    def correct(self, query_id: str, answer: str) -> None:
        """Put the corrected answer in the place of the wrong one, so that it isn't context."""
        for conversation in self._all.values():
            for turn in conversation.turns:
                if turn.query_id == query_id:
                    turn.answer = answer
