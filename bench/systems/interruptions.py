# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Barge-in: how soon an answer is silent after its cancellation, beside other work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import json
import random
import threading
import time
from typing import Any

from bench.common.load import LESSONS

LONG = 'Repeat this: こんにちは 🤖'     # the packaged model repeats this without end
OTHERS = 3              # answers that are given meanwhile
MAX_TOKENS = 2000
PATIENT = {'ttft_slo_ms': 6e5, 'tpot_slo_ms': 6e5}
RESPONSE_S = 400.0      # at most, for a response
SPEAKS_WITHIN_S = 0.3   # after the first words, the person interrupts


def interruptions(client: Any, count: int) -> list[float]:
    """
    Return the milliseconds from a cancellation to the last chunk of its answer.

    Both are taken in the client. Other answers are given and corrections are learned meanwhile.
    """
    chance, found = random.Random(1), []
    for lesson in json.loads(LESSONS.read_text())['corrections']:
        client.correct(lesson['answer'], prompt=lesson['question'])
    others = [ask(client) for _ in range(OTHERS)]
    with last_chunks(client) as wait_for_last:
        for number in range(count):
            others = [ask(client) if other.is_complete() else other for other in others]
            answer = ask(client)
            next(answer.stream(RESPONSE_S))
            time.sleep(chance.uniform(0.0, SPEAKS_WITHIN_S))
            spoken = time.monotonic()
            answer.cancel()
            found.append((wait_for_last(answer.id) - spoken) * 1e3)
            answer.result(RESPONSE_S)
            if number % 20 == 19:
                print(f'{number + 1} of {count} answers interrupted', flush=True)
    for other in others:
        other.cancel()
        other.result(RESPONSE_S)
    return found


def ask(client: Any) -> Any:
    """Ask for an answer that does not end soon."""
    return client.ask(LONG, max_tokens=MAX_TOKENS, no_learn=True, **PATIENT)


@contextmanager
def last_chunks(client: Any) -> Iterator[Any]:
    """Yield a function that returns when the last chunk of a query has arrived."""
    from mace_ros.msg import ResponseChunk

    arrived: dict[str, float] = {}
    changed = threading.Condition()

    def on_chunk(chunk: Any) -> None:
        if chunk.last:
            with changed:
                arrived[chunk.query_id] = time.monotonic()
                changed.notify_all()

    def wait_for_last(query_id: str) -> float:
        with changed:
            if not changed.wait_for(lambda: query_id in arrived, RESPONSE_S):
                raise TimeoutError(f'no last chunk of {query_id}')
            return arrived[query_id]

    subscription = client.node.create_subscription(
        ResponseChunk, f'{client.name}/response_chunk', on_chunk, 1000)
    try:
        yield wait_for_last
    finally:
        client.node.destroy_subscription(subscription)
