# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Responses of the node in the form of OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import math
import time
from typing import Any

from mace_ros.msg import Choice, Logprob, Response, ResponseChunk, TokenLogprobs, ToolCall

LEAST_LOGPROB = -9999.0     # JSON has no infinity
# Fields of a response that OpenAI's API does not have.
OWN_FIELDS = ('adapter_version', 'adapter_profile', 'matched_correction_id', 'similarity',
              'queue_ms', 'ttft_ms', 'tpot_ms', 'e2e_ms', 'slo_met')


def answers(response: Response) -> list[Choice]:
    """Return all answers of a response."""
    return list(response.choices) or [Choice(
        text=response.text, tool_calls=response.tool_calls, logprobs=response.logprobs,
        finish_reason=response.finish_reason, output_tokens=response.output_tokens)]


def usage(response: Response) -> dict[str, int]:
    """Return the token counts."""
    output = sum(choice.output_tokens for choice in answers(response))
    return {'prompt_tokens': response.prompt_tokens, 'completion_tokens': output,
            'total_tokens': response.prompt_tokens + output}


def own_fields(response: Response) -> dict[str, Any]:
    """Return the version that answered, and the times; unknown ones are None."""
    values = {name: getattr(response, name) for name in OWN_FIELDS}
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()}


def finish_reason(answer: Choice) -> str:
    """Return why an answer ended."""
    if answer.finish_reason == Response.LENGTH:
        return 'length'
    return 'tool_calls' if answer.tool_calls else 'stop'


def chat_logprobs(positions: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
    """Return log-probabilities as chat completions have them."""
    if not positions:
        return None
    return {'content': [{**_logprob(p.sampled), 'top_logprobs': list(map(_logprob, p.top))}
                        for p in positions], 'refusal': None}


def completion_logprobs(positions: Sequence[TokenLogprobs],
                        offset: int = 0) -> dict[str, Any] | None:
    """Return log-probabilities as completions have them; ``offset`` is that of the text."""
    if not positions:
        return None
    offsets = []
    for position in positions:
        offsets.append(offset)
        offset += len(position.sampled.token)
    return {'tokens': [p.sampled.token for p in positions],
            'token_logprobs': [_finite(p.sampled.logprob) for p in positions],
            'top_logprobs': [{each.token: _finite(each.logprob) for each in p.top}
                             for p in positions],
            'text_offset': offsets}


def tool_calls(calls: Sequence[ToolCall], *, streamed: bool = False) -> list[dict[str, Any]]:
    """Return the calls of an answer."""
    return [{**({'index': i} if streamed else {}), 'id': call.id, 'type': 'function',
             'function': {'name': call.name, 'arguments': call.arguments}}
            for i, call in enumerate(calls)]


class ChatReply:
    """Chat completions, whole or as a stream of chunks."""

    prefix = 'chatcmpl-'

    def __init__(self, completion_id: str, model: str) -> None:
        self.id = completion_id
        self._head = {'id': completion_id, 'created': int(time.time()), 'model': model}

    def whole(self, response: Response) -> dict[str, Any]:
        """Return a whole completion."""
        return {**self._head, 'object': 'chat.completion',
                'choices': [self._choice(answer) for answer in answers(response)],
                'usage': usage(response), 'mace_ros': own_fields(response)}

    def first(self, answer: int) -> dict[str, Any] | None:
        """Return the chunk that opens an answer."""
        return self._chunk(answer, {'role': 'assistant', 'content': ''})

    def delta(self, answer: int, text: str, positions: Sequence[TokenLogprobs],
              offset: int) -> dict[str, Any]:
        """Return the chunk of a piece of an answer, which begins at ``offset``."""
        return self._chunk(answer, {'content': text}, logprobs=chat_logprobs(positions))

    def last(self, answer: Choice, response: Response) -> Iterator[dict[str, Any]]:
        """Yield the chunks that end an answer; the last one has the fields of the response."""
        if answer.tool_calls:
            yield self._chunk(answer.index, {
                'tool_calls': tool_calls(answer.tool_calls, streamed=True)})
        yield {**self._chunk(answer.index, {}, finish_reason=finish_reason(answer)),
               'mace_ros': own_fields(response)}

    def end(self, response: Response) -> dict[str, Any]:
        """Return the chunk with the usage, after all answers."""
        return {**self._head, 'object': 'chat.completion.chunk', 'choices': [],
                'usage': usage(response)}

    def _choice(self, answer: Choice) -> dict[str, Any]:
        message = {'role': 'assistant', 'content': answer.text, 'refusal': None}
        if answer.tool_calls:
            message |= {'content': answer.text or None,
                        'tool_calls': tool_calls(answer.tool_calls)}
        return {'index': answer.index, 'message': message,
                'logprobs': chat_logprobs(answer.logprobs),
                'finish_reason': finish_reason(answer)}

    def _chunk(self, answer: int, delta: dict[str, Any], *, finish_reason: str | None = None,
               logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {**self._head, 'object': 'chat.completion.chunk', 'choices': [
            {'index': answer, 'delta': delta, 'logprobs': logprobs,
             'finish_reason': finish_reason}]}


class CompletionReply(ChatReply):
    """Completions of a raw prompt, whole or as a stream of chunks."""

    prefix = 'cmpl-'

    def whole(self, response: Response) -> dict[str, Any]:
        """Return a whole completion."""
        return {**self._head, 'object': 'text_completion', 'choices': [
            {'index': answer.index, 'text': answer.text,
             'logprobs': completion_logprobs(answer.logprobs),
             'finish_reason': finish_reason(answer)} for answer in answers(response)],
            'usage': usage(response), 'mace_ros': own_fields(response)}

    def first(self, answer: int) -> dict[str, Any] | None:
        """Return nothing: a completion has no role."""
        return None

    def delta(self, answer: int, text: str, positions: Sequence[TokenLogprobs],
              offset: int) -> dict[str, Any]:
        """Return the chunk of a piece of an answer, which begins at ``offset``."""
        return self._piece(answer, text, completion_logprobs(positions, offset), None)

    def last(self, answer: Choice, response: Response) -> Iterator[dict[str, Any]]:
        """Yield the chunk that ends an answer, with the fields of the response."""
        yield {**self._piece(answer.index, '', None, finish_reason(answer)),
               'mace_ros': own_fields(response)}

    def end(self, response: Response) -> dict[str, Any]:
        """Return the chunk with the usage, after all answers."""
        return {**super().end(response), 'object': 'text_completion'}

    def _piece(self, answer: int, text: str, logprobs: dict[str, Any] | None,
               reason: str | None) -> dict[str, Any]:
        return {**self._head, 'object': 'text_completion', 'choices': [
            {'index': answer, 'text': text, 'logprobs': logprobs, 'finish_reason': reason}]}


class StreamedReply:
    """
    The chunks of a reply in order, made from the node's chunks and its response.

    The response comes on a topic of its own, and may overtake the last chunks. It contains all
    that they hold, so nothing waits for them.
    """

    def __init__(self, reply: ChatReply, *, include_usage: bool) -> None:
        self._reply, self._include_usage = reply, include_usage
        self._sent: dict[int, tuple[int, int]] = {}     # characters and log-probabilities

    def chunk(self, chunk: ResponseChunk) -> Iterator[dict[str, Any]]:
        """Yield the chunks of the reply for a chunk of the node."""
        yield from self._piece(chunk.choice, chunk.text, chunk.logprobs)

    def end(self, response: Response) -> Iterator[dict[str, Any]]:
        """Yield the chunks that have not been sent, up to the end of the stream."""
        for answer in answers(response):
            text, logprobs = self._sent.get(answer.index, (0, 0))
            yield from self._piece(answer.index, answer.text[text:], answer.logprobs[logprobs:])
            yield from self._reply.last(answer, response)
        if self._include_usage:
            yield self._reply.end(response)

    def _piece(self, answer: int, text: str,
               logprobs: Sequence[TokenLogprobs]) -> Iterator[dict[str, Any]]:
        if answer not in self._sent:
            self._sent[answer] = (0, 0)
            opening = self._reply.first(answer)
            if opening is not None:
                yield opening
        characters, positions = self._sent[answer]
        if text or logprobs:
            self._sent[answer] = (characters + len(text), positions + len(logprobs))
            yield self._reply.delta(answer, text, logprobs, characters)


def _logprob(each: Logprob) -> dict[str, Any]:
    return {'token': each.token, 'logprob': _finite(each.logprob),
            'bytes': list(each.token_bytes) or None}


def _finite(value: float) -> float:
    return value if value > LEAST_LOGPROB else LEAST_LOGPROB
