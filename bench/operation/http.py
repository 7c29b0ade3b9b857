# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What OpenAI's API over HTTP adds to a node, and what it withstands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPException
import random
import socket
import threading
import time
from typing import Any

from bench.systems.interruptions import ask, LONG, MAX_TOKENS, PATIENT, RESPONSE_S
from bench.systems.openai_server import chat_body, Connection, OpenAIServer

OTHERS = 2              # answers that are given while the first token is timed
TIMED_TOKENS = 4        # of an answer that is timed
PAUSE_S = 0.05          # at most, between two of them: longer than an iteration
CLIENTS = 32
READERS = 4             # whose time per token is measured, beside as many slow ones
BYTE_EVERY_S = 0.2      # what a slow reader reads
RECEIVE_BUFFER = 2048   # bytes, of a slow reader

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
            for pair in range(pairs if others else pairs // 2):
                row: Row = {'others': others}
                text = f'Tell me about room {pair}.'
                for way in (('http', 'topic') if pair % 2 else ('topic', 'http')):
                    keep_going()
                    # Otherwise each question would begin at the same moment of an iteration.
                    time.sleep(chance.uniform(0.0, PAUSE_S))
                    row[f'{way}_ms'] = 1e3 * (
                        first_over_http(http, text) if way == 'http'
                        else first_over_topic(client, text))
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


def first_over_http(http: Connection, text: str) -> float:
    """Return the seconds until the first text of a streamed chat has arrived."""
    begun, first = time.monotonic(), 0.0
    for _ in http.stream(chat_body(text, stream=True, max_tokens=TIMED_TOKENS)):
        first = first or time.monotonic() - begun
    return first


def first_over_topic(client: Any, text: str) -> float:
    """Return the seconds until the first chunk of the same answer has arrived."""
    from mace_ros.msg import ChatMessage

    begun = time.monotonic()
    answer = client.ask(messages=[ChatMessage(role='user', content=text)], no_learn=True,
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


# -- slow readers ------------------------------------------------------------------------


def slow_readers(port: int, pairs: int, seconds: float) -> list[Row]:
    """Return rows of blocks in which :data:`READERS` other clients read slowly, or at once."""
    rows = []
    for pair in range(-1, pairs):     # the first one warms up
        # The order alternates, so that a drift of the machine affects both alike.
        for slow in ((False, True) if pair % 2 else (True, False)):
            with other_readers(port, slow=slow):
                rate = pieces_per_s(port, seconds)
            if pair >= 0:
                rows.append({'pair': pair, 'slow': slow, 'pieces_per_s': rate})
                print(f'others read {"slowly" if slow else "at once"}: {rate:.1f} pieces/s',
                      flush=True)
    return rows


@contextmanager
def other_readers(port: int, *, slow: bool) -> Iterator[None]:
    """Read :data:`READERS` endless answers in a thread, slowly or at once."""
    done = threading.Event()
    body = endless()
    head = (f'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n'
            f'Content-Length: {len(body)}\r\n\r\n').encode()
    sockets = [socket.socket() for _ in range(READERS)]
    for each in sockets:
        if slow:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        each.connect(('127.0.0.1', port))
        each.sendall(head + body)

    def read(each: socket.socket) -> None:
        with suppress(OSError):     # closed at the end of the block
            while not done.is_set() and each.recv(1 if slow else 65536):
                done.wait(BYTE_EVERY_S if slow else 0.0)

    threads = [threading.Thread(target=read, args=(each,)) for each in sockets]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for each in sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in threads:
            thread.join()


def pieces_per_s(port: int, seconds: float) -> float:
    """Return how many pieces of text :data:`READERS` clients receive together per second."""
    counts, begun, done = [0] * READERS, threading.Barrier(READERS + 1), threading.Event()

    def read(number: int) -> None:
        http, waiting = Connection(port), True
        while not done.is_set():
            for _ in http.stream(endless()):
                if waiting:
                    begun.wait(RESPONSE_S)
                    waiting = False
                counts[number] += 1
                if done.is_set():
                    break
            http.close()

    threads = [threading.Thread(target=read, args=(n,)) for n in range(READERS)]
    for thread in threads:
        thread.start()
    begun.wait(RESPONSE_S)
    before, begun_at = sum(counts), time.monotonic()
    time.sleep(seconds)
    rate = (sum(counts) - before) / (time.monotonic() - begun_at)
    done.set()
    for thread in threads:
        thread.join()
    return rate


def endless() -> bytes:
    """Return the body of a streamed chat that does not end soon."""
    return chat_body(LONG, stream=True, max_tokens=MAX_TOKENS, temperature=0.0)


# -- fuzzed bodies -----------------------------------------------------------------------


def fuzz(server: OpenAIServer, count: int) -> Row:
    """
    Send fuzzed bodies from several clients; return how often each outcome occurred.

    ``broken`` are the bodies after which the server was at fault.
    """
    from bench.operation.fuzzed_bodies import fuzzed

    outcomes, broken, slow = Counter[str](), [], []
    connections = threading.local()

    def send(each: tuple[str, bytes]) -> None:
        path, body = each
        if not hasattr(connections, 'http'):
            connections.http = Connection(server.port, timeout_s=5.0)
        try:
            status, reply = connections.http.post(path, body)
            outcome = str(status)
            if status >= 500 or b'internal_error' in reply:
                broken.append([outcome, path, repr(body[:300]), repr(reply[:300])])
        except TimeoutError:        # a long answer, which disconnecting cancels
            outcome = 'cancelled'
            slow.append([path, repr(body[:300])])
            connections.http.close()
        except (OSError, HTTPException) as error:
            outcome = type(error).__name__
            broken.append([outcome, path, repr(body[:300]), ''])
            connections.http.close()
        outcomes[outcome] += 1

    bodies = fuzzed(count)
    begun = time.monotonic()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(send, bodies))
    status, _ = Connection(server.port).post('/v1/chat/completions', chat_body(
        'Are you still there?', max_tokens=4))
    return {'outcomes': dict(outcomes), 'broken': broken[:20], 'slow': slow[:20],
            'faults': len(broken),
            'seconds': time.monotonic() - begun, 'afterwards': status,
            'tracebacks': server.log.count('Traceback'), 'running': server.is_running()}
