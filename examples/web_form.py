# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Show the robot's answers in a browser, and correct them there.

Run it beside the node, and open http://127.0.0.1:8080. The page has no password: it listens on
this machine only, unless --host says otherwise.
"""

import argparse
from collections import deque
from contextlib import suppress
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

from mace_ros.msg import Query, Response

from mace_ros.api.events import CorrectionState
from mace_ros.ros.client import MaceClient, RELIABLE

PAGE = """<!doctype html><meta charset="utf-8"><title>What the robot said</title>
<style>body{{font:16px sans-serif;max-width:50em;margin:2em auto;color-scheme:light dark}}
li{{margin:1em 0}}</style><h1>What the robot said</h1><ul>{rows}</ul>"""
ROW = """<li><b>{question}</b><br>{answer}<br><form method="post">
<input type="hidden" name="id" value="{id}"><input name="corrected" size="50"
placeholder="the right answer"> <button>Correct</button> {state}</form></li>"""


class Answers:
    """The latest answers of the node, and the corrections that were sent here."""

    def __init__(self, client: MaceClient, kept: int = 50) -> None:
        self._client = client
        self._questions: dict[str, str] = {}
        self._answers: deque[Response] = deque(maxlen=kept)
        self._corrections = {}
        node, name = client.node, client.name
        node.create_subscription(Query, f'{name}/query', self._on_query, RELIABLE)
        node.create_subscription(Response, f'{name}/response', self._on_response, RELIABLE)

    def _on_query(self, query: Query) -> None:
        self._questions[query.id] = query.text or query.messages[-1].content
        while len(self._questions) > 2 * self._answers.maxlen:
            del self._questions[next(iter(self._questions))]

    def _on_response(self, response: Response) -> None:
        self._answers.append(response)

    def correct(self, query_id: str, corrected: str) -> None:
        """Send the right answer to a query."""
        self._corrections[query_id] = self._client.correct(corrected, query_id=query_id)

    def page(self) -> str:
        """Return the page, newest answer first."""
        return PAGE.format(rows=''.join(ROW.format(
            id=escape(answer.query_id), answer=escape(answer.text or answer.error),
            question=escape(self._questions.get(answer.query_id, answer.query_id)),
            state=self._state(answer.query_id)) for answer in reversed(list(self._answers))))

    def _state(self, query_id: str) -> str:
        correction = self._corrections.get(query_id)
        if correction is None:
            return ''
        if correction.status is None:
            return 'sent'
        status = correction.status
        return escape(f'{CorrectionState(status.state).name} {status.reason}')


def handler(answers: Answers) -> type[BaseHTTPRequestHandler]:
    """Return the class that answers the browser."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = answers.page().encode()
            self.send_response(200)
            self.send_header('Content-Type', 'text/html; charset=utf-8')
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            sent = parse_qs(self.rfile.read(int(self.headers['Content-Length'])).decode())
            if 'id' in sent and 'corrected' in sent:
                answers.correct(sent['id'][0], sent['corrected'][0])
            self.send_response(303)     # so that reloading the page sends nothing again
            self.send_header('Location', '/')
            self.end_headers()

    return Handler


def main() -> None:
    """Serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--node', default='mace', help='name of the node (default: mace)')
    parser.add_argument('--host', default='127.0.0.1', help='(default: %(default)s)')
    parser.add_argument('--port', type=int, default=8080, help='(default: %(default)s)')
    given = parser.parse_args()
    with MaceClient(given.node) as client:
        server = ThreadingHTTPServer((given.host, given.port), handler(Answers(client)))
        print(f'open http://{given.host}:{server.server_port}', flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == '__main__':
    main()
