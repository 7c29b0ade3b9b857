# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""An answer in progress: its token ids, its text and its adapter version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import auto, Enum
from functools import lru_cache
import math

from torch import Tensor

from mace_ros.api.events import (
    Choice,
    ErrorCode,
    FinishReason,
    Query,
    Response,
    ResponseChunk,
    TokenLogprobs,
)
from mace_ros.engine.conversations import Conversation
from mace_ros.engine.prompts import build_prompt
from mace_ros.engine.router import Route
from mace_ros.memory.adapter_slots import ServedVersion
from mace_ros.model.chat import ChatTokenizer, Message, TextStream
from mace_ros.model.constraints import Constraint
from mace_ros.model.logit_changes import LogitChanges
from mace_ros.model.sampling import Row, Sampling
from mace_ros.model.tool_call_stream import text_stream
from mace_ros.model.tool_calls import Tools
from mace_ros.scheduling.request import Request

# Background requests have no deadline and the lowest priority.
BACKGROUND_SLO_S = 1e9
BACKGROUND_PRIORITY = -2**31
PREFILL_ID = '\n'    # followed by the kind; not printable, so that no query can have this id

COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)


class RequestKind(Enum):
    """The origin of a request. Only user requests produce events."""

    USER = auto()
    ANCHOR = auto()    # a question to the base model, whose answer learning must preserve
    HISTORY = auto()   # computes a conversation again that an adapter version has continued
    PREFIX = auto()    # computes the prefix of a training sample
    HINT = auto()      # a corrected question again, with the hint of its correction
    EMBED = auto()     # a text whose last hidden states are added up


@dataclass(eq=False)
class ActiveRequest:
    """
    One answer to a query between admission and its last event.

    ``request`` is the scheduler's view of it: numbers only. ``choices`` holds all answers to the
    query, this one included. The first one computes the prompt, whose KV blocks the others share.
    """

    query: Query
    messages: tuple[Message, ...]
    ids: list[int]                # prompt, then output
    request: Request
    sampling: Sampling
    stream: TextStream
    kind: RequestKind = RequestKind.USER
    route: Route = field(default_factory=Route)    # to the version that answers
    chunks: int = 0
    closed: bool = False          # its last chunk was built
    finish: FinishReason | None = None
    # While KV pruning observes the prompt: the attention that each of its tokens receives.
    attention: Tensor | None = None
    adapted_from: int = 0         # position from which an adapter acts
    pooled: Tensor | None = None  # of a text to embed: sum of the last hidden states, [width]
    tools: Tools = ()             # that the prompt offers
    constraint: Constraint | None = None
    choices: list[ActiveRequest] = field(default_factory=list)
    index: int = 0                # among the choices
    outcome: FinishReason | None = None     # None while the answer is active
    error_code: ErrorCode = ErrorCode.NONE
    error: str = ''
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    logprobs_sent: int = 0        # log-probabilities that chunks have had

    def __post_init__(self) -> None:
        """Make this the first of the choices, unless they are given."""
        self.choices = self.choices or [self]

    def add_choices(self, count: int, chat: ChatTokenizer) -> None:
        """Add answers to the same prompt until there are ``count``; before the first token."""
        for i in range(1, count):
            self.choices.append(replace(
                self, index=i, ids=list(self.ids), request=replace(
                    self.request, id=f'{self.query.id}\n{i}', blocks=[]),
                sampling=replace(self.sampling, seed=self.sampling.seed + i),
                stream=text_stream(chat, self.query.stop, self.tools), logprobs=[],
                constraint=self.constraint and self.constraint.copy()))

    @property
    def reason(self) -> FinishReason:
        """Why the answer ended; to be read after its end."""
        assert self.outcome is not None
        return self.outcome

    @property
    def is_open(self) -> bool:
        """Whether any answer to the query is still active."""
        return any(choice.outcome is None for choice in self.choices)

    @property
    def is_silent(self) -> bool:
        """Whether its events are not published."""
        return self.kind is not RequestKind.USER

    @property
    def version(self) -> ServedVersion:
        """The version that answers."""
        return self.route.version

    @property
    def prompt(self) -> list[int]:
        """Token ids of the prompt."""
        return self.ids[:self.request.prompt_tokens]

    @property
    def output(self) -> list[int]:
        """Token ids of the answer so far."""
        return self.ids[self.request.prompt_tokens:]

    def row(self) -> Row:
        """Return the sampling parameters and the history for the next token."""
        return Row(self.sampling, self.ids, self.request.prompt_tokens,
                   None if self.constraint is None else self.constraint.mask())

    def append(self, token: int, now: float, end_tokens: frozenset[int],
               logprobs: TokenLogprobs | None = None) -> ResponseChunk | None:
        """
        Append a sampled token; return the text to publish, if it completes any.

        Raises :class:`ConstraintBroken`.
        """
        request = self.request
        if self.constraint is not None:
            self.constraint.advance(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        self.ids.append(token)
        request.output_tokens += 1
        if request.first_token_at is None:
            request.first_token_at = now
        request.last_token_at = now
        text = self.stream.push(token)
        if token in end_tokens or self.stream.stopped:
            self.finish = FinishReason.STOP
        elif request.output_tokens >= request.max_tokens:
            self.finish = FinishReason.LENGTH
        if self.finish is not None:
            text += self.stream.finish()
        return self._chunk(text) if text or self.finish is not None else None

    def closing_chunk(self) -> ResponseChunk | None:
        """Return the last chunk of an aborted answer; None if it adds nothing to the stream."""
        try:
            text = self.stream.finish()
        except Exception:    # a tokenizer that can't decode its own tokens: the stream ends anyway
            text = ''
        self.closed = True
        return self._chunk(text) if text or self._is_last else None

    @property
    def _is_last(self) -> bool:
        """Whether no other answer to the query is active."""
        return all(c.outcome is not None for c in self.choices if c is not self)

    def _chunk(self, text: str) -> ResponseChunk:
        index = sum([choice.chunks for choice in self.choices])
        self.chunks += 1
        self.closed = self.closed or self.finish is not None
        logprobs = tuple(self.logprobs[self.logprobs_sent:])
        self.logprobs_sent = len(self.logprobs)
        return ResponseChunk(
            self.query.id, index, text, self.closed and self._is_last, self.query.origin,
            self.index, logprobs, self.stream.calls if self.finish is not None else ())

    def response(self, now: float) -> Response:
        """
        Return the outcome of all choices, with the latencies of this one in milliseconds.

        An answer that was aborted decides how the query ended.
        """
        request, route, tpot = self.request, self.route, math.nan
        worst = max(self.choices, key=lambda c: c.reason)
        reason = self.reason if worst.reason in COMPLETE else worst.reason
        if request.output_tokens > 1:
            assert request.first_token_at is not None and request.last_token_at is not None
            tpot = (request.last_token_at - request.first_token_at) / (request.output_tokens - 1)
        return Response(
            query_id=self.query.id, conversation_id=self.query.conversation_id,
            text=self.stream.content, finish_reason=reason, error_code=worst.error_code,
            error=worst.error,
            adapter_version=route.version.version, adapter_profile=route.version.profile,
            matched_correction_id=route.correction_id, similarity=route.similarity,
            prompt_tokens=request.prompt_tokens,
            output_tokens=sum([c.request.output_tokens for c in self.choices]),
            queue_ms=_ms(request.arrival, request.started_at),
            ttft_ms=_ms(request.arrival, request.first_token_at), tpot_ms=tpot * 1e3,
            e2e_ms=_ms(request.arrival, now),
            slo_met=reason in COMPLETE and all(c.request.slo_met for c in self.choices),
            origin=self.query.origin, logprobs=tuple(self.logprobs),
            choices=tuple([c.choice() for c in self.choices]) if len(self.choices) > 1 else (),
            tool_calls=self.stream.calls if self.reason in COMPLETE else ())

    def choice(self) -> Choice:
        """Return this answer as one of several to its query."""
        return Choice(
            self.index, self.stream.content, self.reason, self.request.output_tokens,
            tuple(self.logprobs), self.stream.calls if self.reason in COMPLETE else ())


def build_request(query: Query, arrival: float, conversation: Conversation, chat: ChatTokenizer,
                  default_system: str, max_length: int,
                  kind: RequestKind = RequestKind.USER) -> ActiveRequest:
    """
    Build the request of a validated query.

    The prompt and the answer have at most ``max_length`` tokens together. Raises
    :class:`InvalidQuery` if the query alone is too long, or the chat template refuses it.
    """
    prompt = build_prompt(query, conversation, chat, default_system, max_length)
    ids = prompt.ids
    assert query.max_tokens is not None
    assert query.ttft_slo_ms is not None and query.tpot_slo_ms is not None
    request = Request(
        id=query.id, arrival=arrival, prompt_tokens=len(ids),
        max_tokens=min(query.max_tokens, max_length - len(ids)),
        ttft_slo=_seconds(query.ttft_slo_ms), tpot_slo=_seconds(query.tpot_slo_ms),
        priority=query.priority)
    return ActiveRequest(
        query=query, messages=prompt.messages, tools=prompt.tools, ids=ids, request=request,
        sampling=_sampling(query), stream=text_stream(chat, query.stop, prompt.tools), kind=kind,
        adapted_from=chat.adapted_from(ids))


def build_prefill(kind: RequestKind, ids: Sequence[int], now: float, chat: ChatTokenizer, *,
                  urgent: bool = False, number: str = '') -> ActiveRequest:
    """
    Build a request that only computes the base model's keys and values of ``ids``.

    Unless it is ``urgent``, it yields to all others. ``number`` tells apart several of a kind.
    """
    request = Request(
        id=f'{PREFILL_ID}{kind.name}{number}', arrival=now, prompt_tokens=len(ids), max_tokens=1,
        ttft_slo=BACKGROUND_SLO_S, tpot_slo=BACKGROUND_SLO_S,
        priority=0 if urgent else BACKGROUND_PRIORITY)
    return ActiveRequest(
        query=Query('', id=request.id), messages=(), ids=list(ids), request=request,
        sampling=Sampling(), stream=TextStream(chat), kind=kind,
        adapted_from=len(ids) if kind is RequestKind.PREFIX else 0)


def _sampling(query: Query) -> Sampling:
    assert query.temperature is not None and query.top_p is not None and query.seed is not None
    assert query.top_k is not None and query.min_p is not None
    assert query.repetition_penalty is not None
    return Sampling(
        query.temperature, query.top_p, query.seed, query.top_k, query.min_p,
        LogitChanges(
            query.repetition_penalty, query.frequency_penalty, query.presence_penalty,
            tuple(zip(query.logit_bias_tokens, query.logit_bias_values, strict=True))),
        query.logprobs - 1 if query.logprobs else None)


@lru_cache
def _seconds(ms: float) -> float:
    """Convert to seconds; cached so that equal SLOs share one float."""
    return ms / 1e3


def _ms(start: float, end: float | None) -> float:
    return math.nan if end is None else (end - start) * 1e3
