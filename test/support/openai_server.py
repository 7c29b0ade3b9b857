# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""``mace_openai`` in a process of its own, alone or with a node, and plain requests to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import http.client
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
from support.chat_templates import HERMES
from support.graph import ENVIRONMENT, wait_until
from support.robot import RANDOM_MODEL
from support.ros_graph import NodeProcess, ROOT

START_S = 100.0
LEARNED_S = 200.0


class ServerProcess:
    """A server on a free port, to be ended by :meth:`stop`."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
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
            return self.process.wait(60.0)
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

    def feedback(self, **body: object) -> str:
        """Give feedback that must be taken; return its id."""
        status, reply, _ = self.request('POST', '/v1/feedback', body)
        assert status in (200, 202), reply
        return str(reply['id'])

    def status(self, feedback_id: str, *ends: str) -> dict[str, Any]:
        """Wait until the feedback has one of these statuses; return what is known of it."""
        path = f'/v1/feedback/{feedback_id}'
        assert wait_until(
            lambda: self.request('GET', path)[1]['status'] in ends, LEARNED_S), (
                self.request('GET', path)[1])
        return dict(self.request('GET', path)[1])

    def metric(self, name: str) -> float:
        """Return a number of /metrics, given with its labels; 0 if it is not there."""
        _, text, _ = self.request('GET', '/metrics')
        found = re.search(f'^{re.escape(name)} (.*)$', text, re.MULTILINE)
        return float(found[1]) if found else 0.0


@contextmanager
def serving(folder: Path, node: NodeProcess, *arguments: str) -> Iterator[ServerProcess]:
    """Yield a server that is ready, and must end by itself when it is told to."""
    made = ServerProcess(folder, *arguments)
    try:
        assert wait_until(lambda: made.request('GET', '/health')[0] == 200, 100.0), node.log
        yield made
        assert made.stop() == 0, made.log
        assert 'Traceback' not in made.log
    finally:
        made.process.kill()


@contextmanager
def served_node(folder: Path, model: Path, **parameters: object) -> Iterator[ServerProcess]:
    """Yield a server of a node with a copy of a random model whose template has tools."""
    shutil.copytree(model, folder / 'model')
    (folder / 'model' / 'chat_template.jinja').write_text(HERMES)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        node = NodeProcess(folder, **{
            'model.source': folder / 'model', 'model.threads': 1, 'model.weight_dtype': 'float32',
            **RANDOM_MODEL, 'monitor.rate_hz': 10.0, **parameters})
        node.start()
        try:
            with serving(folder, node) as made:
                yield made
        finally:
            node.kill()
