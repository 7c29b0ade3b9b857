# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Earlier turns of conversations: the context of a follow-up question."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field


@dataclass
class Turn:
    """A question and its answer."""

    query_id: str
    question: str
    answer: str


@dataclass
class Conversation:
    """The turns of a conversation, oldest first, and its system prompt."""

    system: str = ''
    turns: list[Turn] = field(default_factory=list)


class Conversations:
    """The most recently used conversations."""

    def __init__(self) -> None:
        """Begin without a conversation."""
        self._conversations: OrderedDict[str, Conversation] = OrderedDict()

    def get(self, conversation_id: str) -> Conversation:
        """Return a conversation, empty if it is new; the empty id is never kept."""
        if not conversation_id:
            return Conversation()
        return self._conversations.get(conversation_id) or Conversation()

    def reset(self, conversation_id: str) -> None:
        """Forget a conversation."""
        self._conversations.pop(conversation_id, None)

    def add(self, conversation_id: str, system: str, turn: Turn, *, max_turns: int,
            max_conversations: int) -> None:
        """
        Append a turn, and drop what exceeds the limits.

        Beyond ``max_turns`` the older half of the turns is dropped at once, so that prompts
        keep a common beginning, which the prefix cache can share, for many questions.
        """
        if not conversation_id:
            return
        conversation = self._conversations.setdefault(conversation_id, Conversation())
        self._conversations.move_to_end(conversation_id)
        conversation.system = system
        conversation.turns.append(turn)
        if len(conversation.turns) > max_turns:
            del conversation.turns[:len(conversation.turns) - (max_turns + 1) // 2]
        while len(self._conversations) > max_conversations:
            self._conversations.popitem(last=False)

    def correct(self, query_id: str, answer: str) -> None:
        """Replace a wrong answer by the corrected one, so that later prompts omit it."""
        for conversation in self._conversations.values():
            for turn in conversation.turns:
                if turn.query_id == query_id:
                    turn.answer = answer
