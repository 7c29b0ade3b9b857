# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The server beside a node that is stopped, busy or inactive, and clients that do not read."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, ExitStack
import http.client
import json
from pathlib import Path
import signal
import socket
from typing import Any

from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from mace_ros.msg import ResponseChunk
import pytest
from support.graph import wait_until
from support.openai_server import ServerProcess, serving
from support.robot import NO_END
from support.ros_graph import call, NodeProcess, PATIENT, Recorder, set_parameters

from mace_ros.ros.client import AnswerHandle, MaceClient

TIMEOUT_S = 2.0         # of the impatient server
PATIENCE_S = 100.0      # of the tests
END_TOKENS = dict.fromkeys(('0', '2'), -100)    # of the model: the answer does not end by itself
CHAT = '/v1/chat/completions'


def hi(**options: object) -> dict[str, object]:
    return {'model': 'mace', 'messages': [{'role': 'user', 'content': 'Hi.'}], 'max_tokens': 5,
            'temperature': 0.0, **options}


@pytest.fixture(scope='module')
def server(tmp_path_factory: pytest.TempPathFactory,
           tiny_node: NodeProcess) -> Iterator[ServerProcess]:
    with serving(tmp_path_factory.mktemp('server'), tiny_node) as made:
        yield made


@pytest.fixture(scope='module')
def impatient(tmp_path_factory: pytest.TempPathFactory,
              tiny_node: NodeProcess) -> Iterator[ServerProcess]:
    """Yield a server that waits two seconds for the node and for its clients."""
    with serving(tmp_path_factory.mktemp('impatient'), tiny_node, '--timeout', str(TIMEOUT_S),
                 '--max-concurrent', '3') as made:
        yield made


@contextmanager
def stopped(node: NodeProcess) -> Iterator[None]:
    node.send(signal.SIGSTOP)
    try:
        yield
    finally:
        node.send(signal.SIGCONT)


@contextmanager
def streamed(server: ServerProcess, **options: object) -> Iterator[http.client.HTTPResponse]:
    """Yield the reply to a streamed request; leave it early by closing its connection."""
    connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=100.0)
    try:
        connection.request('POST', CHAT, json.dumps(hi(stream=True, **options)))
        yield connection.getresponse()
    finally:
        connection.close()


@contextmanager
def begun(client: MaceClient, others: int = 0) -> Iterator[AnswerHandle]:
    """Yield a long answer of another client that has begun, slowed down by ``others`` like it."""
    client.wait_until_ready(PATIENCE_S)
    answers = [client.ask('Sing.', max_tokens=3900, **NO_END, **PATIENT)
               for _ in range(1 + others)]
    assert next(answers[0].stream(PATIENCE_S))
    yield answers[0]
    for answer in answers:
        answer.cancel()
    for answer in answers:
        answer.result(PATIENCE_S)


def cancelled(server: ServerProcess) -> float:
    return server.metric('mace_queries_total{finish_reason="cancelled"}')


def test_a_node_that_sends_nothing_is_a_timeout(
        impatient: ServerProcess, tiny_node: NodeProcess) -> None:
    with streamed(impatient, max_tokens=3000, logit_bias=END_TOKENS) as begun:
        assert begun.readline().startswith(b'data: {')
        with stopped(tiny_node), ThreadPoolExecutor(2) as threads:
            replies = threads.map(lambda stream: impatient.request(
                'POST', CHAT, hi(stream=stream)), (False, True))
            for status, body, _ in replies:
                assert (status, body['error']['code']) == (408, 'timeout')
            *_, error, done = [line for line in begun.read().decode().split('\n') if line]
    assert json.loads(error.removeprefix('data: '))['error']['code'] == 'timeout'
    assert done == 'data: [DONE]'


def test_a_body_that_does_not_arrive_is_a_timeout(impatient: ServerProcess) -> None:
    with socket.create_connection(('127.0.0.1', impatient.port), 30.0) as connection:
        connection.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: a\r\n'
                           b'Content-Length: 9\r\n\r\nhalf')
        reply = http.client.HTTPResponse(connection)
        reply.begin()
        assert (reply.status, json.load(reply)['error']['code']) == (408, 'timeout')


def test_a_node_that_does_not_answer_is_not_healthy(
        server: ServerProcess, tiny_node: NodeProcess) -> None:
    with stopped(tiny_node):
        status, body, headers = server.request('GET', '/health')
        assert (status, headers.get('retry-after')) == (503, '1')
        assert body['state'] == 'silent'
    assert wait_until(lambda: server.request('GET', '/health')[0] == 200, PATIENCE_S)


def health(server: ServerProcess, state: str) -> tuple[int, Any, dict[str, str]]:
    """Return the reply that gives this state; a node that is slow to give it is silent at first."""
    replies: list[tuple[int, Any, dict[str, str]]] = []
    assert wait_until(
        lambda: replies.append(server.request('GET', '/health'))
        or replies[-1][1]['state'] == state, PATIENCE_S), replies[-1]
    return replies[-1]


def test_an_inactive_node_is_not_healthy(server: ServerProcess, tiny_node: NodeProcess) -> None:
    with MaceClient() as client:
        def change(transition: int) -> None:
            assert call(client, ChangeState, '/mace/change_state',
                        transition=Transition(id=transition)).success

        change(Transition.TRANSITION_DEACTIVATE)
        try:
            status, body, headers = health(server, 'inactive')
            assert (status, headers.get('retry-after')) == (503, '1')
            assert body['error']['message'] == '/mace is inactive'
            status, body, _ = server.request('POST', CHAT, hi())
            assert (status, body['error']['code']) == (503, 'not_serving')
        finally:
            change(Transition.TRANSITION_ACTIVATE)
    status, body, _ = health(server, 'active')
    assert (status, body) == (200, {'status': 'ok', 'state': 'active'})


@pytest.mark.parametrize(('values', 'options', 'code'), [
    ({'slo.admission': 'reject'}, {'ttft_slo_ms': 0.001}, 'slo_unreachable'),
    ({'scheduler.max_queue': 1, 'scheduler.max_requests': 1}, {}, 'overloaded')])
def test_a_node_that_has_too_much_to_do_is_to_be_asked_again(
        server: ServerProcess, values: dict[str, object], options: dict[str, object],
        code: str) -> None:
    with MaceClient() as client, ThreadPoolExecutor(8) as threads, begun(client) as busy:
        before = {'slo.admission': 'serve_late', 'scheduler.max_queue': 1000,
                  'scheduler.max_requests': 16}
        assert all(ok for ok, _ in set_parameters(client, values))
        try:
            asked = [threads.submit(server.request, 'POST', CHAT, hi(stream=stream, **options))
                     for stream in (False, True) * 4]
            assert wait_until(lambda: sum(each.done() for each in asked) >= 7, PATIENCE_S)
            assert not busy.is_complete()
            busy.cancel()       # the query that waits comes next
            replies = [each.result(PATIENCE_S) for each in asked]
        finally:
            set_parameters(client, before)
    refused = [(body, headers) for status, body, headers in replies if status == 429]
    assert len(refused) >= 7 and all(status in (200, 429) for status, _, _ in replies)
    for body, headers in refused:
        assert (body['error']['type'], body['error']['code']) == ('rate_limit_error', code)
        assert body['error']['message'] and headers['retry-after'] == '1'


def test_an_answer_that_is_cancelled_over_ros_is_not_asked_again(server: ServerProcess) -> None:
    with MaceClient() as client, ThreadPoolExecutor(1) as threads, Recorder(
            client, response_chunk=ResponseChunk) as recorder:
        client.wait_until_ready(PATIENCE_S)
        reply = threads.submit(server.request, 'POST', CHAT, hi(
            max_tokens=3900, logit_bias=END_TOKENS))
        assert wait_until(lambda: recorder.messages, PATIENCE_S)
        client.cancel(recorder.messages[0].query_id)
        status, body, headers = reply.result(PATIENCE_S)
    assert (status, body['error']['code']) == (503, 'cancelled')
    assert headers['x-should-retry'] == 'false' and 'retry-after' not in headers


def test_feedback_during_an_answer_waits_for_its_end(
        server: ServerProcess, tiny_node: NodeProcess) -> None:
    with MaceClient() as client, streamed(
            server, max_tokens=3900, logit_bias=END_TOKENS) as reply:
        completion = json.loads(reply.readline().removeprefix(b'data: '))['id']
        body = {'id': completion, 'corrected': 'Hello.', 'feedback_id': 'greeting'}
        status, feedback, _ = server.request('POST', '/v1/feedback', body)
        assert (status, feedback['id'], feedback['status']) == (202, 'greeting', 'waiting')
        assert server.request('GET', '/v1/feedback/greeting')[1] == feedback
        assert server.request('POST', '/v1/feedback', body)[0] == 409
        client.wait_until_ready(PATIENCE_S)
        client.cancel(completion)
        assert reply.read().endswith(b'data: [DONE]\n\n')
    assert wait_until(lambda: server.request('GET', '/v1/feedback/greeting')[1]['status'] in (
        'accepted', 'training', 'learned'), PATIENCE_S)


@contextmanager
def unread(server: ServerProcess, **options: object) -> Iterator[socket.socket]:
    """Ask for a long stream; yield its connection, which has read nothing."""
    body = json.dumps(hi(stream=True, logprobs=True, top_logprobs=20, logit_bias=END_TOKENS,
                         **options)).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(('127.0.0.1', server.port))
        connection.sendall(b'POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n' % (
            CHAT.encode(), len(body)) + body)
        yield connection


def test_a_stream_that_is_not_read_does_not_fill_the_memory(server: ServerProcess) -> None:
    before = cancelled(server)
    with unread(server, n=4, max_tokens=900) as connection:
        assert wait_until(lambda: cancelled(server) == before + 1, PATIENCE_S)
        connection.settimeout(30.0)
        end = b''
        while b'[DONE]' not in end:
            end = end[-1000:] + connection.recv(2**16)
    assert b'"code":"slow_reader"' in end


def test_a_server_that_ends_cancels_its_answers(
        server: ServerProcess, tmp_path: Path, tiny_node: NodeProcess) -> None:
    before = cancelled(server)
    endless = {'max_tokens': 3900, 'logit_bias': END_TOKENS}
    with serving(tmp_path, tiny_node) as ending, MaceClient() as client, Recorder(
            client, response_chunk=ResponseChunk) as recorder, streamed(
            ending, **endless) as begun, ThreadPoolExecutor(1) as threads:
        whole = threads.submit(ending.request, 'POST', CHAT, hi(**endless))
        assert wait_until(lambda: len({m.query_id for m in recorder.messages}) == 2, PATIENCE_S)
        assert ending.stop() == 0, ending.log
        *_, error, done = [line for line in begun.read().decode().split('\n') if line]
        status, body, _ = whole.result(PATIENCE_S)
        assert wait_until(lambda: cancelled(server) == before + 2, PATIENCE_S)
    event = json.loads(error.removeprefix('data: '))
    assert (event['error']['code'], done) == ('server_ended', 'data: [DONE]')
    assert (status, body['error']['code']) == (503, 'server_ended')


def test_feedback_on_an_answer_that_another_client_gets_does_not_hold_the_server_up(
        tmp_path: Path, tiny_node: NodeProcess) -> None:
    with serving(tmp_path, tiny_node) as server, ThreadPoolExecutor(40) as threads, (
            MaceClient()) as client, begun(client, others=15) as answer:
        replies = list(threads.map(lambda _: server.request(
            'POST', '/v1/feedback', {'id': answer.id, 'rating': 'down'}), range(40)))
        assert {(status, body['status']) for status, body, _ in replies} == {(202, 'waiting')}
        assert server.stop() == 0
        assert not answer.is_complete()


def test_a_client_that_does_not_read_loses_its_connection(impatient: ServerProcess) -> None:
    with ExitStack() as clients:
        for _ in range(3):      # all that may run at once
            clients.enter_context(unread(impatient, max_tokens=900))
        assert wait_until(lambda: impatient.request('POST', CHAT, hi())[0] == 429, PATIENCE_S)
        assert wait_until(lambda: impatient.request('POST', CHAT, hi())[0] == 200, PATIENCE_S)


def test_a_node_that_is_killed_ends_streams_and_feedback(
        server: ServerProcess, tiny_node: NodeProcess) -> None:
    """The last test, since it restarts the node: the middleware notices at once then."""
    with streamed(server, max_tokens=3900, logit_bias=END_TOKENS) as begun:
        completion = json.loads(begun.readline().removeprefix(b'data: '))['id']
        status, feedback, _ = server.request(
            'POST', '/v1/feedback', {'id': completion, 'rating': 'down'})
        assert (status, feedback['status']) == (202, 'waiting')
        tiny_node.kill()
        tiny_node.start()
        *_, error, done = [line for line in begun.read().decode().split('\n') if line]
    assert json.loads(error.removeprefix('data: '))['error']['code'] == 'node_ended'
    assert done == 'data: [DONE]'
    feedback = server.status(feedback['id'], 'lost', 'recorded')
    assert (feedback['status'], feedback['reason']) == ('lost', '/mace has disappeared')
    assert wait_until(lambda: server.request('POST', CHAT, hi())[0] == 200, PATIENCE_S)
