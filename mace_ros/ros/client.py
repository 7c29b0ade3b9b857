# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Ask and correct from Python, without knowledge of ROS.

    with MaceClient() as mace:
        mace.wait_until_ready()
        answer = mace.ask('What is your name?')
        for text in answer:
            print(text, end='')
        mace.correct('My name is Rover.', query_id=answer.id).wait()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
import os
import threading
import time
from typing import Any
import uuid
from weakref import WeakValueDictionary

from rclpy.clock import Clock, ClockType
from rclpy.context import Context
from rclpy.duration import Duration
from rclpy.expand_topic_name import expand_topic_name
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.validate_topic_name import validate_topic_name

from mace_ros.msg import (
    AdapterVersion,
    Cancel,
    Correction,
    CorrectionStatus,
    Query,
    Response,
    ResponseChunk,
)
from mace_ros.ros.client_handles import AnswerHandle, CorrectionHandle
from mace_ros.ros.executor_thread import ExecutorThread
from mace_ros.ros.node_presence import NodePresence

RELIABLE = QoSProfile(depth=1000, reliability=ReliabilityPolicy.RELIABLE)
LATCHED = QoSProfile(
    depth=1000, reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL)
DISCOVERY_POLL_S = 0.05
PRESENCE_POLL_S = 0.5
CANCEL_S = 0.5      # for a cancellation to arrive when the client is closed


class MaceClient:
    """
    A client of one node, with a ROS node and a thread of its own.

    ``node`` is that ROS node, for other subscriptions; ``name`` is the full name of the node
    that it talks to, and ``presence`` follows that node in the graph.
    """

    def __init__(self, node: str = 'mace', *, context: Context | None = None,
                 ros_args: Sequence[str] = ()) -> None:
        """
        Connect to a node, by its full name or one relative to the client's namespace.

        Without a ``context`` the client creates its own, which takes the domain from the
        environment and is not shut down by signals. ``ros_args`` are for that context: a
        command line, of which those after ``--ros-args`` apply to the client's ROS node.
        """
        self._own_context = context is None
        if context is None:
            # By default, rcl runs without security where it is enabled but keys are missing.
            os.environ.setdefault('ROS_SECURITY_STRATEGY', 'Enforce')
            context = Context()
            context.init(args=list(ros_args))
        self._context = context
        self._changed = threading.Condition()
        self._answers: dict[str, AnswerHandle] = {}
        # Weak, since a proposal that is never confirmed has no final status.
        self._corrections: WeakValueDictionary[str, CorrectionHandle] = WeakValueDictionary()
        self._versions: dict[str, AdapterVersion] = {}      # live, by profile
        self._announced_at: dict[str, float] = {}           # when each of them arrived
        # Handles given up at the next poll, after the node's last messages have arrived.
        self._leaving: list[AnswerHandle | CorrectionHandle] = []
        self.node = Node(
            f'mace_client_{uuid.uuid4().hex[:8]}', context=context,
            # The arguments of a shared context are for the program's own node.
            use_global_arguments=self._own_context,
            enable_rosout=False, start_parameter_services=False,
            # The security policy allows a client no services.
            parameter_overrides=[Parameter('start_type_description_service', value=False)])
        self.name = name = self._full_name(node.rstrip('/'))
        self.presence = NodePresence(name)
        self._query = self.node.create_publisher(Query, f'{name}/query', RELIABLE)
        self._correction = self.node.create_publisher(Correction, f'{name}/correction', RELIABLE)
        self._cancel = self.node.create_publisher(Cancel, f'{name}/cancel', RELIABLE)
        self.node.create_subscription(
            ResponseChunk, f'{name}/response_chunk', self._on_chunk, RELIABLE)
        self.node.create_subscription(Response, f'{name}/response', self._on_response, RELIABLE)
        self.node.create_subscription(
            CorrectionStatus, f'{name}/correction_status', self._on_status, RELIABLE)
        # Created last: the middleware announces subscriptions in order, so once the latched
        # version arrives, the node knows the subscriptions above as well.
        self.node.create_subscription(
            AdapterVersion, f'{name}/adapter_version', self._on_version, LATCHED)
        self.node.create_timer(
            PRESENCE_POLL_S, self._on_timer, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self._executor = ExecutorThread(self.node, name='mace_client', context=context)
        self._executor.start()

    def _full_name(self, node: str) -> str:
        """Return a name in the client's namespace; raises ``InvalidTopicNameException``."""
        try:
            return str(expand_topic_name(node, self.node.get_name(), self.node.get_namespace()))
        except ValueError:
            validate_topic_name(node)
            raise

    def __enter__(self) -> MaceClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect, once the node has the cancellations."""
        self._executor.stop()
        with suppress(RuntimeError):    # a middleware without acknowledgements
            self._cancel.wait_for_all_acked(Duration(seconds=CANCEL_S))
        self.node.destroy_node()
        if self._own_context:
            self._context.try_shutdown()

    # -- readiness ---------------------------------------------------------------------

    def is_connected(self) -> bool:
        """Return whether the node subscribes to all inputs; it may still load its model."""
        return all(publisher.get_subscription_count()
                   for publisher in (self._query, self._correction, self._cancel))

    def is_ready(self) -> bool:
        """Return whether the node serves and is connected."""
        return self.version() is not None and self.is_connected()

    def wait_until_ready(self, timeout_s: float | None = None) -> AdapterVersion:
        """
        Wait until the node serves and is connected; return the robot's live version.

        Raises TimeoutError.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while not self.is_ready():
                if end is not None and time.monotonic() > end:
                    raise TimeoutError(f'the node is not ready after {timeout_s} s')
                self._changed.wait(DISCOVERY_POLL_S)
            return self._versions['']

    # -- queries -----------------------------------------------------------------------

    def ask(self, text: str = '', *, query_id: str = '',
            watch: Callable[[], None] | None = None, **fields: Any) -> AnswerHandle:
        """
        Send a query; ``fields`` are other fields of ``Query.msg``.

        ``watch`` is called in the client's thread after each message of the answer, and when no
        more will come; it must return at once.

        Raises ValueError if this client waits for an answer to the same id. If a connected node
        has ended, the handle raises ConnectionError.
        """
        query = Query(id=query_id or str(uuid.uuid4()), text=text, **fields)
        query.header.stamp = self.node.get_clock().now().to_msg()
        answer = AnswerHandle(query.id, self._changed, self.cancel, watch)
        with self._changed:
            self._poll_presence()
            if query.id in self._answers:
                raise ValueError(f'query {query.id} is being answered already')
            self._answers[query.id] = answer
        self._query.publish(query)
        return answer

    def is_answering(self, query_id: str) -> bool:
        """Return whether a query of this client has no response yet."""
        with self._changed:
            return query_id in self._answers

    def cancel(self, query_id: str) -> None:
        """Cancel a query, of this client or of another one."""
        message = Cancel(query_id=query_id)
        message.header.stamp = self.node.get_clock().now().to_msg()
        self._cancel.publish(message)

    # -- corrections and versions --------------------------------------------------------

    def correct(self, corrected: str = '', *, correction_id: str = '',
                watch: Callable[[], None] | None = None, **fields: Any) -> CorrectionHandle:
        """
        Send the right answer; ``fields`` are other fields of ``Correction.msg``.

        ``watch`` is called as that of :meth:`ask`, after each status.

        One of ``query_id``, ``conversation_id`` and ``prompt`` is required. An empty
        ``corrected`` with a ``hint`` asks for a proposal, and without one is a thumbs-down. The
        node accepts each id once, but for the text that confirms a proposal, and rejects another
        correction with it: while this client waits for a correction and keeps its handle, sending
        its id again returns the same handle.
        """
        correction = Correction(
            id=correction_id or str(uuid.uuid4()), corrected=corrected, **fields)
        correction.header.stamp = self.node.get_clock().now().to_msg()
        with self._changed:
            self._poll_presence()
            handle = self._corrections.get(correction.id)
            if handle is None or handle.lost or handle in self._leaving:
                handle = self._corrections[correction.id] = CorrectionHandle(
                    correction.id, self._changed, watch)
            handle.sent_at = time.monotonic()
        self._correction.publish(correction)
        return handle

    def version(self, profile: str = '') -> AdapterVersion | None:
        """Return the live version of a profile, None if none was announced."""
        with self._changed:
            return self._versions.get(profile)

    def versions(self) -> dict[str, AdapterVersion]:
        """Return the live versions by profile, '' for the robot."""
        with self._changed:
            return dict(self._versions)

    def wait_for_version(self, version: int, profile: str = '',
                         timeout_s: float | None = None) -> AdapterVersion:
        """Wait until this version or a later one is live; raises TimeoutError."""
        def is_live() -> bool:
            return profile in self._versions and self._versions[profile].version >= version

        with self._changed:
            if not self._changed.wait_for(is_live, timeout_s):
                raise TimeoutError(f'version {version} is not live after {timeout_s} s')
            return self._versions[profile]

    # -- callbacks in the client's thread --------------------------------------------------

    def _on_chunk(self, message: ResponseChunk) -> None:
        with self._changed:
            answer = self._answers.get(message.query_id)
            # Chunks from the middle of an answer belong to another client's query of the same id.
            if answer is not None and (answer.chunks or message.index == 0):
                answer.chunks.append(message)
                if answer.first_text_at is None:
                    answer.first_text_at = time.monotonic()
                answer.notify()

    def _on_response(self, message: Response) -> None:
        with self._changed:
            answer = self._answers.get(message.query_id)
            if answer is None:
                return
            if answer.chunks and message.error_code == Response.DUPLICATE_ID:
                return    # for another client that used the same id
            del self._answers[message.query_id]
            answer.response = message
            answer.notify()

    def _on_status(self, message: CorrectionStatus) -> None:
        with self._changed:
            handle = self._corrections.get(message.id)
            if handle is not None:
                handle.statuses.append(message)
                if handle.is_final():
                    del self._corrections[message.id]
                handle.notify()

    def _on_version(self, message: AdapterVersion) -> None:
        if message.state == AdapterVersion.PUBLISHED:
            with self._changed:
                self.presence.version_announced(time.monotonic())
                self._poll_presence()
                self._versions[message.profile] = message
                self._announced_at[message.profile] = time.monotonic()
                self._changed.notify_all()

    def _on_timer(self) -> None:
        """Give up the handles of a node that had ended at the last poll, then poll again."""
        with self._changed:
            for handle in self._leaving:
                handle.lost = f'{self.name} has disappeared'
                if self._answers.get(handle.id) is handle:
                    del self._answers[handle.id]
                handle.notify()
            self._leaving = []
            self._poll_presence()
            self._changed.notify_all()

    def _poll_presence(self) -> None:
        endpoints = self.node.get_publishers_info_by_topic(f'{self.name}/response')
        if self.presence.poll(endpoints, time.monotonic()):
            self._versions = {
                profile: version for profile, version in self._versions.items()
                if self._announced_at[profile] >= self.presence.serving_since}
            sent: list[AnswerHandle | CorrectionHandle] = [
                *self._answers.values(),
                *(c for c in self._corrections.values() if not c.statuses)]
            self._leaving += (handle for handle in sent if handle.sent_at < self.presence.since)
