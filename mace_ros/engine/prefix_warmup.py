# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Which prompt beginnings to compute in idle time after an adapter version was published.

Keys and values belong to one adapter version, so a publication makes the shared prefixes of
the version before useless. Without warm-up, the next query would pay for computing them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

# Prefixes that are remembered, the most recently used ones.
SYSTEM_PROMPTS, CONVERSATIONS = 8, 16
CHUNK_TOKENS = 32     # computed at once; an arriving query waits for one chunk at most


@dataclass(frozen=True)
class WarmupChunk:
    """A beginning of a prefix, of which the last tokens are not in the cache yet."""

    profile: str
    ids: Sequence[int]


class PrefixWarmup:
    """Remembers prompt beginnings, and returns them again chunk by chunk."""

    def __init__(self) -> None:
        """Begin without a prefix."""
        self._systems: OrderedDict[tuple[str, str], list[int]] = OrderedDict()
        self._conversations: OrderedDict[tuple[str, str], list[int]] = OrderedDict()
        self._todo: list[tuple[str, list[int]]] = []
        self._cached = -1     # tokens of the first prefix that were cached at the last look

    def note(self, profile: str, system: str, conversation_id: str, prompt: Sequence[int],
             ids: Sequence[int]) -> None:
        """Remember a prompt, and ``ids``: the prompt with its answer."""
        key = profile, system
        before = self._systems.get(key)
        # The common beginning of prompts with one system prompt is how the template renders it.
        common = takewhile(lambda pair: pair[0] == pair[1], zip(
            prompt, prompt if before is None else before, strict=False))
        _remember(self._systems, key, [token for token, _ in common], SYSTEM_PROMPTS)
        if conversation_id:
            _remember(self._conversations, (profile, conversation_id), list(ids), CONVERSATIONS)

    def begin(self, concerns: Callable[[str], bool], max_tokens: int) -> None:
        """
        Plan to compute the prefixes of the profiles that ``concerns`` selects.

        System prompts come first; the prefixes have at most ``max_tokens`` tokens together.
        """
        self._todo, self._cached = [], -1
        for remembered in (self._systems, self._conversations):
            for (profile, _), ids in reversed(remembered.items()):
                if concerns(profile) and len(ids) <= max_tokens:
                    max_tokens -= len(ids)
                    self._todo.append((profile, ids))

    def stop(self) -> None:
        """Drop the plan."""
        self._todo.clear()

    def next(self, cached_tokens: Callable[[str, Sequence[int]], int]) -> WarmupChunk | None:
        """Return the next chunk; ``cached_tokens`` returns how much of a prefix is cached."""
        while self._todo:
            profile, ids = self._todo[0]
            tokens = cached_tokens(profile, ids)
            if self._cached < tokens < len(ids):
                self._cached = tokens
                return WarmupChunk(profile, ids[:tokens + CHUNK_TOKENS])
            del self._todo[0]    # complete, or the last chunk found no room in the cache
            self._cached = -1
        return None


def _remember(remembered: OrderedDict[tuple[str, str], list[int]], key: tuple[str, str],
              ids: list[int], limit: int) -> None:
    remembered[key] = ids
    remembered.move_to_end(key)
    if len(remembered) > limit:
        remembered.popitem(last=False)
