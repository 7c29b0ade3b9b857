# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The base model's keys and values for what comes before the trained tokens of samples."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping

from mace_ros.finetune.sample import Sample
from mace_ros.learning.task import Pause, Task
from mace_ros.memory.budget import PREFIX_TOKENS
from mace_ros.model.prefix_kv import PrefixKV


class Prefixes(Mapping[tuple[int, ...], PrefixKV]):
    """
    Prefixes by their token ids, the most recently used ones.

    Most samples have the same prefix: the system prompt.
    """

    def __init__(self) -> None:
        """Begin without a prefix."""
        self._known: OrderedDict[tuple[int, ...], PrefixKV] = OrderedDict()
        self.wanted: tuple[int, ...] | None = None      # by a task that waits for it

    def __getitem__(self, ids: tuple[int, ...]) -> PrefixKV:
        """Return a prefix; ``KeyError`` if it is not known."""
        return self._known[ids]

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        """Return the known prefixes, the least recently used one first."""
        return iter(self._known)

    def __len__(self) -> int:
        """Return the number of known prefixes."""
        return len(self._known)

    def give(self, ids: tuple[int, ...], prefix: PrefixKV) -> None:
        """Add a prefix."""
        self._known[ids] = prefix

    def prepare(self, samples: Iterable[Sample]) -> Task[None]:
        """Wait until the prefixes of all samples are known; forget others beyond the limit."""
        needed = dict.fromkeys(s.prefix for s in samples if s.prefix)
        try:
            for ids in needed:
                while ids not in self._known:
                    self.wanted = ids
                    yield Pause.PREFIX
                self._known.move_to_end(ids)
        finally:
            self.wanted = None
        others = [ids for ids in self._known if ids not in needed]
        tokens = sum(map(len, self._known))
        while others and tokens > PREFIX_TOKENS:
            tokens -= len(others[0])
            del self._known[others.pop(0)]
