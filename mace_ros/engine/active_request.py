# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""One query while it is being answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
import math

from torch import Tensor

from mace_ros.api.events import (
    ErrorCode,
    FinishReason,
    InvalidQuery,
    Query,
    Response,
    ResponseChunk,
)
from mace_ros.engine.conversations import Conversation
from mace_ros.memory.adapter_slots import LiveVersion
from mace_ros.model.chat import ChatTokenizer, TextStream
from mace_ros.model.sampling import Sampling
from mace_ros.scheduling.request import Request

# Of what the node asks itself: everybody else comes first.
BACKGROUND_SLO_S = 1e9
BACKGROUND_PRIORITY = -2**31
READING = '\n'    # an id that no query has: it is not printable


@dataclass(eq=False)
class ActiveRequest:
    """A query, its token ids, and the text that has gone out."""

    query: Query
    messages: tuple[dict[str, str], ...]
    ids: list[int]                # prompt, then output
    request: Request
    sampling: Sampling
    stream: TextStream
    version: LiveVersion | None = None    # pinned at admission
    chunks: int = 0
    silent: bool = False          # asked by the node itself; nobody hears it
    finish: FinishReason | None = field(default=None)
    # What each token of the prompt gets of attention, while that is being found out.
    attention: Tensor | None = None

    @property
    def output(self) -> list[int]:
        """Ids of the answer so far."""
        return self.ids[self.request.prompt_tokens:]

    def push(self, token: int, now: float, ends: frozenset[int]) -> ResponseChunk | None:
        """Take the next token; return the piece of text to publish, if there is one."""
        request = self.request
        self.ids.append(token)
        request.output_tokens += 1
        if request.first_token_at is None:
            request.first_token_at = now
        request.last_token_at = now
        piece = self.stream.push(token)
        if token in ends or self.stream.stopped:
            self.finish = FinishReason.STOP
        elif request.output_tokens >= request.max_tokens:
            self.finish = FinishReason.LENGTH
        if self.finish is not None:
            piece += self.stream.finish()
        return self._chunk(piece) if piece or self.finish is not None else None

    def cut(self) -> ResponseChunk:
        """Return the last piece of an answer that is broken off."""
        return self._chunk(self.stream.finish(), last=True)

    def _chunk(self, text: str, *, last: bool = False) -> ResponseChunk:
        self.chunks += 1
        return ResponseChunk(self.query.id, self.chunks - 1, text, last or self.finish is not None,
                     self.query.origin)

    def finished(self, reason: FinishReason, now: float, code: ErrorCode = ErrorCode.NONE,
                 error: str = '') -> Response:
        """Return the outcome, with its times."""
        request = self.request
        tpot = math.nan
        if request.output_tokens > 1:
            assert request.first_token_at is not None and request.last_token_at is not None
            tpot = (request.last_token_at - request.first_token_at) / (request.output_tokens - 1)
        return Response(
            query_id=self.query.id, conversation_id=self.query.conversation_id,
            text=self.stream.text, finish_reason=reason, error_code=code, error=error,
            adapter_version=self.version.version if self.version else 0,
            prompt_tokens=request.prompt_tokens, output_tokens=request.output_tokens,
            queue_ms=_ms(request.arrival, request.started_at),
            ttft_ms=_ms(request.arrival, request.first_token_at), tpot_ms=tpot * 1e3,
            e2e_ms=_ms(request.arrival, now),
            slo_met=reason in (FinishReason.STOP, FinishReason.LENGTH) and request.slo_met,
            origin=self.query.origin)


def begin(query: Query, arrival: float, conversation: Conversation, chat: ChatTokenizer,
          default_system: str, longest: int) -> ActiveRequest:
    """
    Build the prompt of a checked query; raises :class:`InvalidQuery` if it is too long.

    ``longest`` is how many tokens prompt and answer may have together. The oldest turns
    are left out until the prompt fits; the answer gets what remains.
    """
    system = query.system or conversation.system or default_system
    turns = list(conversation.turns)
    while True:
        messages = tuple(
            ([{'role': 'system', 'content': system}] if system else [])
            + [m for t in turns for m in ({'role': 'user', 'content': t.question},
                                          {'role': 'assistant', 'content': t.answer})]
            + [{'role': 'user', 'content': query.text}])
        ids = chat.prompt(messages)
        if len(ids) < longest:
            break
        if not turns:
            raise InvalidQuery(
                ErrorCode.PROMPT_TOO_LONG,
                f'prompt of {len(ids)} tokens; {max(longest - 1, 0)} fit, and one is for the answer'
                ' (model, memory.kv_cache_tokens, memory.budget_mb)')
        turns.pop(0)
    assert query.max_tokens is not None and query.temperature is not None
    assert query.top_p is not None and query.seed is not None
    assert query.ttft_slo_ms is not None and query.tpot_slo_ms is not None
    request = Request(
        id=query.id, arrival=arrival, prompt_tokens=len(ids),
        max_tokens=min(query.max_tokens, longest - len(ids)),
        ttft_slo=_seconds(query.ttft_slo_ms), tpot_slo=_seconds(query.tpot_slo_ms),
        priority=query.priority)
    return ActiveRequest(
        query=query, messages=messages, ids=ids, request=request,
        sampling=Sampling(query.temperature, query.top_p, query.seed),
        stream=TextStream(chat, query.stop))


def reading(ids: Sequence[int], profile: str, now: float, chat: ChatTokenizer) -> ActiveRequest:
    """Return what nobody hears and that does no more than bring ``ids`` into the KV cache."""
    request = Request(
        id=READING, arrival=now, prompt_tokens=len(ids), max_tokens=1, ttft_slo=BACKGROUND_SLO_S,
        tpot_slo=BACKGROUND_SLO_S, priority=BACKGROUND_PRIORITY)
    return ActiveRequest(
        query=Query('', id=READING, profile=profile), messages=(), ids=list(ids),
        request=request, sampling=Sampling(0.0, 1.0, 0), stream=TextStream(chat), silent=True)


@lru_cache
def _seconds(ms: float) -> float:
    """Return one number for all who have the same objective: every plan reads that of each."""
    return ms / 1e3


def _ms(start: float, end: float | None) -> float:
    return math.nan if end is None else (end - start) * 1e3
