# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Silent requests of the engine itself: anchors for learning, and prefix warm-up."""

from __future__ import annotations

from collections.abc import Callable

from mace_ros.api.settings import Settings
from mace_ros.api.validation import checked_query
from mace_ros.engine.active_request import (
    ActiveRequest,
    build_request,
    build_warmup,
    RequestKind,
)
from mace_ros.engine.anchor_requests import AnchorRequests
from mace_ros.engine.conversations import Conversation
from mace_ros.engine.prefix_warmup import PrefixWarmup
from mace_ros.memory.adapter_slots import AdapterSlots
from mace_ros.memory.block_hashes import BlockHashes
from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.model.chat import ChatTokenizer
from mace_ros.scheduling.kv_cache_manager import KVCacheManager
from mace_ros.scheduling.plan import State


class BackgroundRequests:
    """Builds silent internal requests."""

    def __init__(self, *, chat: ChatTokenizer, state: State, kv_cache: KVCacheManager,
                 slots: AdapterSlots, anchors: AnchorRequests,
                 clock: Callable[[], float]) -> None:
        """Begin without a request."""
        self._chat, self._state, self._kv_cache, self._slots = chat, state, kv_cache, slots
        self._clock = clock
        self._anchors = anchors
        self._prefixes = PrefixWarmup()
        self._warmup: ActiveRequest | None = None

    # -- anchors ---------------------------------------------------------------------

    @property
    def anchors_remaining(self) -> int:
        """Questions that the base model has to answer before anything is learned."""
        return self._anchors.remaining

    @property
    def anchor_answers(self) -> list[tuple[list[int], list[int]]] | None:
        """The base model's answers as (prompt ids, output ids); None until all are known."""
        return self._anchors.answers

    def next_anchors(self, settings: Settings, max_length: int, *,
                     overdue: bool) -> list[ActiveRequest]:
        """Return the anchor requests to start now; see :meth:`AnchorRequests.next`."""
        while queries := self._anchors.next(self._state, overdue=overdue):
            built = [build_request(
                checked_query(query, settings), self._clock(), Conversation(), self._chat, '',
                max_length, RequestKind.ANCHOR) for query in queries]
            unknown = [active for active in built
                       if not self._anchors.answer_known(active.query.id, active.ids)]
            if unknown:
                return unknown
        return []

    # -- prefix warm-up --------------------------------------------------------------

    def note_prefix(self, active: ActiveRequest, system: str) -> None:
        """Remember how the prompt of an answered query begins."""
        query = active.query
        self._prefixes.note(
            query.profile, system, query.conversation_id, active.prompt, active.ids)

    def published(self, profile: str) -> None:
        """Plan the warm-up of a profile's new version."""
        self._prefixes.begin(
            lambda other: self._slots.live(other).profile == profile,
            self._kv_cache.capacity_tokens // 2)

    def next_warmup(self, *, sharing: bool) -> ActiveRequest | None:
        """Return a warm-up request to start, if the engine is idle and one is planned."""
        if self._state.has_requests:
            return None
        if not sharing:
            self._prefixes.stop()
        chunk = self._prefixes.next(lambda profile, ids: self._kv_cache.cached_tokens(BlockHashes(
            self._slots.live(profile).identity, ids, BLOCK_TOKENS), len(ids)))
        if chunk is not None:
            self._warmup = build_warmup(chunk.ids, chunk.profile, self._clock(), self._chat)
        return self._warmup if chunk is not None else None

    # -- ends ------------------------------------------------------------------------

    @property
    def abortable(self) -> list[str]:
        """The ids of the requests that an arriving query aborts."""
        warmup = [self._warmup.query.id] if self._warmup is not None else []
        return [*warmup, *self._anchors.abortable]

    def ended(self, active: ActiveRequest, *, complete: bool) -> None:
        """Take the outcome of a silent request."""
        if active.kind is RequestKind.WARMUP:
            self._warmup = None
        else:
            self._anchors.ended(
                active.query.id, active.prompt, active.output, complete=complete)
