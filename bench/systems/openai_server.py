# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""``mace_openai`` in its own process, and connections to it."""

from __future__ import annotations

from collections.abc import Iterator
from http.client import HTTPConnection
import json
from pathlib import Path
import re
import subprocess
import sys
import time
from typing import Any

from bench.systems.node import ROOT

CHAT = '/v1/chat/completions'
START_S = 60.0
REPLY_S = 400.0     # at most, for a reply


class OpenAIServer:
    """A server on a free port, for the node ``mace``."""

    def __init__(self, folder: Path) -> None:
        """Start it, and wait until it listens; its log is in ``folder``."""
        self._log = folder / 'openai.log'
        with self._log.open('w') as log:
            self._process = subprocess.Popen(
                [sys.executable, '-m', 'mace_ros.openai.server', '--port', '0'], cwd=ROOT,
                stdout=log, stderr=subprocess.STDOUT)
        end = time.monotonic() + START_S
        while not (found := re.search(r'http://127\.0\.0\.1:(\d+)/v1', self.log)):
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise RuntimeError(f'mace_openai does not listen: {self.log}')
            time.sleep(0.05)
        self.port = int(found[1])

    @property
    def log(self) -> str:
        """The output of the process so far."""
        return self._log.read_text()

    def wait_until_ready(self) -> None:
        """Wait until it knows the node; raises TimeoutError."""
        end = time.monotonic() + START_S
        while True:
            http = HTTPConnection('127.0.0.1', self.port, timeout=START_S)
            http.request('GET', '/health')
            status = http.getresponse().status
            http.close()
            if status == 200:
                return
            if time.monotonic() > end:
                raise TimeoutError(f'mace_openai is not ready: {self.log}')
            time.sleep(0.1)

    def is_running(self) -> bool:
        """Return whether the process has not ended."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()


def chat_body(text: str, **fields: Any) -> bytes:
    """Return the body of a chat completion that nothing is learned from and nothing refuses."""
    return json.dumps({
        'model': 'mace', 'messages': [{'role': 'user', 'content': text}], 'no_learn': True,
        'ttft_slo_ms': 6e5, 'tpot_slo_ms': 6e5, **fields}).encode()


class Connection:
    """A connection that is kept open from request to request, as OpenAI's clients do."""

    def __init__(self, port: int, timeout_s: float = REPLY_S) -> None:
        """Connect at the first request; ``timeout_s`` is how long to wait for each byte."""
        self._http = HTTPConnection('127.0.0.1', port, timeout=timeout_s)

    def close(self) -> None:
        """Disconnect; the next request connects again."""
        self._http.close()

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Return status and body of a reply."""
        self._http.request('POST', path, body)
        reply = self._http.getresponse()
        return reply.status, reply.read()

    def chunks(self, body: bytes) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a streamed chat; raises ``RuntimeError`` if it is refused."""
        self._http.request('POST', CHAT, body)
        reply = self._http.getresponse()
        if reply.status != 200:
            raise RuntimeError(f'{reply.status}: {reply.read().decode()}')
        while line := reply.readline():
            if line.startswith(b'data: {'):
                chunk = json.loads(line[6:])
                if 'error' in chunk:
                    raise RuntimeError(str(chunk['error']))
                yield chunk

    def stream(self, body: bytes) -> Iterator[str]:
        """Yield the texts of a streamed chat; raises as :meth:`chunks`."""
        for chunk in self.chunks(body):
            if text := chunk['choices'][0]['delta'].get('content'):
                yield text
