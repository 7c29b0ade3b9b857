# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""All active requests, from admission to the last event."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
import uuid

from mace_ros.api.events import (
    ErrorCode,
    Event,
    FinishReason,
    InvalidQuery,
    Query,
    Response,
    ResponseChunk,
)
from mace_ros.api.settings import Settings
from mace_ros.api.validation import checked_query, MAX_ID
from mace_ros.api.wording import counted
from mace_ros.engine.active_request import (
    ActiveRequest,
    build_request,
    COMPLETE,
    RequestKind,
)
from mace_ros.engine.adapter_cache import AdapterCache
from mace_ros.engine.answer_recorder import AnswerRecorder
from mace_ros.engine.background_requests import BackgroundRequests
from mace_ros.engine.correction_intake import CorrectionIntake
from mace_ros.engine.early_aborts import EarlyAborts
from mace_ros.engine.embeddings import Embedding
from mace_ros.engine.router import Router
from mace_ros.memory.block_hashes import BlockHashes
from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.model.chat import ChatTokenizer
from mace_ros.scheduling.kv_cache_manager import KVCacheManager
from mace_ros.scheduling.memory_arbiter import MemoryArbiter
from mace_ros.scheduling.plan import Rejection, State
from mace_ros.scheduling.request import RequestState


class RequestManager:
    """Admits queries, appends their tokens, and ends them; on the device's thread."""

    def __init__(self, settings: Settings, *, chat: ChatTokenizer, state: State,
                 kv_cache: KVCacheManager, router: Router, adapters: AdapterCache,
                 recorder: AnswerRecorder, background: BackgroundRequests,
                 corrections: CorrectionIntake, memory: MemoryArbiter, context_length: int,
                 answered: Callable[[str], None], clock: Callable[[], float]) -> None:
        """
        Begin without a request.

        ``context_length`` is the model's; ``answered`` receives the id of each answer that
        learning may use. ``corrections`` may have to wait for the end of an answer.
        """
        self._settings, self._chat, self._state = settings, chat, state
        self._kv_cache, self._recorder = kv_cache, recorder
        self._router, self._adapters = router, adapters
        self._background, self._memory, self._context_length = background, memory, context_length
        self._answered, self._corrections, self._clock = answered, corrections, clock
        self._active: dict[str, ActiveRequest] = {}
        # Those whose version is not on the device: running requests hold all slots.
        self._without_slot: dict[str, ActiveRequest] = {}
        self._early_aborts = EarlyAborts()

    def __len__(self) -> int:
        """Return the number of active requests, silent ones included."""
        return len(self._active)

    def __contains__(self, query_id: object) -> bool:
        """Return whether a request is active."""
        return query_id in self._active

    def __getitem__(self, query_id: str) -> ActiveRequest:
        """Return an active request; raises ``KeyError`` if it has ended."""
        return self._active[query_id]

    @property
    def max_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return min(self._context_length, self._memory.max_request_tokens)

    @property
    def queue_depth(self) -> int:
        """User requests that have not been scheduled yet."""
        return len(self._without_slot) + sum(
            r.started_at is None and not self._active[r.id].is_silent
            for r in self._state.waiting)

    def update(self, settings: Settings) -> list[Event]:
        """Use other settings, and shorten answers that no longer fit the KV cache."""
        self._settings = settings
        return self._fit()

    # -- admission -------------------------------------------------------------------

    def admit(self, query: Query, arrival: float) -> list[Event]:
        """Queue a query, or return its rejection."""
        query = replace(query, id=query.id or str(uuid.uuid4()))
        try:
            self._check(query)
            query = checked_query(query, self._settings)
            limit = self._settings.scheduler.max_queue
            if self.queue_depth >= limit:
                raise InvalidQuery(ErrorCode.OVERLOADED, queue_full(limit))
            if self._early_aborts.take(query.id, self._clock()):
                return [ResponseChunk(query.id, 0, '', True, query.origin),
                        self.refuse(query, arrival, FinishReason.CANCELLED)]
            conversations = self._recorder.conversations
            if query.reset_conversation:
                conversations.reset(query.conversation_id)
            active = build_request(
                query, arrival, conversations.get(query.conversation_id), self._chat,
                self._settings.generation.system, self.max_length)
        except InvalidQuery as error:
            if error.code is not ErrorCode.DUPLICATE_ID and len(query.id) <= MAX_ID:
                self._early_aborts.ended(query.id)
            return [self.refuse(query, arrival, FinishReason.REJECTED, error.code, str(error))]
        except Exception as error:    # such as a chat template that refuses the conversation
            return [self.refuse(query, arrival, FinishReason.ERROR, ErrorCode.INTERNAL,
                                f'{type(error).__name__}: {error}')]
        for query_id in self._background.abortable:
            if query_id in self._active:
                self.end(self._active[query_id], FinishReason.CANCELLED)
        events = self.start(active)
        self._corrections.query_admitted(query.id)
        if active.request.max_tokens == 0:
            events += self.end(active, FinishReason.LENGTH)
        return events

    def _check(self, query: Query) -> None:
        # First of all checks: any other rejection would be taken for the active query's response.
        if query.id in self._active:
            raise InvalidQuery(
                ErrorCode.DUPLICATE_ID, f'id: a query {query.id!r} is active already')

    def refuse(self, query: Query, arrival: float, reason: FinishReason,
               code: ErrorCode = ErrorCode.NONE, error: str = '') -> Response:
        """Return the response to a query that is not admitted."""
        return Response(
            query.id, query.conversation_id, '', reason, code, error,
            e2e_ms=(self._clock() - arrival) * 1e3, origin=query.origin)

    def start(self, active: ActiveRequest) -> list[Event]:
        """Queue a request for scheduling; it keeps the version in whose scope it is now."""
        query = active.query
        self._active[query.id] = self._without_slot[query.id] = active
        if not active.is_silent or active.kind is RequestKind.HINT:
            active.route = self._router.route(
                query.profile, active.messages, self._settings.adapter)
        try:
            slot = self._adapters.pin(active.version)
        except Exception as error:      # of the device
            return self.end(active, FinishReason.ERROR, ErrorCode.INTERNAL,
                            f'{type(error).__name__}: {error}')
        if slot is not None:
            del self._without_slot[query.id]
            active.request.adapter_slot = slot
            if active.kind is not RequestKind.EMBED:    # whose every token is to be computed
                active.request.block_hashes = BlockHashes(
                    active.version.identity, active.ids, BLOCK_TOKENS, active.adapted_from)
            self._state.waiting.add(active.request)
        return []

    def embed(self, texts: Sequence[str], done: Future[list[Embedding]]) -> None:
        """Queue a silent request for each text; ``done`` receives the embeddings."""
        for active in self._background.embeddings.requests(texts, done, self.max_length):
            self.start(active)

    # -- tokens ----------------------------------------------------------------------

    def commit(self, sampled: Sequence[ActiveRequest],
               tokens: Sequence[int]) -> Iterator[Event]:
        """Append one token to each request, and end those that are complete."""
        now = self._clock()
        for active, token in zip(sampled, tokens, strict=True):
            try:
                chunk = active.append(token, now, self._chat.end_tokens)
            except Exception as error:    # a tokenizer that can't decode its own tokens
                yield from self.end(active, FinishReason.ERROR, ErrorCode.INTERNAL,
                                    f'{type(error).__name__}: {error}')
                continue
            if active.request.output_tokens == 1 and not active.is_silent:
                self._corrections.answer_begun(active.query.id, active.query.conversation_id)
            if chunk is not None and not active.is_silent:
                yield chunk
            if active.finish is not None:
                yield from self.end(active, active.finish)

    def _fit(self) -> list[Event]:
        """Shorten the answers that would grow beyond the KV cache."""
        events: list[Event] = []
        max_length = self.max_length
        for active in list(self._active.values()):
            request = active.request
            room = max_length - request.prompt_tokens
            begun = request.state is RequestState.RUNNING or request.output_tokens
            if request.max_total_tokens <= max_length or not begun or (
                    room < 1 and not request.output_tokens):
                continue    # it fits, or the scheduler will reject it
            request.max_tokens = max(room, request.output_tokens)
            if request.max_tokens == request.output_tokens:
                events += self.end(active, FinishReason.LENGTH)
        return events

    # -- ends ------------------------------------------------------------------------

    def cancel(self, query_id: str) -> list[Event]:
        """End a query early, even if it arrives after its cancellation."""
        active = self._active.get(query_id)
        if active is None:
            self._early_aborts.cancelled(query_id, self._clock())
        if active is None or active.is_silent:
            return []
        return self.end(active, FinishReason.CANCELLED)

    def cancel_all(self) -> list[Event]:
        """End all requests."""
        return [event for active in list(self._active.values())
                for event in self.end(active, FinishReason.CANCELLED)]

    def reject(self, rejections: Iterable[Rejection]) -> list[Event]:
        """End the requests that the scheduler has rejected."""
        return [event for rejection in rejections for event in self.end(
            self._active[rejection.request.id], FinishReason.REJECTED,
            ErrorCode.PROMPT_TOO_LONG if rejection.too_large else ErrorCode.SLO_UNREACHABLE,
            rejection.reason)]

    def fail(self, query_ids: Iterable[str], reason: str) -> list[Event]:
        """End the requests of a failed pass, unless they have ended."""
        return [event for query_id in query_ids if query_id in self._active
                for event in self.end(self._active[query_id], FinishReason.ERROR,
                                      ErrorCode.INTERNAL, reason)]

    def end(self, active: ActiveRequest, reason: FinishReason,
            code: ErrorCode = ErrorCode.NONE, error: str = '') -> list[Event]:
        """Take a request out of the engine; return its last events."""
        query = active.query
        del self._active[query.id]
        self._early_aborts.ended(query.id)
        complete = reason in COMPLETE
        if active.is_silent:    # while it has its blocks, which may be read
            self._background.ended(active, reason, error)
        events: list[Event] = []
        if self._without_slot.pop(query.id, None) is None:
            self._kv_cache.free(active.request)
            self._adapters.unpin(active.version)
            for waiting in list(self._without_slot.values()):
                events += self.start(waiting)
        if active.is_silent:
            return events
        if active.request.output_tokens:
            self._record(active, complete=complete)
        self._corrections.query_ended(query.id)
        closed = active.closed or reason is FinishReason.REJECTED
        closing = [] if closed else [active.last_chunk()]
        return [*closing, active.response(reason, self._clock(), code, error), *events]

    def _record(self, active: ActiveRequest, *, complete: bool) -> None:
        self._background.answered(active)
        if self._recorder.record(active, self._settings, complete=complete):
            self._answered(active.query.id)


def queue_full(limit: int) -> str:
    """Return the reason of an OVERLOADED rejection."""
    return counted(limit, 'query waits already (scheduler.max_queue)',
                   'queries wait already (scheduler.max_queue)')
