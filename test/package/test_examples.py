# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The examples run against a node (test_openai_clients.py runs the LangChain agent)."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import ThreadingHTTPServer
import json
import runpy
import threading
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from support.graph import wait_until
from support.ros_graph import ANSWER_S, NodeProcess, ROOT

from mace_ros.ros.client import MaceClient

EXAMPLES = ROOT / 'examples'


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name))


@pytest.fixture(scope='module')
def client(tiny_node: NodeProcess) -> Iterator[MaceClient]:
    with MaceClient() as made:
        made.wait_until_ready(ANSWER_S)
        yield made


def test_an_answer_is_corrected_in_the_browser(client: MaceClient) -> None:
    form = example('web_form.py')
    server = ThreadingHTTPServer(('127.0.0.1', 0), form['handler'](form['Answers'](client)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}/'

    def page(**sent: str) -> str:
        with urlopen(url, urlencode(sent).encode() if sent else None) as reply:
            return str(reply.read().decode())

    try:
        # The subscriptions of the page may be younger than the first answers.
        assert wait_until(lambda: client.ask('<Who> are you?', max_tokens=4).result(
            ANSWER_S).query_id in page(), ANSWER_S)
        answered = client.ask('<Who> are you?', max_tokens=4).result(ANSWER_S)
        assert wait_until(lambda: answered.query_id in page(), ANSWER_S)
        assert '<b>&lt;Who&gt; are you?</b>' in page()
        page(id=answered.query_id, corrected='I am Rover.')
        assert wait_until(lambda: 'LEARNED' in page(), ANSWER_S), page()
    finally:
        server.shutdown()
        server.server_close()
    assert client.ask('<Who> are you?', max_tokens=12).result(ANSWER_S).text == 'I am Rover.'


def test_a_leaf_of_a_behaviour_tree_asks(client: MaceClient) -> None:
    py_trees = pytest.importorskip('py_trees')
    context = Context()
    context.init()
    node = Node('tree', context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    try:
        ask = example('behaviour_tree.py')['Ask'](node, 'Where are you?', timeout_s=ANSWER_S)
        while ask.status not in (py_trees.common.Status.SUCCESS, py_trees.common.Status.FAILURE):
            ask.tick_once()
            executor.spin_once(0.05)
        assert ask.status is py_trees.common.Status.SUCCESS, ask.feedback_message
        assert ask.answer
    finally:
        executor.shutdown()
        node.destroy_node()
        context.try_shutdown()


def test_the_notebook_shows_what_was_taught(
        client: MaceClient, tiny_node: NodeProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('pandas')
    answered = client.ask('What is it?', max_tokens=4).result(ANSWER_S)
    client.correct('It is a rose.', query_id=answered.query_id).wait(timeout_s=ANSWER_S)
    assert client.ask('What is it?', max_tokens=12).result(ANSWER_S).text == 'It is a rose.'
    monkeypatch.setenv('MACE_STORAGE', str(tiny_node.folder / 'storage'))
    monkeypatch.setenv('MPLBACKEND', 'agg')
    cells = json.loads((EXAMPLES / 'journal.ipynb').read_text())['cells']
    seen: dict[str, Any] = {}

    def shows_what_was_taught() -> bool:
        for cell in cells:
            if cell['cell_type'] == 'code':
                exec(''.join(cell['source']), seen)
        return bool(seen['answers']['taught'].any())

    assert wait_until(shows_what_was_taught, ANSWER_S)      # the journal may be a moment behind
    corrections = seen['corrections']
    taught = corrections[corrections['corrected'] == 'It is a rose.']
    assert list(taught['state']) == ['LEARNED'] and len(seen['versions']) >= 1
