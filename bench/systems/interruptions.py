# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Barge-in: how soon an answer is silent after its cancellation, beside other work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import json
import random
import threading
import time
from typing import Any

from bench.common.load import LESSONS
from bench.systems.openai_server import chat_body, Connection

LONG = 'Repeat this: こんにちは 🤖'     # the packaged model repeats this without end
OTHERS = 3              # answers that are given meanwhile
MAX_TOKENS = 2000
PATIENT = {'ttft_slo_ms': 6e5, 'tpot_slo_ms': 6e5}
RESPONSE_S = 400.0      # at most, for a response
SPEAKS_WITHIN_S = 0.3   # after the first words, the person interrupts

# Returns the times of the last chunk and of the response to a query, and the response.
Wait = Callable[[str], tuple[float, float, Any]]


def interruptions(client: Any, port: int, count: int) -> list[dict[str, Any]]:
    """
    Return rows of answers that were cancelled over the topic, or by disconnecting from HTTP.

    A row has ``way``, the milliseconds until the last chunk (``silent_ms``) and until the response
    (``released_ms``), after which the node holds nothing of the request, the answer's time per
    token, and whether a correction was being ``learned``. All times are taken in the client.
    Other answers are given and corrections are learned meanwhile; the two ways take turns.
    """
    chance, rows = random.Random(1), []
    corrections = [client.correct(lesson['answer'], prompt=lesson['question'])
                   for lesson in json.loads(LESSONS.read_text())['corrections']]
    others = [ask(client) for _ in range(OTHERS)]
    with ends(client) as wait:
        for number in range(count):
            for way in ('topic', 'http'):
                others = [ask(client) if other.is_complete() else other for other in others]
                learned = not all(each.is_final() for each in corrections)
                query_id, cancel = spoken_to(client) if way == 'topic' else streamed(port)
                time.sleep(chance.uniform(0.0, SPEAKS_WITHIN_S))
                spoken = time.monotonic()
                cancel()
                silent, released, response = wait(query_id)
                if response.finish_reason != response.CANCELLED:
                    raise RuntimeError(f'{query_id} was not cancelled: {response.error}')
                rows.append({
                    'way': way, 'silent_ms': (silent - spoken) * 1e3,
                    'released_ms': (released - spoken) * 1e3,
                    'tpot_ms': response.tpot_ms if response.output_tokens > 1 else None,
                    'learned': learned})
            if number % 20 == 19:
                print(f'{number + 1} of {count} answers interrupted each way', flush=True)
    for other in others:
        other.cancel()
        other.result(RESPONSE_S)
    return rows


def ask(client: Any) -> Any:
    """Ask for an answer that does not end soon."""
    return client.ask(LONG, max_tokens=MAX_TOKENS, no_learn=True, **PATIENT)


def spoken_to(client: Any) -> tuple[str, Callable[[], None]]:
    """Return the id of an answer over the topic that has begun, and how to cancel it."""
    answer = ask(client)
    next(answer.stream(RESPONSE_S))
    return answer.id, answer.cancel


def streamed(port: int) -> tuple[str, Callable[[], None]]:
    """Return the id of an answer over HTTP that has begun, and how to disconnect from it."""
    http = Connection(port)
    chunk = next(http.chunks(chat_body(LONG, stream=True, max_tokens=MAX_TOKENS)))
    return str(chunk['id']), http.close


@contextmanager
def ends(client: Any) -> Iterator[Wait]:
    """Yield a function that returns when the last chunk and the response of a query arrived."""
    from mace_ros.msg import Response, ResponseChunk

    silent: dict[str, float] = {}
    responses: dict[str, tuple[float, Any]] = {}
    changed = threading.Condition()

    def on_chunk(chunk: Any) -> None:
        if chunk.last:
            with changed:
                silent[chunk.query_id] = time.monotonic()
                changed.notify_all()

    def on_response(response: Any) -> None:
        with changed:
            responses[response.query_id] = time.monotonic(), response
            changed.notify_all()

    def wait(query_id: str) -> tuple[float, float, Any]:
        with changed:
            if not changed.wait_for(
                    lambda: query_id in silent and query_id in responses, RESPONSE_S):
                raise TimeoutError(f'{query_id} does not end')
            return silent[query_id], *responses[query_id]

    subscriptions = [
        client.node.create_subscription(kind, f'{client.name}/{topic}', on_message, 1000)
        for kind, topic, on_message in (
            (ResponseChunk, 'response_chunk', on_chunk), (Response, 'response', on_response))]
    try:
        yield wait
    finally:
        for subscription in subscriptions:
            client.node.destroy_subscription(subscription)
