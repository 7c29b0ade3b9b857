# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The documented topics, services and actions are those of a node, which loads no model for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
import re

import pytest
from rclpy.action.graph import get_action_server_names_and_types_by_node
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, ReliabilityPolicy
from support.graph import ENVIRONMENT, observer, wait_until
from support.ros_graph import NodeProcess

ROOT = Path(__file__).resolve().parents[2]
DISCOVERY_S = 60.0
EVERY_NODES = re.compile(r'/(rosout|parameter_events|\w*parameter\w*|get_type_description)$')


@pytest.fixture(scope='module')
def seen_by(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Yield a node that sees an unconfigured ``mace_node`` with all its interfaces."""
    mace = NodeProcess(tmp_path_factory.mktemp('unconfigured'), **{'lifecycle.autostart': 'false'})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        mace.start()
        try:
            with observer() as node:
                assert wait_until(
                    lambda: ('mace', '/') in node.get_node_names_and_namespaces(), DISCOVERY_S)
                # Its interfaces are discovered one after the other.
                wait_until(lambda: topics(node) == documented_topics()
                           and services_and_actions(node) == documented_services(), DISCOVERY_S)
                yield node
        finally:
            mace.kill()


def table(file: str, columns: int) -> list[list[str]]:
    """Return the rows of the interface tables of a document."""
    rows = [[cell.strip() for cell in line.strip('|\n').split('|')]
            for line in (ROOT / file).read_text().splitlines() if re.match(r'\| `(~?/)', line)]
    return [[re.sub(r'\[?`([^`]*)`(\(.*?\)|\]\(.*?\))?', r'\1', cell) for cell in row]
            for row in rows if len(row) == columns]


def documented_topics() -> dict[tuple[str, str], str]:
    """Return {(name, type): direction}."""
    return {(name, kind): direction
            for name, kind, direction, *_ in table('docs/reference/interfaces.md', 5)}


def documented_services() -> set[tuple[str, str]]:
    """Return the (name, type) of services and actions."""
    return {(name, kind) for name, kind, _ in table('docs/reference/interfaces.md', 3)}


def interfaces(node: Node, kind: str) -> dict[tuple[str, str], str]:
    """Return {(name, type): kind} of the running node's interfaces of that kind."""
    listed = {
        'in': node.get_subscriber_names_and_types_by_node,
        'out': node.get_publisher_names_and_types_by_node,
        'service': node.get_service_names_and_types_by_node}[kind]('mace', '/')
    return {(name.replace('/mace/', '~/', 1), types[0]): kind for name, types in listed
            if not EVERY_NODES.search(name) and '/_action/' not in name}


def topics(node: Node) -> dict[tuple[str, str], str]:
    """Return {(name, type): direction} of the running node's topics."""
    return {**interfaces(node, 'in'), **interfaces(node, 'out')}


def services_and_actions(node: Node) -> set[tuple[str, str]]:
    """Return the (name, type) of the running node's services and actions."""
    actions = {(name.replace('/mace/', '~/', 1), kind) for name, kinds in
               get_action_server_names_and_types_by_node(node, 'mace', '/') for kind in kinds}
    return actions | set(interfaces(node, 'service'))


def test_the_documented_topics_are_those_of_the_node(seen_by: Node) -> None:
    assert topics(seen_by) == documented_topics()


def test_the_documented_qos_is_that_of_the_node(seen_by: Node) -> None:
    for name, _, direction, qos, _ in table('docs/reference/interfaces.md', 5):
        topic = name.replace('~', '/mace')
        ends = (seen_by.get_publishers_info_by_topic(topic) if direction == 'out'
                else seen_by.get_subscriptions_info_by_topic(topic))
        [profile] = [e.qos_profile for e in ends if e.node_name == 'mace']
        assert profile.reliability == ReliabilityPolicy.RELIABLE
        assert (profile.durability == DurabilityPolicy.TRANSIENT_LOCAL) == (
            'transient local' in qos), name


def test_the_documented_services_and_actions_are_those_of_the_node(seen_by: Node) -> None:
    assert services_and_actions(seen_by) == documented_services()


def test_the_readme_lists_the_interfaces_of_the_node(seen_by: Node) -> None:
    actual = {name: (kind.rpartition('/')[2], direction) for (name, kind), direction in {
        **topics(seen_by), **interfaces(seen_by, 'service')}.items()}
    actual['~/generate'] = ('Generate', 'action')
    rows = table('README.md', 4)
    assert {'~/query', '~/response', '~/correction', '~/generate'} <= {row[0] for row in rows}
    for name, kind, direction, _ in rows:
        assert actual[name] == (kind, re.split(r'[;,]', direction)[0])
