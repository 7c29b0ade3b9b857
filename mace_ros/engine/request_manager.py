# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""All active requests, from admission to the last event."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    TokenLogprobs,
)
from mace_ros.api.settings import Settings
from mace_ros.api.validation import check_logit_bias, checked_query, MAX_ID
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
from mace_ros.memory.adapter_slots import ServedVersion
from mace_ros.memory.block_hashes import BlockHashes
from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.model.chat import ChatTokenizer
from mace_ros.model.constraints import Constraint, ConstraintBroken
from mace_ros.model.sampling import Scores
from mace_ros.model.vocabulary import Vocabulary
from mace_ros.scheduling.kv_cache_manager import KVCacheManager
from mace_ros.scheduling.memory_arbiter import MemoryArbiter
from mace_ros.scheduling.plan import Rejection, State
from mace_ros.scheduling.request import RequestState

SHORT_TURN_TOKENS = 64      # a pass computes them in little more than the time of one token


class RequestManager:
    """Admits queries, appends their tokens, and ends them; on the device's thread."""

    def __init__(self, settings: Settings, *, chat: ChatTokenizer, state: State,
                 kv_cache: KVCacheManager, router: Router, adapters: AdapterCache,
                 recorder: AnswerRecorder, background: BackgroundRequests,
                 corrections: CorrectionIntake, memory: MemoryArbiter, context_length: int,
                 vocabulary: Vocabulary, answered: Callable[[str], None],
                 clock: Callable[[], float]) -> None:
        """
        Begin without a request.

        ``context_length`` is the model's; ``answered`` receives the id of each answer that
        learning may use. ``corrections`` is notified when queries begin and end.
        """
        self._settings, self._chat, self._state = settings, chat, state
        self._kv_cache, self._recorder = kv_cache, recorder
        self._router, self._adapters = router, adapters
        self._background, self._memory, self._context_length = background, memory, context_length
        self._answered, self._corrections, self._clock = answered, corrections, clock
        self._vocabulary = vocabulary
        self._active: dict[str, ActiveRequest] = {}     # by the id of its request
        self._queries: dict[str, ActiveRequest] = {}    # the first answer, until all have ended
        # Queries whose version is not on the device: it is read from disk, or running requests
        # hold all slots.
        self._without_slot: dict[str, ActiveRequest] = {}
        self._early_aborts = EarlyAborts()

    def __len__(self) -> int:
        """Return the number of active requests, silent ones included."""
        return len(self._active)

    def __contains__(self, request_id: object) -> bool:
        """Return whether a request is active."""
        return request_id in self._active

    def __getitem__(self, request_id: str) -> ActiveRequest:
        """Return an active request; raises ``KeyError`` if it has ended."""
        return self._active[request_id]

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

    def admit(self, query: Query, arrival: float,
              constraint: Constraint | InvalidQuery | None = None) -> list[Event]:
        """Queue a query, or return its rejection."""
        query = replace(query, id=query.id or str(uuid.uuid4()))
        try:
            self._check_id(query)
            query = checked_query(query, self._settings)
            check_logit_bias(query, self._vocabulary.size)
            if isinstance(constraint, InvalidQuery):
                raise constraint
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
            active.constraint = constraint
            active.add_choices(query.n, self._chat)
        except InvalidQuery as error:
            if error.code is not ErrorCode.DUPLICATE_ID and len(query.id) <= MAX_ID:
                self._early_aborts.ended(query.id)
            return [self.refuse(query, arrival, FinishReason.REJECTED, error.code, str(error))]
        except Exception as error:    # such as a bug of the chat template or tokenizer
            return [self.refuse(query, arrival, FinishReason.ERROR, ErrorCode.INTERNAL,
                                f'{type(error).__name__}: {error}')]
        events: list[Event] = []
        for query_id in self._background.abortable:
            if query_id in self._active:
                events += self.end(self._active[query_id], FinishReason.CANCELLED)
        self._corrections.query_admitted(query.id)
        events += self.start(active)
        if active.request.max_tokens == 0 and query.id in self._queries:
            events += self.end(active, FinishReason.LENGTH)
        return events

    def _check_id(self, query: Query) -> None:
        # The first check: any other rejection would be taken for the active query's response.
        if query.id in self._queries:
            raise InvalidQuery(
                ErrorCode.DUPLICATE_ID, f'id: a query {query.id!r} is active already')

    def refuse(self, query: Query, arrival: float, reason: FinishReason,
               code: ErrorCode = ErrorCode.NONE, error: str = '') -> Response:
        """Return the response to a query that is not admitted."""
        return Response(
            query.id, query.conversation_id, '', reason, code, error,
            e2e_ms=(self._clock() - arrival) * 1e3, origin=query.origin)

    def start(self, active: ActiveRequest) -> list[Event]:
        """
        Queue a request for scheduling; return its last events if the device fails.

        The first answer to a query is routed to a version. Without a slot for that, it is kept
        aside, and routed again when it is started again. Once it has a slot, it keeps the version.
        """
        self._active[active.request.id] = active
        if active is active.choices[0]:
            self._queries[active.query.id] = self._without_slot[active.query.id] = active
            if not active.is_silent or active.kind is RequestKind.HINT:
                active.route = self._router.route(
                    active.query.profile, active.messages, self._settings.adapter)
            try:
                slot = self._adapters.pin(active.version)
            except Exception as error:      # of the device
                return self.end(active, FinishReason.ERROR, ErrorCode.INTERNAL,
                                f'{type(error).__name__}: {error}')
            if slot is None:
                return []
            del self._without_slot[active.query.id]
            active.request.adapter_slot = slot
        # The hidden states of embeddings are not in the prefix cache.
        if active.kind is not RequestKind.EMBED and self._settings.memory.prefix_sharing:
            active.request.block_hashes = BlockHashes(
                active.version.identity, active.ids, BLOCK_TOKENS, active.adapted_from)
            active.request.shareable_tokens = _shareable_tokens(active)
            active.request.pass_ends = self._pass_ends(active)
        self._state.waiting.add(active.request)
        return []

    def _pass_ends(self, active: ActiveRequest) -> tuple[int, ...]:
        """
        Return where passes end in a prompt: at the full blocks before its first and its last turn.

        Others that begin alike share these blocks. Were they computed in one pass with the turn,
        its length would decide how they are rounded, and so the answers to other questions.
        """
        turns = {self._chat.first_turn(active.ids), active.adapted_from}
        ends = {turn // BLOCK_TOKENS * BLOCK_TOKENS for turn in turns}
        return tuple(sorted(ends - {0}))

    def version_read(self, version: ServedVersion) -> list[Event]:
        """Start the queries that waited for the file of a version."""
        events: list[Event] = [*self._adapters.damaged(version)]
        events += self._start_waiting()
        self._adapters.forget(version)
        return events

    def _start_waiting(self) -> list[Event]:
        """Start the queries without a slot, as far as their versions are on the device now."""
        return [event for waiting in list(self._without_slot.values())
                for event in self.start(waiting)]

    def _start_others(self, first: ActiveRequest) -> None:
        """Start the other answers to a query, which find the prompt in the prefix cache."""
        for choice in first.choices[1:]:
            choice.route, choice.request.arrival = first.route, self._clock()
            choice.request.adapter_slot = first.request.adapter_slot
            self.start(choice)

    def embed(self, texts: Sequence[str], done: Future[list[Embedding]]) -> None:
        """Queue a silent request for each text; ``done`` receives the embeddings."""
        for active in self._background.embeddings.requests(texts, done, self.max_length):
            self.start(active)

    # -- tokens ----------------------------------------------------------------------

    def commit(self, sampled: Sequence[ActiveRequest], tokens: Sequence[int],
               scores: Mapping[int, Scores]) -> Iterator[Event]:
        """Append one token to each request, and end those that are complete; yield their events."""
        now = self._clock()
        for i, (active, token) in enumerate(zip(sampled, tokens, strict=True)):
            try:
                logprobs = self._logprobs(token, scores[i]) if i in scores else None
                chunk = active.append(token, now, self._chat.end_tokens, logprobs)
            except ConstraintBroken as error:     # the client's format, found out only now
                yield from self.end(active, FinishReason.ERROR, ErrorCode.INVALID_PARAMETER,
                                    f'response_schema: {error}')
                continue
            except Exception as error:    # of a tokenizer with its own tokens
                yield from self.end(active, FinishReason.ERROR, ErrorCode.INTERNAL,
                                    f'{type(error).__name__}: {error}')
                continue
            if active.request.output_tokens == 1 and not active.is_silent:
                self._corrections.answer_begun(active.query.id, active.query.conversation_id)
            if chunk is not None and not active.is_silent:
                yield chunk
            if active.request.output_tokens == 1 and active is active.choices[0]:
                self._start_others(active)
            if active.finish is not None:
                yield from self.end(active, active.finish)

    def _logprobs(self, token: int, scores: Scores) -> TokenLogprobs:
        return TokenLogprobs(
            self._vocabulary.logprob(token, scores.logprob),
            tuple([self._vocabulary.logprob(*best) for best in scores.best]))

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
        first = self._queries.get(query_id)
        if first is None:
            self._early_aborts.cancelled(query_id, self._clock())
        if first is None or first.is_silent:
            return []
        return [event for choice in first.choices if choice.outcome is None
                for event in self.end(choice, FinishReason.CANCELLED)]

    def cancel_all(self) -> list[Event]:
        """End all requests; first those that would otherwise take the adapter slots of others."""
        return [event for active in [*self._without_slot.values(), *self._active.values()]
                if active.request.id in self._active
                for event in self.end(active, FinishReason.CANCELLED)]

    def reject(self, rejections: Iterable[Rejection]) -> list[Event]:
        """End the requests that the scheduler has rejected."""
        return [event for rejection in rejections for event in self.end(
            self._active[rejection.request.id], FinishReason.REJECTED,
            ErrorCode.PROMPT_TOO_LONG if rejection.too_large else ErrorCode.SLO_UNREACHABLE,
            rejection.reason)]

    def fail(self, request_ids: Iterable[str], reason: str) -> list[Event]:
        """End the requests of a failed pass, unless they have ended."""
        return [event for request_id in request_ids if request_id in self._active
                for event in self.end(self._active[request_id], FinishReason.ERROR,
                                      ErrorCode.INTERNAL, reason)]

    def end(self, active: ActiveRequest, reason: FinishReason,
            code: ErrorCode = ErrorCode.NONE, error: str = '') -> list[Event]:
        """Take a request out of the engine; return its last events."""
        first, events = active.choices[0], list[Event]()
        # Answers that still wait for the first one's prompt end with it.
        waiting = [c for c in first.choices
                   if c.outcome is None and c.request.id not in self._active]
        for choice in (active, *waiting):
            choice.outcome, choice.error_code, choice.error = reason, code, error
            if choice.request.id in self._active:
                self._free(choice)
            # A query that is rejected has no stream, unless another answer has begun it.
            streams = reason is not FinishReason.REJECTED or any(c.chunks for c in first.choices)
            if streams and not choice.closed and not choice.is_silent:
                chunk = choice.closing_chunk()
                events += [] if chunk is None else [chunk]
        return events if first.is_open else [*events, *self._end_query(first)]

    def _end_query(self, first: ActiveRequest) -> list[Event]:
        """End a query whose answers have all ended; return its response."""
        query_id, events = first.query.id, list[Event]()
        del self._queries[query_id]
        self._early_aborts.ended(query_id)
        had_slot = self._without_slot.pop(query_id, None) is None
        if had_slot:
            self._adapters.unpin(first.version)
        if not first.is_silent:
            if first.request.output_tokens:
                self._record(first, complete=first.outcome in COMPLETE)
            self._corrections.query_ended(query_id)
            events.append(first.response(self._clock()))
        return [*events, *self._start_waiting()] if had_slot else events

    def _free(self, active: ActiveRequest) -> None:
        """Take one request out of the engine."""
        del self._active[active.request.id]
        if active.is_silent:    # while it has its blocks, which may be read
            self._background.ended(active, active.reason, active.error)
        if active.query.id not in self._without_slot:
            self._kv_cache.free(active.request)

    def _record(self, active: ActiveRequest, *, complete: bool) -> None:
        self._background.answered(active)
        if self._recorder.record(active, self._settings, complete=complete):
            self._answered(active.query.id)


def _shareable_tokens(active: ActiveRequest) -> int | None:
    """
    Return how much of a prompt may come from the prefix cache; None for all of it.

    A short last turn is computed whole: a pass of another length rounds in another way, so the
    answer could change if the question, or one that begins like it, was asked before.
    """
    turn = active.adapted_from
    is_short = 0 < turn < len(active.ids) <= turn + SHORT_TURN_TOKENS
    return turn if is_short and active is active.choices[0] else None


def queue_full(limit: int) -> str:
    """Return the reason of an OVERLOADED rejection."""
    return counted(limit, 'query waits already (scheduler.max_queue)',
                   'queries wait already (scheduler.max_queue)')
