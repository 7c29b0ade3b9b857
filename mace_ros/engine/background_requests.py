# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Silent requests of the engine itself; :mod:`mace_ros.engine.hint_answers` has those for hints."""

from __future__ import annotations

from collections.abc import Callable, Container

from mace_ros.api.events import FinishReason
from mace_ros.api.settings import Settings
from mace_ros.api.validation import checked_query
from mace_ros.engine.active_request import (
    ActiveRequest,
    build_prefill,
    build_request,
    COMPLETE,
    PREFILL_ID,
    RequestKind,
)
from mace_ros.engine.anchor_requests import AnchorRequests
from mace_ros.engine.conversations import Conversation
from mace_ros.engine.embeddings import EmbedRequests
from mace_ros.engine.hint_answers import HintAnswers
from mace_ros.engine.history_prefill import HistoryPrefill
from mace_ros.engine.paged_kv_cache import PagedKVCache
from mace_ros.memory.adapter_slots import BASE_IDENTITY
from mace_ros.memory.block_hashes import BlockHashes
from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.model.chat import ChatTokenizer
from mace_ros.model.prefix_kv import PrefixKV
from mace_ros.scheduling.kv_cache_manager import KVCacheManager
from mace_ros.scheduling.plan import State


class BackgroundRequests:
    """Builds silent requests, and takes their outcomes."""

    def __init__(self, *, chat: ChatTokenizer, state: State, kv_cache: KVCacheManager,
                 paged: PagedKVCache, anchors: AnchorRequests, hints: HintAnswers,
                 clock: Callable[[], float]) -> None:
        """Begin without a request; ``hints`` builds those that answer hints."""
        self._chat, self._state, self._kv_cache, self._paged = chat, state, kv_cache, paged
        self._clock = clock
        self._anchors, self.hints, self.embeddings = anchors, hints, EmbedRequests(chat, clock)
        self._history = HistoryPrefill()
        # A prefix that was computed, or why it could not be.
        self._prefix: tuple[tuple[int, ...], PrefixKV | str] | None = None

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

    # -- conversations ---------------------------------------------------------------

    def answered(self, active: ActiveRequest) -> None:
        """Note that a conversation must be computed again, if an adapter gave its last answer."""
        query = active.query
        # A conversation that the client keeps has no id, but may go on all the same.
        conversation_id = query.conversation_id or (query.id if query.messages else '')
        if conversation_id and active.version.version and active.adapted_from:
            self._history.note(conversation_id, active.ids)
        else:
            self._history.drop(conversation_id)

    def next_history(self, *, sharing: bool) -> ActiveRequest | None:
        """Return a request that computes a part of a conversation, if the engine is idle."""
        if self._state.has_requests:
            return None
        if not sharing:
            self._history.clear()
        ids = self._history.next(lambda ids: self._kv_cache.cached_tokens(
            BlockHashes(BASE_IDENTITY, ids, BLOCK_TOKENS), len(ids)))
        if ids is None:
            return None
        return build_prefill(RequestKind.HISTORY, ids, self._clock(), self._chat)

    # -- prefixes of training samples ------------------------------------------------

    def prefix(self, ids: tuple[int, ...], active: Container[str], *,
               urgent: bool) -> PrefixKV | ActiveRequest | None:
        """
        Return a prefix of a training sample, the request that computes it, or None meanwhile.

        ``active`` holds the ids of the active requests. Raises ``RuntimeError`` if the prefix
        could not be computed.
        """
        computed, self._prefix = self._prefix, None
        if computed is not None and computed[0] == ids:
            if isinstance(computed[1], PrefixKV):
                return computed[1]
            raise RuntimeError(computed[1])
        request = build_prefill(
            RequestKind.PREFIX, ids, self._clock(), self._chat, urgent=urgent)
        return None if request.query.id in active else request

    # -- ends ------------------------------------------------------------------------

    @property
    def abortable(self) -> list[str]:
        """The ids of the requests that an arriving query aborts."""
        return [f'{PREFILL_ID}{RequestKind.HISTORY.name}', *self._anchors.abortable]

    def ended(self, active: ActiveRequest, reason: FinishReason, error: str) -> None:
        """Take the outcome of a silent request, which still has its KV blocks."""
        complete = reason in COMPLETE
        if active.kind is RequestKind.ANCHOR:
            self._anchors.ended(
                active.query.id, active.prompt, active.output, complete=complete)
        elif active.kind is RequestKind.EMBED:
            self.embeddings.ended(active, reason, error)
        elif active.kind is RequestKind.HINT:
            self.hints.ended(active, reason, error)
        elif active.kind is RequestKind.PREFIX and reason is not FinishReason.CANCELLED:
            ids = tuple(active.prompt)
            prefix: PrefixKV | str = error
            try:
                if complete:
                    prefix = self._paged.read_prefix(active.request.blocks, len(ids))
            except Exception as broken:    # the request must end even so
                prefix = f'{type(broken).__name__}: {broken}'
            self._prefix = ids, prefix
