# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What the server refuses before a node is asked, in OpenAI's form; here no node runs."""

from __future__ import annotations

from collections.abc import Iterator
import os
from pathlib import Path
import re
import socket
import subprocess
import sys

import pytest
from support.graph import ENVIRONMENT, wait_until
from support.openai_server import ServerProcess
from support.ros_graph import ROOT

from mace_ros.openai.server import arguments, LIBRARIES, listen, serve

KEY = {'Authorization': 'Bearer a key'}
HI = {'model': 'mace', 'messages': [{'role': 'user', 'content': 'Hi.'}]}


@pytest.fixture(scope='module')
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp('server')
    (folder / 'key').write_text('a key\nand nothing else\n')
    made = ServerProcess(folder, '--api-key-file', str(folder / 'key'), '--max-concurrent', '2',
                         '--max-body-bytes', '5000')
    yield made
    assert made.stop() == 0, made.log
    assert 'Traceback' not in made.log


@pytest.mark.parametrize('headers', [{}, {'Authorization': 'Bearer another'},
                                     {'Authorization': 'Basic a key'}, {'Authorization': 'a key'}])
def test_a_wrong_key_is_refused(server: ServerProcess, headers: dict[str, str]) -> None:
    status, body, _ = server.request('POST', '/v1/chat/completions', HI, headers)
    assert (status, body['error']['code']) == (401, 'invalid_api_key')


def test_the_scheme_of_a_key_is_in_any_case(server: ServerProcess) -> None:
    for scheme in ('Bearer', 'bearer', 'BEARER '):
        assert server.request('GET', '/v1/models', None, {
            'Authorization': f'{scheme} a key'})[0] == 200


def test_ros_arguments_set_the_namespace_of_the_node(tmp_path: Path) -> None:
    """As launch and ``ros2 run`` append them."""
    made = ServerProcess(tmp_path, '--ros-args', '-r', '__node:=http', '-r', '__ns:=/robot2')
    try:
        assert made.log.startswith('/robot2/mace is served on ')
        assert made.stop() == 0, made.log
    finally:
        made.process.kill()


def counted(server: ServerProcess, path: str, status: int) -> float:
    return server.metric(f'mace_http_requests_total{{path="{path}",status="{status}"}}')


@pytest.mark.parametrize(('method', 'path', 'body', 'headers', 'counted_as', 'status'), [
    ('POST', '/v1/completions', HI, {}, '/v1/completions', 401),
    ('POST', '/v1/completions', b' ' * 5001, KEY, '/v1/completions', 413),
    ('POST', '/v1/completions', HI, KEY, '/v1/completions', 400),
    ('GET', '/v1/completions', None, KEY, '/v1/completions', 405),
    ('GET', '/v1/models/gpt-4o', None, KEY, '/v1/models/{model:path}', 404),
    ('GET', '/v1/made-up', None, KEY, 'other', 404),
    ('GET', '/health', None, {}, '/health', 503)])
def test_every_refusal_is_counted_with_its_path(
        server: ServerProcess, method: str, path: str, body: object, headers: dict[str, str],
        counted_as: str, status: int) -> None:
    before = counted(server, counted_as, status)
    assert server.request(method, path, body, headers)[0] == status
    assert counted(server, counted_as, status) == before + 1


def test_without_a_node_requests_are_to_be_tried_again(server: ServerProcess) -> None:
    for method, path, body in (('POST', '/v1/chat/completions', HI), ('GET', '/health', None)):
        status, reply, headers = server.request(method, path, body, KEY)
        assert (status, reply['error']['code'], headers['retry-after']) == (503, 'not_ready', '1')
    assert server.request('GET', '/health')[1]['state'] == 'absent'
    assert '\nmace_up 0.0\n' in server.request('GET', '/metrics')[1]
    assert server.request('GET', '/v1/models', None, KEY)[1] == {'object': 'list', 'data': []}


@pytest.mark.parametrize(('path', 'body', 'status', 'code', 'param'), [
    ('/v1/chat/completions', {**HI, 'model': 'gpt-4o'}, 404, 'model_not_found', 'model'),
    ('/v1/chat/completions', {'model': 'mace'}, 400, 'invalid_body', 'messages'),
    ('/v1/chat/completions', {**HI, 'messages': []}, 400, 'invalid_body', 'messages'),
    ('/v1/chat/completions', {**HI, 'temperature': 'hot'}, 400, 'invalid_body', 'temperature'),
    ('/v1/chat/completions', {**HI, 'max_tokens': 2**40}, 400, 'invalid_body', 'max_tokens'),
    ('/v1/chat/completions', {**HI, 'top_logprobs': 2}, 400, None, 'top_logprobs'),
    ('/v1/chat/completions', {**HI, 'logit_bias': {'no id': 1}}, 400, None, 'logit_bias'),
    ('/v1/chat/completions', {**HI, 'response_format': {'type': 'json_schema'}}, 400, None,
     'response_format'),
    ('/v1/chat/completions', {**HI, 'functions': []}, 400, 'invalid_body', 'functions'),
    ('/v1/chat/completions', {**HI, 'guided_choice': ['yes', 'no']}, 400, 'invalid_body',
     'guided_choice'),
    ('/v1/chat/completions', {**HI, 'messages': [{'role': 'user', 'content': 'a\0b'}]}, 400,
     'invalid_body', 'messages.0.content'),
    ('/v1/chat/completions', b'no JSON', 400, 'invalid_body', None),
    ('/v1/chat/completions', b'[' * 4000, 400, 'invalid_body', None),
    ('/v1/chat/completions', rb'{"model": "\ud800", "messages": []}', 400, 'invalid_body', None),
    ('/v1/chat/completions', b'\xff\xfe', 400, 'invalid_body', None),
    ('/v1/completions', {'model': 'mace', 'prompt': ['a', 'b']}, 400, 'invalid_body', 'prompt'),
    ('/v1/completions', {'model': 'mace', 'prompt': 'a', 'echo': True}, 400, 'invalid_body',
     'echo'),
    ('/v1/feedback', {'id': 'x', 'rating': 'up'}, 400, 'invalid_body', 'rating'),
    ('/v1/feedback', {'id': 'x', 'corrected': ' '}, 400, 'invalid_body', 'corrected'),
    ('/v1/elsewhere', HI, 404, 'not_found', None)])
def test_an_invalid_request_is_refused_naming_the_field(
        server: ServerProcess, path: str, body: object, status: int, code: str | None,
        param: str | None) -> None:
    got, reply, _ = server.request('POST', path, body, KEY)
    error = reply['error']
    assert (got, error['code'], error['param']) == (status, code, param), error
    assert error['message'] and error['type']


def test_a_method_that_a_path_has_not_is_refused(server: ServerProcess) -> None:
    status, body, _ = server.request('GET', '/v1/chat/completions', None, KEY)
    assert status == 405 and body['error']['message']
    status, body, _ = server.request('GET', '/v1/feedback/unknown', None, KEY)
    assert (status, body['error']['code']) == (404, 'not_found')


def test_a_body_that_is_too_large_is_refused(server: ServerProcess) -> None:
    status, body, _ = server.request('POST', '/v1/chat/completions', b' ' * 5001, KEY)
    assert (status, body['error']['code']) == (413, 'request_too_large')
    # Without a length, it is counted as it arrives.
    with socket.create_connection(('127.0.0.1', server.port), 30.0) as connection:
        connection.sendall(
            b'POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer a key\r\n'
            b'Transfer-Encoding: chunked\r\n\r\n' + (b'400\r\n' + b' ' * 1024 + b'\r\n') * 6)
        assert b' 413 ' in connection.recv(100)


def test_requests_that_run_at_once_are_bounded(server: ServerProcess) -> None:
    slow = [socket.create_connection(('127.0.0.1', server.port), 30.0) for _ in range(2)]
    try:
        for connection in slow:    # their bodies never come
            connection.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: a\r\n'
                               b'Authorization: Bearer a key\r\nContent-Length: 9\r\n\r\n')
        def refused() -> bool:
            status, body, headers = server.request('POST', '/v1/chat/completions', HI, KEY)
            return status == 429 and body['error']['code'] == 'too_many_requests' and bool(
                headers['retry-after'])

        assert wait_until(refused, 60.0)
        assert counted(server, '/v1/chat/completions', 429) >= 1
        assert server.request('GET', '/v1/models', None, KEY)[0] == 200
        assert server.request('POST', '/v1/feedback', {'id': 'x', 'rating': 'down'}, KEY)[0] == 503
    finally:
        gone = counted(server, '/v1/completions', 499)
        for connection in slow:
            connection.close()
    assert wait_until(lambda: server.request(
        'POST', '/v1/chat/completions', HI, KEY)[0] == 503, 60.0)
    assert wait_until(lambda: counted(server, '/v1/completions', 499) == gone + 2, 60.0)


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, '-m', 'mace_ros.openai.server', *arguments], cwd=ROOT,
        env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=100)


def test_missing_libraries_are_named_with_how_to_install_them(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, 'uvicorn', None)
    assert serve(arguments().parse_args([]), None) == 2
    assert f'uvicorn is missing or too old: pip install {LIBRARIES}' in capsys.readouterr().err


def test_the_libraries_are_those_of_the_extra() -> None:
    project = (ROOT / 'pyproject.toml').read_text()
    extra = re.search(r'^openai = \[.*?\]$', project, re.DOTALL | re.MULTILINE)[0]
    assert sorted(re.findall('"[^"]+"', extra)) == sorted(LIBRARIES.split())
    assert f'pip install {LIBRARIES}' in (ROOT / 'docs' / 'guides' / 'openai.md').read_text()


def test_replies_are_sent_without_delay() -> None:
    with listen('127.0.0.1', 0, 60.0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(('name', 'value', 'why'), [
    ('--api-key-file', 'none', 'No such file'),
    ('--api-key-file', 'empty', 'the first line is empty'),
    ('--api-key-file', 'binary', "can't decode"),
    ('--port', '70000', "'70000' is not a number from 0 to 65535"),
    ('--port', 'http', "'http' is not a number"),
    ('--max-concurrent', '0', "'0' is not a number from 1"),
    ('--max-body-bytes', '-5', "'-5' is not a number from 1")])
def test_an_invalid_argument_is_named(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        name: str, value: str, why: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path('empty').write_text('\n')
    Path('binary').write_bytes(b'\xff\xfe key')
    with pytest.raises(SystemExit) as ended:
        arguments().parse_args([f'{name}={value}'])
    message = capsys.readouterr().err
    assert (ended.value.code, f'argument {name}: ' in message, why in message) == (2, True, True)


def test_a_port_that_is_in_use_is_named(server: ServerProcess) -> None:
    done = program('--port', str(server.port))
    assert (done.returncode, 'in use' in done.stderr) == (2, True), done
    assert 'Traceback' not in done.stderr
