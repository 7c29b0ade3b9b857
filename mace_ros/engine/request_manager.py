# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
All that is being answered, from the door to the last event.

That is what others ask, and what nobody hears: questions to the base model, whose answers
are to stay, and what a new version reads before it is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
import time
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
from mace_ros.api.validation import checked_query, MAX_ID, MAX_UNWRITTEN
from mace_ros.engine.active_request import ActiveRequest, begin, reading
from mace_ros.engine.anchor_requests import AnchorRequests
from mace_ros.engine.conversations import Conversations, Turn
from mace_ros.engine.early_aborts import EarlyAborts
from mace_ros.engine.prefix_warmup import PrefixWarmup
from mace_ros.learning.learner import Learner
from mace_ros.memory.adapter_slots import AdapterSlots, BASE_IDENTITY
from mace_ros.memory.block_hashes import BlockHashes
from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.model.chat import ChatTokenizer
from mace_ros.model.lora import BASE_SLOT
from mace_ros.scheduling.kv_cache_manager import KVCacheManager
from mace_ros.scheduling.plan import State
from mace_ros.scheduling.request import RequestState
from mace_ros.store.journal import AnswerRecord
from mace_ros.store.journal_writer import JournalWriter

COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)


class RequestManager:
    """Lets queries in, gives them their tokens, and keeps what is said; on the device's thread."""

    def __init__(self, settings: Settings, *, chat: ChatTokenizer, state: State,
                 kv_cache: KVCacheManager, slots: AdapterSlots, learner: Learner,
                 journal: JournalWriter, base: AnchorRequests, longest: Callable[[], int],
                 later: Callable[[Callable[[], list[Event]]], None],
                 clock: Callable[[], float]) -> None:
        """
        Begin with none.

        ``longest`` tells how many tokens prompt and answer may have together; ``later``, which
        any thread may call, runs a function before the next iteration.
        """
        self.settings = settings        # replaced when others come into force
        self.journal_error = ''         # why it could not be written, the last time
        self.unrecorded = 0             # answers that were not kept, while the disk is too slow
        self._chat, self._state, self._kv_cache = chat, state, kv_cache
        self._slots, self._learner, self._journal = slots, learner, journal
        self._longest, self._later, self._clock = longest, later, clock
        self._all: dict[str, ActiveRequest] = {}
        self._conversations = Conversations()
        self._early = EarlyAborts()
        self._base = base
        self._warming = PrefixWarmup()
        self._reading: ActiveRequest | None = None

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._all)

    def __getitem__(self, query_id: str) -> ActiveRequest:
        """Return one that has not ended; ``KeyError`` if it has."""
        return self._all[query_id]

    @property
    def queue_depth(self) -> int:
        """Queries that wait for their first turn."""
        return sum(r.started_at is None and not self._all[r.id].silent
                   for r in self._state.waiting)

    # -- the door --------------------------------------------------------------------

    def admit(self, query: Query, arrival: float) -> list[Event]:
        """Let a query wait for its turn, or say why not."""
        query = replace(query, id=query.id or str(uuid.uuid4()))
        try:
            # First: what else is wrong with it is nothing that its namesake's asker should hear.
            if query.id in self._all:
                raise InvalidQuery(
                    ErrorCode.DUPLICATE_ID, f'id: {query.id!r} is being answered already')
            query = checked_query(query, self.settings)
            limit = self.settings.scheduler.max_queue
            if self.queue_depth >= limit:
                raise InvalidQuery(
                    ErrorCode.OVERLOADED, f'{limit} queries wait already (scheduler.max_queue)')
            if self._early.take(query.id, self._clock()):
                return [ResponseChunk(query.id, 0, '', True, query.origin),
                        self.not_begun(query, arrival, FinishReason.CANCELLED)]
            if query.reset_conversation:
                self._conversations.reset(query.conversation_id)
            answering = begin(
                query, arrival, self._conversations.get(query.conversation_id), self._chat,
                self.settings.generation.system, self._longest())
        except InvalidQuery as error:
            if error.code is not ErrorCode.DUPLICATE_ID and len(query.id) <= MAX_ID:
                self._early.ended(query.id)
            return [self.not_begun(
                query, arrival, FinishReason.REJECTED, error.code, str(error))]
        except Exception as error:    # such as a chat template that refuses the conversation
            return [self.not_begun(
                query, arrival, FinishReason.ERROR, ErrorCode.INTERNAL,
                f'{type(error).__name__}: {error}')]
        # Later: what the node asks itself keeps nobody waiting.
        if self._reading is not None:
            self.end(self._reading, FinishReason.CANCELLED)
        for query_id in self._base.in_the_way:
            self.end(self._all[query_id], FinishReason.CANCELLED)
        self._start(answering)
        if answering.request.max_tokens == 0:
            return self.end(answering, FinishReason.LENGTH)
        return []

    def not_begun(self, query: Query, arrival: float, reason: FinishReason,
                  code: ErrorCode = ErrorCode.NONE, error: str = '') -> Response:
        """Return the outcome of a query that came no further than the door."""
        return Response(
            query.id, query.conversation_id, '', reason, code, error,
            e2e_ms=(self._clock() - arrival) * 1e3, origin=query.origin)

    def _start(self, answering: ActiveRequest, *, base: bool = False) -> None:
        """Let a request wait for its turn; it keeps the adapter version that is live now."""
        answering.version = self._slots.pin(answering.query.profile)
        answering.request.adapter_slot = BASE_SLOT if base else answering.version.slot
        answering.request.block_hashes = BlockHashes(
            BASE_IDENTITY if base else answering.version.identity, answering.ids, BLOCK_TOKENS)
        self._all[answering.query.id] = answering
        self._state.waiting.add(answering.request)

    def cancel(self, query_id: str) -> list[Event]:
        """End a query early, even if it has yet to come."""
        answering = self._all.get(query_id)
        if answering is None:
            self._early.cancelled(query_id, self._clock())
        if answering is None or answering.silent:
            return []
        return self.end(answering, FinishReason.CANCELLED)

    def cancel_all(self) -> list[Event]:
        """End all that there are."""
        return [event for answering in list(self._all.values())
                for event in self.end(answering, FinishReason.CANCELLED)]

    def correct(self, query_id: str, text: str) -> None:
        """Let a conversation go on as if this had been answered."""
        self._conversations.correct(query_id, text)

    # -- what nobody hears -----------------------------------------------------------

    @property
    def base_questions_left(self) -> int:
        """How many questions the base model has to answer before anything is learned."""
        return self._base.left

    def ask_base(self, *, overdue: bool) -> None:
        """Ask the base model something whose answer learning must not change."""
        while queries := self._base.next(self._state, overdue=overdue):
            for query in queries:
                answering = begin(
                    checked_query(query, self.settings), self._clock(),
                    self._conversations.get(''), self._chat, '', self._longest())
                if not self._base.knows(query.id, answering.ids):
                    answering.silent = True
                    self._start(answering, base=True)
        if self._give_anchors():    # all of an earlier start: no end of one calls the learner
            self._later(list)

    def _give_anchors(self) -> bool:
        answers = self._base.all
        if answers is not None:
            self._learner.give_anchors(answers)
        return answers is not None

    def published(self, profile: str) -> None:
        """Plan what the profile's new version is to read: what others read is of no use to it."""
        self._warming.begin(
            lambda other: self._slots.live(other).profile == profile,
            self._kv_cache.capacity_tokens // 2)

    def warm_up(self) -> None:
        """Read, while nothing else is to do, what a new version has not read yet."""
        if self._state.has_requests:
            return
        if not self.settings.memory.prefix_sharing:
            self._warming.stop()
        piece = self._warming.next(lambda profile, ids: self._kv_cache.known(BlockHashes(
            self._slots.live(profile).identity, ids, BLOCK_TOKENS), len(ids)))
        if piece is not None:
            self._reading = reading(piece.ids, piece.profile, self._clock(), self._chat)
            self._start(self._reading)

    # -- tokens, and the end -----------------------------------------------------------

    def commit(self, sampled: list[ActiveRequest], drawn: list[int]) -> list[Event]:
        """Give each answer its new token, and end those that are complete."""
        now = self._clock()
        events: list[Event] = []
        for answering, token in zip(sampled, drawn, strict=True):
            try:
                piece = answering.push(token, now, self._chat.end_tokens)
            except Exception as error:    # a tokenizer that can't decode its own tokens
                events += self.end(answering, FinishReason.ERROR, ErrorCode.INTERNAL,
                                   f'{type(error).__name__}: {error}')
                continue
            if piece is not None and not answering.silent:
                events.append(piece)
            if answering.finish is not None:
                events += self.end(answering, answering.finish)
        return events

    def fit(self) -> list[Event]:
        """Let no answer come to more than the KV cache takes by now."""
        events: list[Event] = []
        longest = self._longest()
        for answering in list(self._all.values()):
            request = answering.request
            room = longest - request.prompt_tokens
            begun = request.state is RequestState.RUNNING or request.output_tokens
            if request.most_tokens <= longest or not begun or (
                    room < 1 and not request.output_tokens):
                continue    # it is rejected by name
            request.max_tokens = max(room, request.output_tokens)
            if request.max_tokens == request.output_tokens:
                events += self.end(answering, FinishReason.LENGTH)
        return events

    def broke_off(self, query_id: str, reason: str) -> list[Event]:
        """End one that a failed pass was for, unless it has ended."""
        answering = self._all.get(query_id)
        return [] if answering is None else self.end(
            answering, FinishReason.ERROR, ErrorCode.INTERNAL, reason)

    def end(self, answering: ActiveRequest, reason: FinishReason,
            code: ErrorCode = ErrorCode.NONE, error: str = '') -> list[Event]:
        """Take a request out of the engine; return its last events."""
        query, request = answering.query, answering.request
        del self._all[query.id]
        self._early.ended(query.id)
        self._kv_cache.leave(request)
        assert answering.version is not None
        self._slots.unpin(answering.version)
        if answering is self._reading:
            self._reading = None
            return []
        complete = reason in COMPLETE
        if answering.silent:
            self._base.ended(
                query.id, answering.ids[:request.prompt_tokens], answering.output,
                complete=complete)
            self._give_anchors()
            return []
        if request.output_tokens:
            self._remember(answering, complete)
        closed = answering.finish is not None or reason is FinishReason.REJECTED
        closing = [] if closed else [answering.cut()]
        return [*closing, answering.finished(reason, self._clock(), code, error)]

    def _remember(self, answering: ActiveRequest, complete: bool) -> None:
        """Keep an answer: for the conversation, for corrections of it, and for replay."""
        query, text = answering.query, answering.stream.text
        settings = self.settings.conversation
        system = next((m['content'] for m in answering.messages if m['role'] == 'system'), '')
        self._conversations.add(
            query.conversation_id, system, Turn(query.id, query.text, text),
            max_turns=settings.max_turns, max_conversations=settings.max_conversations)
        ids = answering.ids
        self._warming.note(query.profile, system, query.conversation_id,
                           ids[:answering.request.prompt_tokens], ids)
        if self._journal.backlog >= MAX_UNWRITTEN:
            self.unrecorded += 1
            return
        assert answering.version is not None
        answer = AnswerRecord(
            query_id=query.id, prompt_ids=tuple(answering.ids[:answering.request.prompt_tokens]),
            messages=answering.messages, text=text, output_ids=tuple(answering.output),
            conversation_id=query.conversation_id, profile=query.profile,
            lineage=answering.version.profile, adapter_version=answering.version.version,
            no_learn=query.no_learn or not complete, time=time.time())
        if not answer.no_learn:
            self._learner.answered(query.id)
        self._journal.submit(lambda journal: journal.record_answer(answer)).add_done_callback(
            self._wrote_answer)

    def _wrote_answer(self, done: Future[None]) -> None:
        """Take note, from the journal's thread, if the disk fails or works again."""
        error = done.exception()
        if error is None and not (self.journal_error or self.unrecorded):
            return

        def note() -> list[Event]:
            self.journal_error = str(error or '')
            self.unrecorded = 0 if error is None else self.unrecorded + 1
            return []
        self._later(note)
