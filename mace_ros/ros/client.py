# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Ask and correct from Python, without knowing ROS.

    with MaceClient() as mace:
        mace.wait_until_ready()
        answer = mace.ask('What is your name?')
        for text in answer:
            print(text, end='')
        mace.correct('My name is Rover.', query_id=answer.id).wait()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
import math
import os
import threading
import time
from typing import Any
import uuid

from rclpy.clock import Clock, ClockType
from rclpy.context import Context
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from mace_ros.msg import (
    AdapterVersion,
    Cancel,
    Correction,
    CorrectionStatus,
    Query,
    Response,
    ResponseChunk,
)
from mace_ros.ros.executor_thread import ExecutorThread

RELIABLE = QoSProfile(depth=1000, reliability=ReliabilityPolicy.RELIABLE)
LATCHED = QoSProfile(
    depth=1000, reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL)
DISCOVERY_POLL_S = 0.05
WATCH_S = 0.5           # between two looks at whether the node is still there
NAMED_WITHIN_S = 2.0    # from its first version on, a node's name is known
NAMELESS = '/_NODE_NAME_UNKNOWN_'      # rmw's, of one that is being discovered
FINAL_STATES = (CorrectionStatus.LEARNED, CorrectionStatus.SUPERSEDED,
                CorrectionStatus.REJECTED, CorrectionStatus.FAILED)


class AnswerHandle:
    """An answer on its way; iterate over it for its text as it comes."""

    def __init__(self, query_id: str, changed: threading.Condition,
                 cancel: Callable[[str], None]) -> None:
        self.id = query_id
        self.asked_at = time.monotonic()
        self.first_text_at: float | None = None
        self.chunks: list[ResponseChunk] = []
        self.response: Response | None = None
        self.lost = ''      # why no response will come, if the node is gone
        self._changed, self._cancel = changed, cancel

    def __iter__(self) -> Iterator[str]:
        return self.stream()

    def stream(self, timeout_s: float | None = None) -> Iterator[str]:
        """
        Yield the text as it comes; raises TimeoutError if nothing comes for so long.

        Raises ConnectionError if the node is gone, as `result`.
        """
        sent = ''
        while True:
            with self._changed:
                self._wait(partial(self._has_more, sent), timeout_s)
                complete, text = self.is_complete(), self.text
            if text != sent:
                yield text[len(sent):]
                sent = text
            if complete:
                return

    @property
    def text(self) -> str:
        """What was heard so far."""
        # The response may overtake the last chunks: it comes on another topic.
        if self.response is not None:
            return str(self.response.text)
        return ''.join(chunk.text for chunk in self.chunks)

    def is_complete(self) -> bool:
        """Return whether the response is there."""
        return self.response is not None

    def result(self, timeout_s: float | None = None) -> Response:
        """
        Wait for the response; raises TimeoutError.

        Raises ConnectionError if the node is gone. One that has ended says so itself; one that
        was killed is missed by the middleware after about 20 s, or when it is started again.
        """
        with self._changed:
            self._wait(self.is_complete, timeout_s)
        return self.response

    def cancel(self) -> None:
        """End it early; its response will say CANCELLED."""
        self._cancel(self.id)

    def _has_more(self, known: str) -> bool:
        return self.is_complete() or self.text != known

    def _wait(self, happened: Callable[[], bool], timeout_s: float | None) -> None:
        if not self._changed.wait_for(lambda: happened() or self.lost, timeout_s):
            raise TimeoutError(f'query {self.id}: nothing came for {timeout_s} s')
        if not happened():
            raise ConnectionError(f'query {self.id}: {self.lost}')


class CorrectionHandle:
    """A correction on its way into the model."""

    def __init__(self, correction_id: str, changed: threading.Condition) -> None:
        self.id = correction_id
        self.statuses: list[CorrectionStatus] = []
        self.lost = ''      # why it was perhaps never heard, if the node is gone
        self._changed = changed

    @property
    def status(self) -> CorrectionStatus | None:
        """The newest status."""
        return self.statuses[-1] if self.statuses else None

    def is_final(self) -> bool:
        """Return whether no other status will follow."""
        return bool(self.statuses) and self.statuses[-1].state in FINAL_STATES

    def wait(self, state: int = CorrectionStatus.LEARNED,
             timeout_s: float | None = None) -> CorrectionStatus:
        """
        Wait for a state, or for a final one, since none can follow; return its status.

        Raises TimeoutError, and ConnectionError if the node was gone before it said anything.
        What was ACCEPTED is kept: a node that is started again goes on with it, and so does this.
        """
        def reached() -> list[CorrectionStatus]:
            return [s for s in self.statuses if s.state == state or s.state in FINAL_STATES]

        with self._changed:
            self._wait(reached, timeout_s, 'not there after')
            return reached()[0]

    def follow(self, timeout_s: float | None = None) -> Iterator[CorrectionStatus]:
        """Yield each status, up to the final one; raises what `wait_for_more` does."""
        known = 0
        while not (known and self.statuses[known - 1].state in FINAL_STATES):
            self.wait_for_more(known, timeout_s)
            yield self.statuses[known]
            known += 1

    def wait_for_more(self, known: int, timeout_s: float | None = None) -> None:
        """Wait until there are more statuses than that; raises as `wait`."""
        with self._changed:
            self._wait(lambda: len(self.statuses) > known, timeout_s, 'nothing new for')

    def _wait(self, happened: Callable[[], object], timeout_s: float | None, missing: str) -> None:
        def unheard() -> bool:
            return bool(self.lost) and not self.statuses

        if not self._changed.wait_for(lambda: happened() or unheard(), timeout_s):
            raise TimeoutError(f'correction {self.id}: {missing} {timeout_s} s')
        if unheard():
            raise ConnectionError(f'correction {self.id}: {self.lost}')


class MaceClient:
    """Speaks to one node, in a thread of its own."""

    def __init__(self, node: str = '/mace', *, context: Context | None = None) -> None:
        """
        Connect to the node of that name.

        Without a ``context`` the client has its own, which takes the domain from the
        environment, and which no signal ends.
        """
        self._own_context = context is None
        if context is None:
            # rcl's own default is to run without security where it is on and there are no keys.
            os.environ.setdefault('ROS_SECURITY_STRATEGY', 'Enforce')
            context = Context()
            context.init(args=[])
        self._context = context
        self._changed = threading.Condition()
        self._answers: dict[str, AnswerHandle] = {}
        self._learning: dict[str, CorrectionHandle] = {}
        self._versions: dict[str, AdapterVersion] = {}
        self._name = '/' + node.strip('/')
        # The node's publisher at the last look that found one; also of one not yet missed.
        self._publishers: set[bytes] = set()
        self._named: set[bytes] = set()
        self._newcomers: set[bytes] = set()     # of the name, that came while others were there
        self._announced_at = -math.inf          # the latest version
        self._leaving: list[AnswerHandle | CorrectionHandle] = []     # given up at the next look

        self.node = Node(
            f'mace_client_{uuid.uuid4().hex[:8]}', context=context, use_global_arguments=False,
            enable_rosout=False, start_parameter_services=False,
            # What the security policy lets a client do: it serves nothing.
            parameter_overrides=[Parameter('start_type_description_service', value=False)])
        self._query = self.node.create_publisher(Query, f'{node}/query', RELIABLE)
        self._correction = self.node.create_publisher(Correction, f'{node}/correction', RELIABLE)
        self._cancel = self.node.create_publisher(Cancel, f'{node}/cancel', RELIABLE)
        self.node.create_subscription(
            ResponseChunk, f'{node}/response_chunk', self._on_chunk, RELIABLE)
        self.node.create_subscription(Response, f'{node}/response', self._on_response, RELIABLE)
        self.node.create_subscription(
            CorrectionStatus, f'{node}/correction_status', self._on_status, RELIABLE)
        # The last one: the middleware announces them in order, so once the node's latched
        # version has come, the node knows the subscriptions above as well.
        self.node.create_subscription(
            AdapterVersion, f'{node}/adapter_version', self._on_version, LATCHED)
        self.node.create_timer(
            WATCH_S, self._watch, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self._spinner = ExecutorThread(self.node, name='mace_client', context=context)
        self._spinner.start()

    def __enter__(self) -> MaceClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect."""
        self._spinner.stop()
        self.node.destroy_node()
        if self._own_context:
            self._context.try_shutdown()

    def wait_until_ready(self, timeout_s: float | None = None) -> AdapterVersion:
        """Wait until the node serves and hears us; return the version that it serves."""
        inputs = (self._query, self._correction, self._cancel)
        end = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while '' not in self._versions or not all(p.get_subscription_count() for p in inputs):
                if end is not None and time.monotonic() > end:
                    raise TimeoutError(f'the node is not ready after {timeout_s} s')
                self._changed.wait(DISCOVERY_POLL_S)
            return self._versions['']

    def ask(self, text: str, *, query_id: str = '', **fields: Any) -> AnswerHandle:
        """
        Ask; ``fields`` are any others of ``Query.msg``.

        Raises ValueError if this client is still waiting for an answer of that id. If the node
        was there and is gone, the answer ends with ConnectionError.
        """
        query = Query(id=query_id or str(uuid.uuid4()), text=text, **fields)
        query.header.stamp = self.node.get_clock().now().to_msg()
        answer = AnswerHandle(query.id, self._changed, self.cancel)
        with self._changed:
            self._look()
            if query.id in self._answers:
                raise ValueError(f'query {query.id} is being answered already')
            self._answers[query.id] = answer
        self._query.publish(query)
        return answer

    def cancel(self, query_id: str) -> None:
        """End a query early, whoever asked it."""
        message = Cancel(query_id=query_id)
        message.header.stamp = self.node.get_clock().now().to_msg()
        self._cancel.publish(message)

    def correct(self, corrected: str, *, correction_id: str = '',
                **fields: Any) -> CorrectionHandle:
        """
        Say what should have been answered; ``fields`` are any others of ``Correction.msg``.

        One of ``query_id``, ``conversation_id`` and ``prompt`` is needed. The node keeps each id
        once: while this client waits for one of that id, it is the same.
        """
        correction = Correction(
            id=correction_id or str(uuid.uuid4()), corrected=corrected, **fields)
        correction.header.stamp = self.node.get_clock().now().to_msg()
        with self._changed:
            self._look()
            learning = self._learning.get(correction.id)
            if learning is None or learning.lost or learning in self._leaving:
                learning = self._learning[correction.id] = CorrectionHandle(
                    correction.id, self._changed)
        self._correction.publish(correction)
        return learning

    def version(self, profile: str = '') -> AdapterVersion | None:
        """Return the version that serves a profile, if one was announced."""
        with self._changed:
            return self._versions.get(profile)

    def wait_for_version(self, version: int, profile: str = '',
                         timeout_s: float | None = None) -> AdapterVersion:
        """Wait until this version or a later one serves; raises TimeoutError."""
        def serves() -> bool:
            return profile in self._versions and self._versions[profile].version >= version

        with self._changed:
            if not self._changed.wait_for(serves, timeout_s):
                raise TimeoutError(f'version {version} does not serve after {timeout_s} s')
            return self._versions[profile]

    # -- in the client's thread ------------------------------------------------------

    def _on_chunk(self, message: ResponseChunk) -> None:
        with self._changed:
            answer = self._answers.get(message.query_id)
            # What goes on is the answer to somebody else, who uses our id.
            if answer is not None and (answer.chunks or message.index == 0):
                answer.chunks.append(message)
                if answer.first_text_at is None:
                    answer.first_text_at = time.monotonic()
                self._changed.notify_all()

    def _on_response(self, message: Response) -> None:
        with self._changed:
            answer = self._answers.get(message.query_id)
            if answer is None:
                return
            if answer.chunks and message.error_code == Response.DUPLICATE_ID:
                return    # somebody else used our id, and was refused
            del self._answers[message.query_id]
            answer.response = message
            self._changed.notify_all()

    def _on_status(self, message: CorrectionStatus) -> None:
        with self._changed:
            learning = self._learning.get(message.id)
            if learning is not None:
                learning.statuses.append(message)
                if learning.is_final():
                    del self._learning[message.id]
                self._changed.notify_all()

    def _on_version(self, message: AdapterVersion) -> None:
        if message.state == AdapterVersion.PUBLISHED:
            with self._changed:
                self._announced_at = time.monotonic()
                self._look()
                self._versions[message.profile] = message
                self._changed.notify_all()

    def _watch(self) -> None:
        """Give up what waits for a node that is gone, once what it still said has come."""
        with self._changed:
            for item in self._leaving:
                item.lost = f'{self._name} is gone'
                if isinstance(item, AnswerHandle) and self._answers.get(item.id) is item:
                    del self._answers[item.id]
            self._leaving = []
            self._look()
            self._changed.notify_all()

    def _look(self) -> None:
        """
        Notice that the node is gone, or that another one has come in its place.

        Asked of ROS's graph: liveliness events don't come where the lease has no end, as by
        default, and Humble has no event for a publisher that goes.
        """
        infos = self.node.get_publishers_info_by_topic(f'{self._name}/response')
        names = {bytes(i.endpoint_gid): f'{i.node_namespace.rstrip("/")}/{i.node_name}'
                 for i in infos}
        named = {gid for gid, name in names.items() if name == self._name}
        # The name comes a moment later. With another one, it plays a recording, or is a bridge.
        nameless = {gid for gid, name in names.items() if name.endswith(NAMELESS)}
        before = self._publishers - (names.keys() - named - nameless)
        present, come = named | nameless, named - self._named
        # One that was killed is missed after its lease only, but of a name one node serves. Who
        # comes and announces no version may be one that can't start beside it.
        self._newcomers = (self._newcomers | come if before - come else set()) & named
        announced = time.monotonic() < self._announced_at + NAMED_WITHIN_S
        if before and (not before & present or (announced and self._newcomers)):
            self._newcomers = set()
            self._versions.clear()
            self._leaving += self._answers.values()
            self._leaving += (x for x in self._learning.values() if not x.statuses)
        self._publishers, self._named = present or before, named
