# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Whether HTTP clients that read slowly slow the others.

Slow readers leave more unread than the buffers on the way hold (their own, the kernel's, the HTTP
server's), so that the server can send nothing more to them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
import json
import socket
import statistics
import threading
import time
from typing import Any

from bench.systems.interruptions import LONG, MAX_TOKENS, RESPONSE_S
from bench.systems.openai_server import chat_body, Connection

READERS = 4             # whose time per token is measured, beside as many slow ones
BYTE_EVERY_S = 0.2      # what a slow reader reads
RECEIVE_BUFFER = 2048   # bytes, of a slow reader
SEGMENT = 536           # bytes: the smaller, the less does the kernel buffer for sending
KNOWN_CHUNKS = 8        # that a slow reader reads at once, to know their size
BUFFERED_KB = 288       # 224 by the kernel, 64 by uvicorn before it lets the writer wait
FILL_KB = 340           # published for each before the others are measured, of which it reads 34
FILL_S = 60.0           # at most, until that is published
PAUSE_S = 0.05          # between two answers whose first token is timed
TIMED_TOKENS = 4        # of such an answer

Row = dict[str, Any]


def slow_readers(client: Any, port: int, pairs: int, seconds: float) -> list[Row]:
    """
    Return rows of blocks beside :data:`READERS` clients that read slowly, or at once.

    A row has the time per piece of text of :data:`READERS` other answers, the TTFT of answers that
    are asked for one after the other, and what each slow reader has left unread in the end.
    """
    rows = []
    with published(client) as chunks:
        for pair in range(-1, pairs):     # the first one warms up
            # The order alternates, so that a drift of the machine affects both alike.
            for slow in ((False, True) if pair % 2 else (True, False)):
                with beside(port, chunks, slow=slow) as readers:
                    row = {'pair': pair, 'slow': slow, **measured(port, seconds)}
                    row['unread_kb'] = [reader.unread_kb for reader in readers]
                if pair >= 0:
                    rows.append(row)
                    print(f'others read {"slowly" if slow else "at once"}: '
                          f'{row["piece_ms"]:.1f} ms per piece, TTFT '
                          f'{statistics.median(row["ttft_ms"]):.1f} ms, unread '
                          f'{min(row["unread_kb"]):.0f} KB', flush=True)
    return rows


@contextmanager
def published(client: Any) -> Iterator[Counter[str]]:
    """Yield how many chunks the node has published of each query."""
    from mace_ros.msg import ResponseChunk

    counts = Counter[str]()
    subscription = client.node.create_subscription(
        ResponseChunk, f'{client.name}/response_chunk',
        lambda chunk: counts.update([chunk.query_id]), 1000)
    try:
        yield counts
    finally:
        client.node.destroy_subscription(subscription)


# -- those beside ------------------------------------------------------------------------


class Reader:
    """A client that reads a long answer with log-probabilities, slowly or at once."""

    def __init__(self, port: int, published: Counter[str], *, slow: bool) -> None:
        """Connect; ``published`` counts the chunks of each query."""
        self._published, self._slow = published, slow
        self._query_id, self._chunk_bytes, self._read = '', 0.0, 0
        self._done = threading.Event()
        self._socket = socket.socket()
        if slow:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)
        self._socket.connect(('127.0.0.1', port))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def published_kb(self) -> float:
        """What the node has published for it, in KB."""
        return self._published[self._query_id] * self._chunk_bytes / 1e3

    @property
    def unread_kb(self) -> float:
        """What it has not read of that, in KB."""
        return self.published_kb - self._read / 1e3

    def close(self) -> None:
        """Disconnect."""
        self._done.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        body = endless(logprobs=True, top_logprobs=20)
        with suppress(OSError):     # closed at the end of the block
            self._socket.sendall((
                'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n'
                f'Content-Length: {len(body)}\r\n\r\n').encode() + body)
            begun = b''
            while begun.count(b'data: {') <= KNOWN_CHUNKS + 1:
                begun += self._socket.recv(512)
            # The first chunk has no text.
            first, *others = begun.split(b'data: {')[1:-1]
            self._chunk_bytes = statistics.mean(len(each) for each in others)
            self._read = len(begun)
            self._query_id = json.loads(b'{' + first.partition(b'\n')[0])['id']
            while not self._done.wait(BYTE_EVERY_S if self._slow else 0.0):
                part = self._socket.recv(1 if self._slow else 65536)
                if not part:
                    return
                self._read += len(part)


@contextmanager
def beside(port: int, published: Counter[str], *, slow: bool) -> Iterator[list[Reader]]:
    """Keep :data:`READERS` clients; yield once they are so far that slow ones are stuck."""
    readers = [Reader(port, published, slow=slow) for _ in range(READERS)]
    try:
        end = time.monotonic() + FILL_S
        while any(reader.published_kb < FILL_KB for reader in readers):
            if time.monotonic() > end:
                raise TimeoutError('too little of the answers is published')
            time.sleep(0.05)
        yield readers
    finally:
        for reader in readers:
            reader.close()


# -- those that are measured -------------------------------------------------------------


def measured(port: int, seconds: float) -> Row:
    """Return the milliseconds per piece of :data:`READERS` answers, and the TTFT of others."""
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
    try:
        begun.wait(RESPONSE_S)
        ttft_ms: list[float] = []
        before, begun_at = sum(counts), time.monotonic()
        while time.monotonic() < begun_at + seconds:
            ttft_ms.append(first_token_ms(port, len(ttft_ms)))
            time.sleep(PAUSE_S)
        elapsed = time.monotonic() - begun_at
        pieces = sum(counts) - before
    finally:
        done.set()
        for thread in threads:
            thread.join()
    return {'piece_ms': READERS * elapsed * 1e3 / max(pieces, 1), 'ttft_ms': ttft_ms}


def first_token_ms(port: int, number: int) -> float:
    """Return the TTFT of an answer, as the client measures it."""
    http, begun, first = Connection(port), time.monotonic(), 0.0
    for _ in http.stream(chat_body(f'Tell me about room {number}.', stream=True,
                                   max_tokens=TIMED_TOKENS)):
        first = first or time.monotonic() - begun
    http.close()
    return first * 1e3


def endless(**fields: Any) -> bytes:
    """Return the body of a streamed chat that does not end soon."""
    return chat_body(LONG, stream=True, max_tokens=MAX_TOKENS, temperature=0.0, **fields)
