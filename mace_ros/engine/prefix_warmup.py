# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
What a new adapter version is made to read in idle time, before anybody asks.

Keys and values are a version's own: with each publication all that was shared must be
computed again. The next query would pay for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

SYSTEMS, CONVERSATIONS = 8, 16     # that are remembered, the ones used last
PIECE_TOKENS = 32     # computed at once: a query that comes waits no longer than for these


@dataclass(frozen=True)
class WarmupChunk:
    """The beginning of something that is worth knowing: tokens of which the last are new."""

    profile: str
    ids: Sequence[int]


class PrefixWarmup:
    """Remembers how prompts begin, and hands it out again piece by piece."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._systems: OrderedDict[tuple[str, str], list[int]] = OrderedDict()
        self._conversations: OrderedDict[tuple[str, str], list[int]] = OrderedDict()
        self._todo: list[tuple[str, list[int]]] = []
        self._known = -1     # tokens of the first of them, at the last look

    def note(self, profile: str, system: str, conversation_id: str, prompt: Sequence[int],
             ids: Sequence[int]) -> None:
        """Take in a prompt, and all ids with its answer."""
        key = profile, system
        before = self._systems.get(key)
        # What prompts with one system prompt have in common is that, as the template puts it.
        common = takewhile(lambda pair: pair[0] == pair[1], zip(
            prompt, prompt if before is None else before, strict=False))
        _keep(self._systems, key, [token for token, _ in common], SYSTEMS)
        if conversation_id:
            _keep(self._conversations, (profile, conversation_id), list(ids), CONVERSATIONS)

    def begin(self, concerns: Callable[[str], bool], most_tokens: int) -> None:
        """Plan what is to be read by those profiles, system prompts first; not too much."""
        self._todo, self._known = [], -1
        for remembered in (self._systems, self._conversations):
            for (profile, _), ids in reversed(remembered.items()):
                if concerns(profile) and len(ids) <= most_tokens:
                    most_tokens -= len(ids)
                    self._todo.append((profile, ids))

    def stop(self) -> None:
        """Plan nothing."""
        self._todo.clear()

    def next(self, known: Callable[[str, Sequence[int]], int]) -> WarmupChunk | None:
        """Return what to read next; ``known`` tells how many tokens of it are in the cache."""
        while self._todo:
            profile, ids = self._todo[0]
            tokens = known(profile, ids)
            if self._known < tokens < len(ids):
                self._known = tokens
                return WarmupChunk(profile, ids[:tokens + PIECE_TOKENS])
            del self._todo[0]    # read, or there is no room for it
            self._known = -1
        return None


def _keep(remembered: OrderedDict[tuple[str, str], list[int]], key: tuple[str, str],
          ids: list[int], most: int) -> None:
    remembered[key] = ids
    remembered.move_to_end(key)
    if len(remembered) > most:
        remembered.popitem(last=False)
