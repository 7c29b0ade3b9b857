# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""``mace_openai`` in a process of its own, and plain requests to it."""

from __future__ import annotations

import http.client
import json
import os
from pathlib import Path
import re
import subprocess
import sys
from typing import Any

from support.graph import ENVIRONMENT, wait_until
from support.ros_graph import ROOT

START_S = 60.0


class ServerProcess:
    """A server on a free port, to be ended by :meth:`stop`."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._log = folder / 'openai.log'
        with self._log.open('w') as log:
            self.process = subprocess.Popen(
                [sys.executable, '-m', 'mace_ros.openai.server', '--port', '0', *arguments],
                cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=log)
        assert wait_until(lambda: self._port or self.process.poll() is not None, START_S)
        assert self._port, self.log
        self.port = int(self._port[1])

    @property
    def _port(self) -> re.Match[str] | None:
        return re.search(r'http://127\.0\.0\.1:(\d+)/v1', self.log)

    @property
    def log(self) -> str:
        """Everything that the server has printed."""
        return self._log.read_text()

    @property
    def url(self) -> str:
        """The base URL for OpenAI's clients."""
        return f'http://127.0.0.1:{self.port}/v1'

    def stop(self) -> int:
        """End the server; return its exit code."""
        self.process.terminate()
        try:
            return self.process.wait(20.0)
        finally:
            self.process.kill()

    def request(self, method: str, path: str, body: object = None,
                headers: dict[str, str] | None = None) -> tuple[int, Any, dict[str, str]]:
        """Return status, body and headers of a reply; a body in bytes is sent as it is."""
        connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=100.0)
        try:
            sent = body if isinstance(body, bytes) or body is None else json.dumps(body)
            connection.request(method, path, sent, headers or {})
            reply = connection.getresponse()
            text = reply.read().decode()
            kind = reply.headers.get_content_type()
            return (reply.status, json.loads(text) if kind == 'application/json' else text,
                    {name.lower(): value for name, value in reply.getheaders()})
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """Return a number of /metrics, given with its labels; 0 if it is not there."""
        _, text, _ = self.request('GET', '/metrics')
        found = re.search(f'^{re.escape(name)} (.*)$', text, re.MULTILINE)
        return float(found[1]) if found else 0.0
