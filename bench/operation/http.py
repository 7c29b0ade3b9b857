# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What OpenAI's API over HTTP adds to a node, and what it withstands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
import random
import threading
import time
from typing import Any

from bench.systems.interruptions import ask, PATIENT, RESPONSE_S
from bench.systems.openai_server import chat_body, Connection, OpenAIServer

OTHERS = 2              # answers that are given while the first token is timed
TIMED_TOKENS = 2        # of an answer that is timed
PAUSE_S = 0.05          # at most, between two of them: longer than an iteration
CLIENTS = 32
QUESTION = 'Tell me about room 7.'
WARM_UPS = 3            # afterwards the prefix cache has the question
CANCEL_S = 5.0          # after which a client disconnects from the answer to a fuzzed body
SLOWEST = 10            # fuzzed bodies that are listed

Row = dict[str, Any]


def first_tokens(client: Any, port: int, pairs: int) -> list[Row]:
    """
    Return rows of the TTFT of the same question over HTTP and over the topic, in turn.

    A row has ``others`` (how many answers are given meanwhile), ``http_ms`` and ``topic_ms``,
    both as the client measures them.
    """
    rows, chance = [], random.Random(1)
    http = Connection(port)
    for others in (OTHERS, 0):
        with answers_beside(client, others) as keep_going:
            for pair in range(-WARM_UPS, pairs if others else pairs // 2):
                row: Row = {'others': others}
                for way in (('http', 'topic') if pair % 2 else ('topic', 'http')):
                    keep_going()
                    # Otherwise each question would begin at the same moment of an iteration.
                    time.sleep(chance.uniform(0.0, PAUSE_S))
                    row[f'{way}_ms'] = 1e3 * (
                        first_over_http(http) if way == 'http' else first_over_topic(client))
                if pair >= 0:
                    rows.append(row)
    http.close()
    return rows


@contextmanager
def answers_beside(client: Any, count: int) -> Iterator[Callable[[], None]]:
    """Keep that many answers running; the function that is yielded replaces ended ones."""
    answers = [ask(client) for _ in range(count)]

    def keep_going() -> None:
        answers[:] = [ask(client) if each.is_complete() else each for each in answers]

    for answer in answers:
        next(answer.stream(RESPONSE_S))
    try:
        yield keep_going
    finally:
        for answer in answers:
            answer.cancel()
            answer.result(RESPONSE_S)


def first_over_http(http: Connection) -> float:
    """Return the seconds until the first text of a streamed chat has arrived."""
    begun, first = time.monotonic(), 0.0
    for _ in http.stream(chat_body(QUESTION, stream=True, max_tokens=TIMED_TOKENS)):
        first = first or time.monotonic() - begun
    return first


def first_over_topic(client: Any) -> float:
    """Return the seconds until the first chunk of the same answer has arrived."""
    from mace_ros.msg import ChatMessage

    begun = time.monotonic()
    answer = client.ask(messages=[ChatMessage(role='user', content=QUESTION)], no_learn=True,
                        max_tokens=TIMED_TOKENS, **PATIENT)
    answer.result(RESPONSE_S)
    return float(answer.first_text_at - begun)


# -- saturation --------------------------------------------------------------------------


def saturate(port: int, seconds: float) -> Counter[str]:
    """Let :data:`CLIENTS` clients ask without a pause; return how often each outcome occurred."""
    end, outcomes = time.monotonic() + seconds, Counter[str]()
    changed = threading.Lock()

    def ask_on(number: int) -> None:
        http = Connection(port)
        while time.monotonic() < end:
            outcome = outcome_of(http, chat_body(
                f'Say {number}.', max_tokens=16, stream=number % 2 == 0))
            with changed:
                outcomes[outcome] += 1
        http.close()

    with ThreadPoolExecutor(CLIENTS) as threads:
        list(threads.map(ask_on, range(CLIENTS)))
    return outcomes


def outcome_of(http: Connection, body: bytes) -> str:
    """Return the status of a chat, or what was wrong with its reply."""
    try:
        status, reply = http.post('/v1/chat/completions', body)
    except (OSError, HTTPException) as error:
        http.close()
        return type(error).__name__
    return 'error in a stream' if status == 200 and b'"error":' in reply else str(status)


# -- fuzzed bodies -----------------------------------------------------------------------


def fuzz(server: OpenAIServer, count: int) -> Row:
    """
    Send fuzzed bodies from several clients; return how often each outcome occurred.

    ``broken`` are the bodies after which the server was at fault, and ``slowest`` those that took
    most time, in seconds.
    """
    from bench.operation.fuzzed_bodies import fuzzed

    broken, sent = [], []
    connections = threading.local()

    def send(each: tuple[str, bytes]) -> None:
        path, body = each
        if not hasattr(connections, 'http'):
            connections.http = Connection(server.port, timeout_s=CANCEL_S)
        begun, reply = time.monotonic(), b''
        try:
            status, reply = connections.http.post(path, body)
            outcome = str(status)
            at_fault = status >= 500 or b'internal_error' in reply
        except TimeoutError:        # a long answer, which disconnecting cancels
            outcome, at_fault = 'cancelled', False
        except (OSError, HTTPException) as error:
            outcome, at_fault = type(error).__name__, True
        if not reply:
            connections.http.close()
        if at_fault:
            broken.append([outcome, path, extract(body), extract(reply)])
        sent.append((time.monotonic() - begun, outcome, path, body))

    bodies = fuzzed(count)
    begun = time.monotonic()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(send, bodies))
    status, _ = Connection(server.port).post('/v1/chat/completions', chat_body(
        'Are you still there?', max_tokens=4))
    slowest = [[round(seconds, 2), outcome, path, len(body), extract(body)] for
               seconds, outcome, path, body in sorted(sent, reverse=True)[:SLOWEST]]
    for row in slowest:
        print('slowest bodies: {} s, {}, {}, {} bytes: {}'.format(*row), flush=True)
    return {'outcomes': dict(Counter(outcome for _, outcome, _, _ in sent)),
            'broken': broken[:20], 'slowest': slowest, 'faults': len(broken),
            'seconds': time.monotonic() - begun, 'afterwards': status,
            'tracebacks': server.log.count('Traceback'), 'running': server.is_running()}


def extract(body: bytes) -> str:
    """Return the beginning and the end of a body as text."""
    return repr(body if len(body) <= 300 else body[:150] + b' ... ' + body[-150:])
