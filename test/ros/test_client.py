# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What a client does when its node goes: here a node that hears, and says what it is told to."""

from __future__ import annotations

from collections.abc import Iterator
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import mace_ros.msg as msg
from mace_ros.msg import AdapterVersion, CorrectionStatus, Query, Response, ResponseChunk
import pytest
from rclpy.context import Context
from rclpy.node import Node
from support.graph import ENVIRONMENT, wait_until
from support.ros_graph import ROOT

from mace_ros.ros.client import LATCHED, MaceClient, NAMED_WITHIN_S, RELIABLE
from mace_ros.ros.executor_thread import ExecutorThread

SOON_S = 10.0

pytestmark = pytest.mark.timeout(60)


class Played:
    """A node of that name, in a context of its own."""

    def __init__(self, name: str = 'mace') -> None:
        self._context = Context()
        self._context.init(args=[])
        self.node = Node(name, context=self._context)
        self.heard: list[str] = []      # ids
        self._outputs = {
            kind: self.node.create_publisher(kind, f'/mace/{topic}', qos) for kind, topic, qos in (
                (ResponseChunk, 'response_chunk', RELIABLE), (Response, 'response', RELIABLE),
                (CorrectionStatus, 'correction_status', RELIABLE),
                (AdapterVersion, 'adapter_version', LATCHED))}
        for kind, topic in (
                (Query, 'query'), (msg.Correction, 'correction'), (msg.Cancel, 'cancel')):
            self.node.create_subscription(
                kind, f'/mace/{topic}', lambda m: self.heard.append(getattr(m, 'id', '')), RELIABLE)
        self._spinner = ExecutorThread(self.node, name='played', context=self._context)
        self._spinner.start()

    def say(self, message: object) -> None:
        self._outputs[type(message)].publish(message)

    def hears(self, name: str) -> bool:
        return wait_until(lambda: name in self.heard, SOON_S)

    def end(self) -> None:
        self._spinner.stop()
        self.node.destroy_node()
        self._context.try_shutdown()


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[MaceClient]:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with MaceClient() as made:
        yield made


@pytest.fixture
def played(client: MaceClient) -> Iterator[Played]:
    node = Played()
    node.say(AdapterVersion(version=1, state=AdapterVersion.PUBLISHED))
    client.wait_until_ready(SOON_S)
    yield node
    node.end()


def test_what_waits_for_a_node_that_goes_is_told(client: MaceClient, played: Played) -> None:
    begun, unbegun = client.ask('One?', query_id='one'), client.ask('Two?', query_id='two')
    ended = client.ask('Three?', query_id='three')
    kept = client.correct('Ho.', correction_id='kept', prompt='Hi')
    assert client.correct('Ho.', correction_id='kept', prompt='Hi') is kept
    unheard = client.correct('He.', correction_id='unheard', prompt='Hi')
    assert played.hears('unheard') and played.hears('three')
    played.say(ResponseChunk(query_id='one', text='I '))
    played.say(CorrectionStatus(id='kept', state=CorrectionStatus.ACCEPTED))
    assert kept.wait(CorrectionStatus.ACCEPTED, SOON_S)
    stream = begun.stream(SOON_S)
    assert next(stream) == 'I '
    played.say(Response(query_id='three', text='Last words.'))
    played.end()

    with pytest.raises(ConnectionError, match='query one: /mace is gone'):
        next(stream)
    with pytest.raises(ConnectionError, match='query two'):
        unbegun.result()
    assert ended.result(SOON_S).text == 'Last words.'
    with pytest.raises(ConnectionError, match='correction unheard'):
        unheard.wait()
    with pytest.raises(TimeoutError):
        kept.wait(timeout_s=0.1)
    assert client.version() is None
    with pytest.raises(TimeoutError):
        client.wait_until_ready(0.1)
    # Nor is there anybody to hear another one.
    with pytest.raises(ConnectionError, match='query four'):
        client.ask('Four?', query_id='four').result()


def test_the_next_node_is_waited_for_and_goes_on(client: MaceClient, played: Played) -> None:
    learning = client.correct('Ho.', correction_id='kept', prompt='Hi')
    assert played.hears('kept')
    played.say(CorrectionStatus(id='kept', state=CorrectionStatus.ACCEPTED))
    assert learning.wait(CorrectionStatus.ACCEPTED, SOON_S)
    played.end()
    following = Played()
    following.say(AdapterVersion(version=2, state=AdapterVersion.PUBLISHED))
    try:
        assert client.wait_for_version(2, timeout_s=SOON_S)
        assert client.wait_until_ready(SOON_S).version == 2
        answer = client.ask('One?', query_id='one')
        following.say(CorrectionStatus(id='kept', state=CorrectionStatus.LEARNED))
        assert learning.wait(timeout_s=SOON_S).state == CorrectionStatus.LEARNED
        time.sleep(1.5)     # the first one's end is no reason to give up an answer of this one
        following.say(Response(query_id='one', text='Yes.'))
        assert answer.result(SOON_S).text == 'Yes.'
    finally:
        following.end()


def test_one_that_comes_before_the_first_is_missed_has_taken_its_place(
        client: MaceClient, played: Played) -> None:
    """As after a kill, which the middleware notices late."""
    lost, unheard = client.ask('One?'), client.correct('Ho.', correction_id='k', prompt='Hi')
    following = Played()
    following.say(AdapterVersion(version=2, state=AdapterVersion.PUBLISHED))
    try:
        assert wait_until(lambda: unheard.lost or unheard in client._leaving, SOON_S)
        again = client.correct('Ho.', correction_id='k', prompt='Hi')
        with pytest.raises(ConnectionError):
            lost.result(SOON_S)
        with pytest.raises(ConnectionError):
            unheard.wait(timeout_s=SOON_S)
        following.say(CorrectionStatus(id='k', state=CorrectionStatus.LEARNED))
        assert again.wait(timeout_s=SOON_S)
        answer = client.ask('Two?', query_id='two')
        played.end()
        time.sleep(1.5)
        following.say(Response(query_id='two', text='Yes.'))
        assert answer.result(SOON_S).text == 'Yes.'
    finally:
        following.end()


def test_what_is_asked_before_the_name_of_the_node_is_known_waits(
        client: MaceClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The middleware tells of a publisher a moment before it tells whose it is."""
    told = client.node.get_publishers_info_by_topic
    names: dict[str, str] = {'node_namespace': '_NODE_NAMESPACE_UNKNOWN_',
                             'node_name': '_NODE_NAME_UNKNOWN_'}
    monkeypatch.setattr(client.node, 'get_publishers_info_by_topic', lambda topic: [
        SimpleNamespace(**({'node_namespace': i.node_namespace, 'node_name': i.node_name} | names),
                        endpoint_gid=i.endpoint_gid) for i in told(topic)])
    node = Played()
    try:
        assert wait_until(
            lambda: client._publishers and client._query.get_subscription_count(), SOON_S)
        answer = client.ask('One?', query_id='one')
        assert node.hears('one')
        names.clear()
        assert wait_until(lambda: client._named, SOON_S)
        node.say(AdapterVersion(version=1, state=AdapterVersion.PUBLISHED))
        client.wait_until_ready(SOON_S)
        time.sleep(1.5)     # in which it would be given up
        node.say(Response(query_id='one', text='Yes.'))
        assert answer.result(SOON_S).text == 'Yes.'
    finally:
        node.end()


def test_a_namesake_that_serves_nothing_takes_no_place(
        client: MaceClient, played: Played) -> None:
    """As one that is started by mistake, and refused the folder."""
    answer = client.ask('One?', query_id='one')
    time.sleep(NAMED_WITHIN_S + 0.1)
    namesake = Played()
    time.sleep(1.5)
    namesake.end()
    time.sleep(1.5)
    assert client.version().version == 1
    played.say(Response(query_id='one', text='Yes.'))
    assert answer.result(SOON_S).text == 'Yes.'


def test_who_plays_what_was_recorded_is_not_the_node(client: MaceClient, played: Played) -> None:
    answer = client.ask('One?', query_id='one')
    player = Played('rosbag2_player')
    assert wait_until(lambda: client.node.count_publishers('/mace/response') == 2, SOON_S)
    time.sleep(1.5)
    player.end()
    time.sleep(1.5)
    played.say(Response(query_id='one', text='Yes.'))
    assert answer.result(SOON_S).text == 'Yes.'


def test_a_program_ends_with_its_node(client: MaceClient, played: Played) -> None:
    asking = subprocess.Popen(
        [sys.executable, '-m', 'mace_ros.cli.ask', 'Hi', '--id', 'one'], cwd=ROOT,
        env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert played.hears('one')
    played.end()
    _, errors = asking.communicate(timeout=SOON_S)
    assert (asking.returncode, errors) == (1, '/mace: query one: /mace is gone\n')


def test_a_client_serves_nothing(client: MaceClient) -> None:
    """The security policy allows it no service, and what is not allowed ends a node."""
    name = client.node.get_name()
    assert wait_until(lambda: name in client.node.get_node_names(), SOON_S)
    assert client.node.get_service_names_and_types_by_node(name, '/') == []
