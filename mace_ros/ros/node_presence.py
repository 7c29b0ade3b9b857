# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Whether the node that a client talks to is present in ROS's graph.

The graph is polled: liveliness events need a finite lease, which the default QoS does not have,
and Humble has no event for a publisher that disappears.
"""

from __future__ import annotations

from collections.abc import Iterable
import math

from rclpy.topic_endpoint_info import TopicEndpointInfo

# The name of a node is known at most this long after its first version was received.
NAMED_WITHIN_S = 2.0
UNNAMED = '/_NODE_NAME_UNKNOWN_'        # the name in rmw of a node that is being discovered


class NodePresence:
    """Follows the publishers of a node's ``~/response`` over successive polls."""

    def __init__(self, name: str) -> None:
        """Follow the node of this full name."""
        self._name = name
        # The node's publishers at the last poll that found any: kept until they are replaced.
        self.publishers: set[bytes] = set()
        self.named: set[bytes] = set()          # those of them whose node name is known
        self._newcomers: set[bytes] = set()     # named ones that appeared beside earlier ones
        self._seen_at: dict[bytes, float] = {}  # when each present publisher appeared
        self._announced_at = -math.inf
        # What a client sent before ``since`` went to an earlier node, and the versions that it
        # received before ``serving_since`` came from one.
        self.since = self.serving_since = -math.inf

    def version_announced(self, now: float) -> None:
        """Note that an adapter version was published, which only a serving node does."""
        self._announced_at = now

    def poll(self, endpoints: Iterable[TopicEndpointInfo], now: float) -> bool:
        """Take the publishers in the graph; return whether the earlier node has ended."""
        names = {bytes(e.endpoint_gid): f'{e.node_namespace.rstrip("/")}/{e.node_name}'
                 for e in endpoints}
        named = {gid for gid, name in names.items() if name == self._name}
        # A name becomes known shortly after its publisher. A publisher of another node belongs
        # to the playback of a recording or to a bridge.
        unnamed = {gid for gid, name in names.items() if name.endswith(UNNAMED)}
        before = self.publishers - (names.keys() - named - unnamed)
        present, appeared = named | unnamed, named - self.named
        self._seen_at = {gid: self._seen_at.get(gid, now) for gid in present}
        # A killed node stays in the graph until its lease ends, but only one node of a name
        # serves: a newcomer that announces a version has replaced it. A newcomer that does not
        # may be one that can't start beside the present node.
        self._newcomers = (self._newcomers | appeared if before - appeared else set()) & named
        announced = now < self._announced_at + NAMED_WITHIN_S
        replaced = announced and bool(self._newcomers)
        gone = bool(before) and (not before & present or replaced)
        if gone:
            self.since = max((self._seen_at[gid] for gid in self._newcomers), default=now)
            # The version of a newcomer may arrive before its publisher is seen.
            self.serving_since = self.since - NAMED_WITHIN_S if replaced else now
            self._newcomers = set()
        self.publishers, self.named = present or before, named
        return gone
