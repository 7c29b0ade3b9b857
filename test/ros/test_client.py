# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""How a client handles the end and the replacement of its node, which is scripted here."""

from __future__ import annotations

from collections.abc import Iterator
import os
import subprocess
import sys
import time
from types import SimpleNamespace
import weakref

import mace_ros.msg as msg
from mace_ros.msg import AdapterVersion, CorrectionStatus, Query, Response, ResponseChunk
import pytest
from rclpy.context import Context
from rclpy.node import Node
from support.graph import ENVIRONMENT, wait_until
from support.ros_graph import ROOT

from mace_ros.ros import node_presence
from mace_ros.ros.client import LATCHED, MaceClient, RELIABLE
from mace_ros.ros.executor_thread import ExecutorThread
from mace_ros.ros.node_presence import NAMED_WITHIN_S

SOON_S = 60.0
POLL_S = 0.1        # between looks of a client at the graph
POLLS_S = 5 * POLL_S


class ScriptedNode:
    """A node in a context of its own that publishes messages for a test."""

    def __init__(self, name: str = 'mace') -> None:
        self._context = Context()
        self._context.init(args=[])
        self.node = Node(name, context=self._context)
        self.received: list[str] = []      # ids
        self._outputs = {
            kind: self.node.create_publisher(kind, f'/mace/{topic}', qos) for kind, topic, qos in (
                (ResponseChunk, 'response_chunk', RELIABLE), (Response, 'response', RELIABLE),
                (CorrectionStatus, 'correction_status', RELIABLE),
                (AdapterVersion, 'adapter_version', LATCHED))}
        for kind, topic in (
                (Query, 'query'), (msg.Correction, 'correction'), (msg.Cancel, 'cancel')):
            self.node.create_subscription(
                kind, f'/mace/{topic}',
                lambda m: self.received.append(getattr(m, 'id', '')), RELIABLE)
        self._spinner = ExecutorThread(self.node, name='scripted', context=self._context)
        self._spinner.start()

    def publish(self, message: object) -> None:
        self._outputs[type(message)].publish(message)

    def receives(self, name: str) -> bool:
        return wait_until(lambda: name in self.received, SOON_S)

    def end(self) -> None:
        self._spinner.stop()
        self.node.destroy_node()
        self._context.try_shutdown()


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[MaceClient]:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr('mace_ros.ros.client.PRESENCE_POLL_S', POLL_S)
    with MaceClient() as made:
        yield made


def sees_nodes(client: MaceClient, count: int) -> bool:
    """Return whether this number of nodes is in the graph, after some more polls of the client."""
    seen = wait_until(lambda: client.node.count_publishers('/mace/response') == count, SOON_S)
    time.sleep(POLLS_S)
    return seen


@pytest.fixture
def node(client: MaceClient) -> Iterator[ScriptedNode]:
    made = ScriptedNode()
    made.publish(AdapterVersion(version=1, state=AdapterVersion.PUBLISHED))
    client.wait_until_ready(SOON_S)
    yield made
    made.end()


def test_a_proposal_that_nothing_waits_for_is_forgotten(
        client: MaceClient, node: ScriptedNode) -> None:
    handle = client.correct(correction_id='proposed', prompt='Hi', hint='Short.')
    assert node.receives('proposed')
    node.publish(CorrectionStatus(id='proposed', state=CorrectionStatus.PROPOSED))
    assert handle.wait(CorrectionStatus.PROPOSED, SOON_S)
    kept = weakref.ref(handle)
    same = client.correct('Ho.', correction_id='proposed') is handle
    del handle
    assert same
    assert wait_until(lambda: kept() is None, SOON_S)


def test_handles_raise_when_the_node_goes(client: MaceClient, node: ScriptedNode) -> None:
    begun, unbegun = client.ask('One?', query_id='one'), client.ask('Two?', query_id='two')
    ended = client.ask('Three?', query_id='three')
    kept = client.correct('Ho.', correction_id='kept', prompt='Hi')
    assert client.correct('Ho.', correction_id='kept', prompt='Hi') is kept
    unreceived = client.correct('He.', correction_id='unreceived', prompt='Hi')
    assert node.receives('unreceived') and node.receives('three')
    node.publish(ResponseChunk(query_id='one', text='I '))
    node.publish(CorrectionStatus(id='kept', state=CorrectionStatus.ACCEPTED))
    assert kept.wait(CorrectionStatus.ACCEPTED, SOON_S)
    stream = begun.stream(SOON_S)
    assert next(stream) == 'I '
    node.publish(Response(query_id='three', text='Last words.'))
    node.end()

    with pytest.raises(ConnectionError, match='query one: /mace has disappeared'):
        next(stream)
    with pytest.raises(ConnectionError, match='query two'):
        unbegun.result()
    assert ended.result(SOON_S).text == 'Last words.'
    with pytest.raises(ConnectionError, match='correction unreceived'):
        unreceived.wait()
    with pytest.raises(TimeoutError):
        kept.wait(timeout_s=0.1)
    assert client.version() is None
    with pytest.raises(TimeoutError):
        client.wait_until_ready(0.1)
    # A later query has no node to answer it.
    with pytest.raises(ConnectionError, match='query four'):
        client.ask('Four?', query_id='four').result()


def test_the_next_node_continues_with_accepted_corrections(
        client: MaceClient, node: ScriptedNode) -> None:
    learning = client.correct('Ho.', correction_id='kept', prompt='Hi')
    assert node.receives('kept')
    node.publish(CorrectionStatus(id='kept', state=CorrectionStatus.ACCEPTED))
    assert learning.wait(CorrectionStatus.ACCEPTED, SOON_S)
    node.end()
    following = ScriptedNode()
    following.publish(AdapterVersion(version=2, state=AdapterVersion.PUBLISHED))
    try:
        assert client.wait_for_version(2, timeout_s=SOON_S)
        assert client.wait_until_ready(SOON_S).version == 2
        answer = client.ask('One?', query_id='one')
        following.publish(CorrectionStatus(id='kept', state=CorrectionStatus.LEARNED))
        assert learning.wait(timeout_s=SOON_S).state == CorrectionStatus.LEARNED
        # The end of the first node must not give up a query to the second one.
        assert sees_nodes(client, 1)
        following.publish(Response(query_id='one', text='Yes.'))
        assert answer.result(SOON_S).text == 'Yes.'
    finally:
        following.end()


def test_a_newcomer_that_announces_a_version_replaces_a_killed_node(
        client: MaceClient, node: ScriptedNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The middleware notices a kill late."""
    monkeypatch.setattr(node_presence, 'NAMED_WITHIN_S', SOON_S)
    lost, unreceived = client.ask('One?'), client.correct('Ho.', correction_id='k', prompt='Hi')
    following = ScriptedNode()
    following.publish(AdapterVersion(version=2, state=AdapterVersion.PUBLISHED))
    try:
        assert wait_until(lambda: unreceived.lost, SOON_S)
        again = client.correct('Ho.', correction_id='k', prompt='Hi')
        with pytest.raises(ConnectionError):
            lost.result(SOON_S)
        with pytest.raises(ConnectionError):
            unreceived.wait(timeout_s=SOON_S)
        following.publish(CorrectionStatus(id='k', state=CorrectionStatus.LEARNED))
        assert again.wait(timeout_s=SOON_S)
        answer = client.ask('Two?', query_id='two')
        node.end()
        assert sees_nodes(client, 1)
        following.publish(Response(query_id='two', text='Yes.'))
        assert answer.result(SOON_S).text == 'Yes.'
    finally:
        following.end()


def test_the_version_of_a_newcomer_stays_once_its_name_is_known(
        client: MaceClient, node: ScriptedNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The latched version may arrive first; it is not announced again."""
    lost = client.ask('One?')
    endpoints = client.node.get_publishers_info_by_topic
    known = {bytes(i.endpoint_gid) for i in endpoints('/mace/response')}
    hidden = [True]
    monkeypatch.setattr(client.node, 'get_publishers_info_by_topic', lambda topic: [
        i if bytes(i.endpoint_gid) in known or not hidden else SimpleNamespace(
            node_namespace='_NODE_NAMESPACE_UNKNOWN_', node_name='_NODE_NAME_UNKNOWN_',
            endpoint_gid=i.endpoint_gid) for i in endpoints(topic)])
    following = ScriptedNode()
    following.publish(AdapterVersion(version=2, state=AdapterVersion.PUBLISHED))
    try:
        client.wait_for_version(2, timeout_s=SOON_S)
        assert not lost.is_complete()
        kept = client.ask('Two?', query_id='two')
        hidden.clear()
        with pytest.raises(ConnectionError):
            lost.result(SOON_S)
        assert client.version().version == 2
        assert client.is_ready()
        time.sleep(POLLS_S)     # long enough for it to be given up
        following.publish(Response(query_id='two', text='Yes.'))
        assert kept.result(SOON_S).text == 'Yes.'
    finally:
        following.end()


def test_a_query_sent_before_the_nodes_name_is_known_waits(
        client: MaceClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The middleware announces a publisher a moment before the name of its node."""
    endpoints = client.node.get_publishers_info_by_topic
    names: dict[str, str] = {'node_namespace': '_NODE_NAMESPACE_UNKNOWN_',
                             'node_name': '_NODE_NAME_UNKNOWN_'}
    monkeypatch.setattr(client.node, 'get_publishers_info_by_topic', lambda topic: [
        SimpleNamespace(**({'node_namespace': i.node_namespace, 'node_name': i.node_name} | names),
                        endpoint_gid=i.endpoint_gid) for i in endpoints(topic)])
    node = ScriptedNode()
    try:
        assert wait_until(
            lambda: client.presence.publishers and client.is_connected(), SOON_S)
        answer = client.ask('One?', query_id='one')
        assert node.receives('one')
        names.clear()
        assert wait_until(lambda: client.presence.named, SOON_S)
        node.publish(AdapterVersion(version=1, state=AdapterVersion.PUBLISHED))
        client.wait_until_ready(SOON_S)
        time.sleep(POLLS_S)     # long enough for it to be given up
        node.publish(Response(query_id='one', text='Yes.'))
        assert answer.result(SOON_S).text == 'Yes.'
    finally:
        node.end()


def test_a_namesake_that_does_not_serve_replaces_nothing(
        client: MaceClient, node: ScriptedNode) -> None:
    """A second node of the name that can't start, since the storage folder is locked."""
    answer = client.ask('One?', query_id='one')
    time.sleep(NAMED_WITHIN_S + 0.1)
    namesake = ScriptedNode()
    assert sees_nodes(client, 2)
    namesake.end()
    assert sees_nodes(client, 1)
    assert client.version().version == 1
    node.publish(Response(query_id='one', text='Yes.'))
    assert answer.result(SOON_S).text == 'Yes.'


def test_the_playback_of_a_recording_is_not_the_node(
        client: MaceClient, node: ScriptedNode) -> None:
    answer = client.ask('One?', query_id='one')
    player = ScriptedNode('rosbag2_player')
    assert sees_nodes(client, 2)
    player.end()
    assert sees_nodes(client, 1)
    node.publish(Response(query_id='one', text='Yes.'))
    assert answer.result(SOON_S).text == 'Yes.'


def test_a_program_ends_when_its_node_goes(client: MaceClient, node: ScriptedNode) -> None:
    asking = subprocess.Popen(
        [sys.executable, '-m', 'mace_ros.cli.ask', 'Hi', '--id', 'one'], cwd=ROOT,
        env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert node.receives('one')
    node.end()
    _, errors = asking.communicate(timeout=SOON_S)
    # A program that waits for longer than two seconds says so.
    said = errors.removeprefix('waiting until /mace is ready\n')
    assert (asking.returncode, said) == (1, '/mace: query one: /mace has disappeared\n')


def test_a_client_has_no_services(client: MaceClient) -> None:
    """The security policy allows none, and a forbidden one would end the client."""
    name = client.node.get_name()
    assert wait_until(lambda: name in client.node.get_node_names(), SOON_S)
    assert client.node.get_service_names_and_types_by_node(name, '/') == []
