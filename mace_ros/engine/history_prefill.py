# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Which conversations to compute under the base model in idle time.

An adapter acts on the last user turn only. In the next question's prompt, the turn that an adapter
version answered is history, and needs keys and values of the base model: those of the adapter are
of no use. Computed in idle time, they cost no query anything.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

CONVERSATIONS = 16    # at most; the oldest are forgotten
CHUNK_TOKENS = 32     # of one request; an arriving query waits for at most one


class HistoryPrefill:
    """Remembers conversations whose last turn an adapter version answered."""

    def __init__(self) -> None:
        """Begin without a conversation."""
        self._todo: OrderedDict[str, Sequence[int]] = OrderedDict()
        self._cached = -1     # cached tokens of the first conversation at the last call of next()

    def note(self, conversation_id: str, ids: Sequence[int]) -> None:
        """Plan to compute a conversation, given by its last prompt with the answer."""
        self._todo[conversation_id] = ids
        if len(self._todo) > CONVERSATIONS:
            self._todo.popitem(last=False)

    def drop(self, conversation_id: str) -> None:
        """Forget a conversation that has continued without an adapter."""
        self._todo.pop(conversation_id, None)

    def clear(self) -> None:
        """Forget all conversations."""
        self._todo.clear()

    def next(self, cached_tokens: Callable[[Sequence[int]], int]) -> Sequence[int] | None:
        """
        Return the beginning of a conversation to compute now, a chunk longer than is cached.

        ``cached_tokens`` returns how much of a sequence is cached. None if nothing is left.
        """
        while self._todo:
            conversation_id, ids = next(iter(self._todo.items()))
            tokens = cached_tokens(ids)
            if self._cached < tokens < len(ids):
                self._cached = tokens
                return ids[:tokens + CHUNK_TOKENS]
            del self._todo[conversation_id]  # complete, or the last chunk found no room
            self._cached = -1
        return None
