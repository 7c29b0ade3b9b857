# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""One query while it is being answered: its token ids, its text and its adapter version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import auto, Enum
from functools import lru_cache
import math

from torch import Tensor

from mace_ros.api.events import (
    ErrorCode,
    FinishReason,
    Query,
    Response,
    ResponseChunk,
)
from mace_ros.engine.conversations import Conversation
from mace_ros.engine.prompts import build_prompt
from mace_ros.engine.router import Route
from mace_ros.memory.adapter_slots import LiveVersion
from mace_ros.model.chat import ChatTokenizer, Message, TextStream
from mace_ros.model.sampling import Sampling
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


@dataclass(eq=False)
class ActiveRequest:
    """
    A query between admission and its last event.

    ``request`` is the scheduler's view of it: numbers only.
    """

    query: Query
    messages: tuple[Message, ...]
    ids: list[int]                # prompt, then output
    request: Request
    sampling: Sampling
    stream: TextStream
    kind: RequestKind = RequestKind.USER
    route: Route | None = None    # to the version that is pinned at admission
    chunks: int = 0
    closed: bool = False          # its last chunk was built
    finish: FinishReason | None = None
    # While KV pruning observes the prompt: the attention that each of its tokens receives.
    attention: Tensor | None = None
    adapted_from: int = 0         # position from which an adapter acts
    tools: Tools = ()             # that the prompt offers

    @property
    def is_silent(self) -> bool:
        """Whether its events are not published."""
        return self.kind is not RequestKind.USER

    @property
    def version(self) -> LiveVersion:
        """The version that answers; to be read after admission."""
        assert self.route is not None
        return self.route.version

    @property
    def prompt(self) -> list[int]:
        """Token ids of the prompt."""
        return self.ids[:self.request.prompt_tokens]

    @property
    def output(self) -> list[int]:
        """Token ids of the answer so far."""
        return self.ids[self.request.prompt_tokens:]

    def append(self, token: int, now: float, end_tokens: frozenset[int]) -> ResponseChunk | None:
        """Append a sampled token; return the text to publish, if it completes any."""
        request = self.request
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

    def last_chunk(self) -> ResponseChunk:
        """Return the chunk that closes the stream of an aborted answer."""
        try:
            text = self.stream.finish()
        except Exception:    # a tokenizer that can't decode its own tokens: the stream ends anyway
            text = ''
        return self._chunk(text, last=True)

    def _chunk(self, text: str, *, last: bool = False) -> ResponseChunk:
        self.chunks += 1
        self.closed = last or self.finish is not None
        return ResponseChunk(
            self.query.id, self.chunks - 1, text, self.closed, self.query.origin,
            tool_calls=self.stream.calls if self.finish is not None else ())

    def response(self, reason: FinishReason, now: float, code: ErrorCode = ErrorCode.NONE,
                 error: str = '') -> Response:
        """Return the outcome with its latencies in milliseconds."""
        request, route, tpot = self.request, self.route, math.nan
        assert route is not None
        if request.output_tokens > 1:
            assert request.first_token_at is not None and request.last_token_at is not None
            tpot = (request.last_token_at - request.first_token_at) / (request.output_tokens - 1)
        return Response(
            query_id=self.query.id, conversation_id=self.query.conversation_id,
            text=self.stream.content, finish_reason=reason, error_code=code, error=error,
            adapter_version=route.version.version, adapter_profile=route.version.profile,
            matched_correction_id=route.correction_id, similarity=route.similarity,
            prompt_tokens=request.prompt_tokens, output_tokens=request.output_tokens,
            queue_ms=_ms(request.arrival, request.started_at),
            ttft_ms=_ms(request.arrival, request.first_token_at), tpot_ms=tpot * 1e3,
            e2e_ms=_ms(request.arrival, now),
            slo_met=reason in (FinishReason.STOP, FinishReason.LENGTH) and request.slo_met,
            origin=self.query.origin,
            tool_calls=self.stream.calls if reason in COMPLETE else ())


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
    assert query.max_tokens is not None and query.temperature is not None
    assert query.top_p is not None and query.seed is not None
    assert query.ttft_slo_ms is not None and query.tpot_slo_ms is not None
    request = Request(
        id=query.id, arrival=arrival, prompt_tokens=len(ids),
        max_tokens=min(query.max_tokens, max_length - len(ids)),
        ttft_slo=_seconds(query.ttft_slo_ms), tpot_slo=_seconds(query.tpot_slo_ms),
        priority=query.priority)
    return ActiveRequest(
        query=query, messages=prompt.messages, tools=prompt.tools, ids=ids, request=request,
        sampling=Sampling(query.temperature, query.top_p, query.seed),
        stream=text_stream(chat, query.stop, prompt.tools), kind=kind,
        adapted_from=chat.adapted_from(ids))


def build_prefill(kind: RequestKind, ids: Sequence[int], now: float, chat: ChatTokenizer, *,
                  urgent: bool = False) -> ActiveRequest:
    """
    Build a request that only computes the base model's keys and values of ``ids``.

    Unless it is ``urgent``, it yields to all others.
    """
    request = Request(
        id=f'{PREFILL_ID}{kind.name}', arrival=now, prompt_tokens=len(ids), max_tokens=1,
        ttft_slo=BACKGROUND_SLO_S, tpot_slo=BACKGROUND_SLO_S,
        priority=0 if urgent else BACKGROUND_PRIORITY)
    return ActiveRequest(
        query=Query('', id=request.id), messages=(), ids=list(ids), request=request,
        sampling=Sampling(0.0, 1.0, 0), stream=TextStream(chat), kind=kind)


@lru_cache
def _seconds(ms: float) -> float:
    """Convert to seconds; cached so that equal SLOs share one float."""
    return ms / 1e3


def _ms(start: float, end: float | None) -> float:
    return math.nan if end is None else (end - start) * 1e3
