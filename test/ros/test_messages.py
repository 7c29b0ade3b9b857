# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The parts between messages and the engine: conversion, request gate, engine thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from itertools import pairwise
import math
import time
from types import SimpleNamespace

import mace_ros.msg as msg
import pytest
from rclpy.context import Context
from rclpy.node import Node
from std_msgs.msg import Header
from support.graph import wait_until

from mace_ros.api.events import (
    AdapterVersion,
    Cancel,
    ChatMessage,
    Choice,
    Correction,
    CorrectionState,
    CorrectionStatus,
    ErrorCode,
    Event,
    FinishReason,
    Logprob,
    Query,
    Response,
    ResponseChunk,
    ResponseFormat,
    TokenLogprobs,
    Tool,
    ToolCall,
    VersionState,
)
from mace_ros.api.settings import Settings
from mace_ros.ros.conversion import (
    correction_from,
    message_from,
    MESSAGE_TYPES,
    query_from,
)
from mace_ros.ros.engine_thread import EngineThread
from mace_ros.ros.event_log import printable
from mace_ros.ros.latched_versions import LatchedVersions
from mace_ros.ros.request_gate import RequestGate


def test_fields_left_out_of_a_query_are_the_nodes_defaults() -> None:
    assert query_from(msg.Query(text='Hi')) == Query('Hi')


def test_only_minus_one_means_the_default() -> None:
    zero = query_from(msg.Query(
        max_tokens=0, temperature=0.0, top_p=0.0, seed=0, ttft_slo_ms=0.0, tpot_slo_ms=0.0))
    assert zero.max_tokens == zero.temperature == zero.top_p == zero.seed == 0
    assert zero.ttft_slo_ms == zero.tpot_slo_ms == 0
    odd = query_from(msg.Query(max_tokens=-5, temperature=-0.5, top_p=math.nan))
    assert (odd.max_tokens, odd.temperature) == (-5, -0.5)
    assert math.isnan(odd.top_p)


@pytest.mark.parametrize(('kind', 'message', 'convert'), [
    (Query, msg.Query(), query_from), (Correction, msg.Correction(), correction_from)])
def test_every_field_of_a_message_is_converted(
        kind: type, message: object, convert: Callable) -> None:
    types = message.get_fields_and_field_types()
    assert set(types) == {'header', *(f.name for f in fields(kind))} - {'origin'}
    samples = {'string': 'text', 'boolean': True, 'sequence<string>': ['text'],
               'sequence<int32>': [3], 'sequence<float>': [0.5]}
    for name in set(types) - {'header', 'messages', 'tools'}:
        sample = samples.get(types[name], 3)
        setattr(message, name, sample)
        assert getattr(convert(message), name) == (
            tuple(sample) if isinstance(sample, list) else sample)


def test_a_conversation_and_tools_are_converted() -> None:
    call = {'id': 'c', 'name': 'move', 'arguments': '{}'}
    tool = {'name': 'move', 'description': 'Moves.', 'parameters': '{}'}
    message = msg.Query(tools=[msg.Tool(**tool)], messages=[
        msg.ChatMessage(role='assistant', content='Hi', tool_calls=[msg.ToolCall(**call)]),
        msg.ChatMessage(role='tool', content='Done.', tool_call_id='c')])
    query = query_from(message)
    assert query.tools == (Tool(**tool),)
    assert query.messages == (ChatMessage('assistant', 'Hi', (ToolCall(**call),)),
                              ChatMessage('tool', 'Done.', tool_call_id='c'))
    sent = message_from(
        Response('q', '', '', FinishReason.STOP, tool_calls=(ToolCall(**call),)), Header().stamp)
    assert sent.tool_calls == [msg.ToolCall(**call)]


LOGPROBS = (TokenLogprobs(Logprob(5, '\ufffd', b'\xe3', -0.5), (Logprob(6, 'a', b'a', -0.25),)),
            TokenLogprobs(Logprob(7, '<|im_end|>', b'', -1.5)))


@pytest.mark.parametrize('event', [
    ResponseChunk('q', 3, 'ä', True, choice=2, logprobs=LOGPROBS),
    Response('q', 'c', 'text', FinishReason.ERROR, ErrorCode.INTERNAL, 'why', 7, 'ann', 'k', 0.75,
             1, 2, 0.5, 1.5, 2.5, 3.5, True, logprobs=LOGPROBS,
             choices=(Choice(1, 'other', FinishReason.STOP, 4, LOGPROBS),)),
    CorrectionStatus('c', CorrectionState.FAILED, 'why', 7),
    AdapterVersion('ann', 2, 1, VersionState.ROLLED_BACK, 'why', ('a', 'b'), -3.5, -0.5, 10, 1.5,
                 '/path', 'abc')], ids=lambda event: type(event).__name__)
def test_every_field_of_an_event_is_in_its_message(event: Event) -> None:
    stamp = Header().stamp
    stamp.sec = 5
    message = message_from(event, stamp)
    assert isinstance(message, MESSAGE_TYPES[type(event)])
    assert message.header.stamp.sec == 5
    assert_same(message, event)


def assert_same(message: object, event: object) -> None:
    """Compare the fields, those of nested messages included."""
    names = set(message.get_fields_and_field_types()) - {'header'}
    assert names == {f.name for f in fields(event)} - {'origin'}
    for name in names:
        value, found = getattr(event, name), getattr(message, name)
        if isinstance(value, bytes):
            assert bytes(found) == value
        elif isinstance(value, tuple) and value and is_dataclass(value[0]):
            for one, expected in zip(found, value, strict=True):
                assert_same(one, expected)
        elif is_dataclass(value):
            assert_same(found, value)
        else:
            assert found == (list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize(('kind', 'message'), [
    (FinishReason, msg.Response), (ErrorCode, msg.Response), (ResponseFormat, msg.Query)])
def test_messages_have_the_constants_of_the_enums(kind: type, message: type) -> None:
    assert {m.name: m.value for m in kind}.items() <= {
        name: getattr(message, name) for name in dir(message) if name.isupper()}.items()


def test_the_live_version_of_each_profile_stays_in_the_history() -> None:
    depth = 3
    latched, published, live = LatchedVersions(depth), [], {}
    # A profile without a live version of its own takes no place in the history.
    for event in (AdapterVersion('eve', 1, 0, VersionState.REJECTED),
                  AdapterVersion('dan', 1, 0, VersionState.PUBLISHED),
                  AdapterVersion('dan', 0, 0, VersionState.PUBLISHED)):
        published += latched.to_publish(event)
    turns = [('', 1), ('ann', 1), ('bob', 1), *[('ann', n) for n in range(2, 9)], ('', 2)]
    for profile, version in turns:
        event = AdapterVersion(profile, version, version - 1, VersionState.PUBLISHED)
        refused = AdapterVersion(profile, version + 1, version, VersionState.REJECTED)
        live[profile] = event
        for happened in (event, refused):
            published += latched.to_publish(happened)
            assert set(live.values()) <= set(published[-depth:])


def test_with_more_profiles_than_the_history_holds_the_robots_version_stays_in_it() -> None:
    latched, published = LatchedVersions(depth := 3), []
    for profile in ('', 'ann', 'bob', 'cleo', 'dan', 'ann', 'eve'):
        event = AdapterVersion(profile, 1, 0, VersionState.PUBLISHED)
        published += latched.to_publish(event)
        assert '' in {e.profile for e in published[-depth:]}
        assert event in published[-depth:]


def test_early_requests_wait_and_late_ones_are_refused() -> None:
    refused: list[Event] = []
    parameters = SimpleNamespace(settings=Settings().updated({'scheduler.max_queue': 3}))
    gate = RequestGate(parameters, publish=refused.extend)
    seen: list[object] = []
    engine = SimpleNamespace(submit=seen.append, correct=seen.append, cancel=seen.append)
    early = [Query('Hi', id='1'), Correction('Ho', id='2'), Cancel('1')]
    for item in [*early, Query('Hi', id='4')]:
        gate.put(item)
    assert [(r.query_id, r.error_code) for r in refused] == [('4', ErrorCode.OVERLOADED)]
    assert gate.engine is None
    gate.open(engine)
    assert gate.engine is engine
    gate.put(Cancel('5'))
    assert seen == [*early[:2], '1', '5']
    refused.clear()
    gate.close('the node is stopping')
    assert gate.engine is None
    for item in early:
        gate.put(item)
    assert [type(r) for r in refused] == [Response, CorrectionStatus]
    assert refused[0].error_code is ErrorCode.NOT_SERVING
    assert refused[0].error == refused[1].reason == 'the node is stopping'


@pytest.mark.parametrize(('given', 'shown'), [
    ('q-1', 'q-1'), ('名前', '名前'), ('a\nb', r"'a\nb'"), ('\x1b[2J', r"'\x1b[2J'"),
    ('\u202e', r"'\u202e'"), ('i' * 128, 'i' * 128), ('i' * 129, repr('i' * 128))])
def test_an_id_is_logged_unchanged_or_escaped(given: str, shown: str) -> None:
    assert printable(given) == shown


class ScriptedEngine:
    """Follows a script: each step returns a delay until the next, or None, or raises."""

    def __init__(self, *script: float | Exception | None) -> None:
        self.script = list(script)
        self.stepped_at: list[float] = []

    def step(self) -> SimpleNamespace:
        now = time.monotonic()
        self.stepped_at.append(now)
        what = self.script.pop(0) if self.script else None
        if isinstance(what, Exception):
            raise what
        return SimpleNamespace(events=[], wake_at=None if what is None else now + what)


@pytest.fixture
def failures() -> list[str]:
    """Return the reasons that the engine thread gives for its failures."""
    return []


@pytest.fixture
def thread(failures: list[str]) -> Iterator[EngineThread]:
    context = Context()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('ROS_AUTOMATIC_DISCOVERY_RANGE', 'OFF')
        context.init(args=[])
    node = Node('owner', context=context)
    made = EngineThread(node, publish=lambda events: None, on_failure=failures.append)
    yield made
    assert made.stop(30.0)
    context.shutdown()


def run(thread: EngineThread, engine: ScriptedEngine) -> None:
    thread.call(lambda: thread.load(engine)).result(30.0)
    thread.call(thread.run).result(30.0)


def test_the_engine_decides_when_the_next_iteration_runs(
        thread: EngineThread, failures: list[str]) -> None:
    engine = ScriptedEngine(0.0, 0.0, 1.0, None, None)
    run(thread, engine)
    assert wait_until(lambda: len(engine.stepped_at) == 4, 30.0)
    time.sleep(0.3)
    assert len(engine.stepped_at) == 4
    thread.wake()
    assert wait_until(lambda: len(engine.stepped_at) == 5, 30.0)
    waits = [b - a for a, b in pairwise(engine.stepped_at)]
    assert waits[2] >= 1.0 > max(waits[:2])
    assert failures == []


def test_a_failed_iteration_is_retried(
        thread: EngineThread, failures: list[str]) -> None:
    engine = ScriptedEngine(ValueError('broken'), 0.0, ValueError('broken'), None)
    run(thread, engine)
    assert wait_until(lambda: not engine.script, 30.0)
    assert failures == []


def test_an_engine_that_keeps_failing_is_given_up(
        thread: EngineThread, failures: list[str]) -> None:
    engine = ScriptedEngine(*[ValueError('broken')] * 9)
    run(thread, engine)
    assert wait_until(lambda: failures, 30.0)
    thread.wake()
    time.sleep(0.3)
    assert len(failures) == 1
    assert 'broken' in failures[0]
    assert len(engine.stepped_at) == 3
