# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What lies between messages and the engine: conversion, intake, the device's thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
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
    Correction,
    CorrectionState,
    CorrectionStatus,
    ErrorCode,
    Event,
    FinishReason,
    Query,
    Response,
    ResponseChunk,
    VersionState,
)
from mace_ros.ros.conversion import (
    correction_from,
    message_from,
    MESSAGE_TYPES,
    query_from,
)
from mace_ros.ros.engine_thread import EngineThread
from mace_ros.ros.latched_versions import LatchedVersions
from mace_ros.ros.node import _shown
from mace_ros.ros.request_gate import RequestGate


def test_what_a_query_does_not_say_is_the_nodes_default() -> None:
    assert query_from(msg.Query(text='Hi')) == Query('Hi')


def test_zero_is_a_value_and_only_minus_one_is_the_default() -> None:
    zero = query_from(msg.Query(
        max_tokens=0, temperature=0.0, top_p=0.0, seed=0, ttft_slo_ms=0.0, tpot_slo_ms=0.0))
    assert zero.max_tokens == zero.temperature == zero.top_p == zero.seed == 0
    assert zero.ttft_slo_ms == zero.tpot_slo_ms == 0
    odd = query_from(msg.Query(max_tokens=-5, temperature=-0.5, top_p=math.nan))
    assert (odd.max_tokens, odd.temperature) == (-5, -0.5)
    assert math.isnan(odd.top_p)


@pytest.mark.parametrize(('kind', 'message', 'convert'), [
    (Query, msg.Query(), query_from), (Correction, msg.Correction(), correction_from)])
def test_no_field_is_forgotten(kind: type, message: object, convert: Callable) -> None:
    types = message.get_fields_and_field_types()
    assert set(types) == {'header', *(f.name for f in fields(kind))} - {'origin'}
    samples = {'string': 'text', 'boolean': True, 'sequence<string>': ['text']}
    for name in set(types) - {'header'}:
        setattr(message, name, samples.get(types[name], 3))
        value = getattr(convert(message), name)
        assert value == (('text',) if isinstance(value, tuple) else getattr(message, name))


@pytest.mark.parametrize('event', [
    ResponseChunk('q', 3, 'ä', True),
    Response('q', 'c', 'text', FinishReason.ERROR, ErrorCode.INTERNAL, 'why', 7, 1, 2, 0.5, 1.5,
             2.5, 3.5, True),
    CorrectionStatus('c', CorrectionState.FAILED, 'why', 7),
    AdapterVersion('ann', 2, 1, VersionState.ROLLED_BACK, 'why', ('a', 'b'), -3.5, -0.5, 10, 1.5,
                 '/path', 'abc')], ids=lambda event: type(event).__name__)
def test_an_event_becomes_its_message(event: Event) -> None:
    stamp = Header().stamp
    stamp.sec = 5
    message = message_from(event, stamp)
    assert isinstance(message, MESSAGE_TYPES[type(event)])
    assert message.header.stamp.sec == 5
    names = set(message.get_fields_and_field_types()) - {'header'}
    assert names == {f.name for f in fields(event)} - {'origin'}
    for name in names:
        value = getattr(event, name)
        assert getattr(message, name) == (list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize('kind', [FinishReason, ErrorCode])
def test_response_names_the_same_constants(kind: type) -> None:
    assert {m.name: m.value for m in kind}.items() <= {
        name: getattr(msg.Response, name) for name in dir(msg.Response) if name.isupper()}.items()


def test_the_live_version_of_each_profile_stays_on_the_topic() -> None:
    depth = 3
    latch, published, live = LatchedVersions(depth), [], {}
    # One that never had a version does not hold a place on it, nor one that has none any more.
    for event in (AdapterVersion('eve', 1, 0, VersionState.REJECTED),
                  AdapterVersion('dan', 1, 0, VersionState.PUBLISHED),
                  AdapterVersion('dan', 0, 0, VersionState.PUBLISHED)):
        published += latch.to_publish(event)
    turns = [('', 1), ('ann', 1), ('bob', 1), *[('ann', n) for n in range(2, 9)], ('', 2)]
    for profile, version in turns:
        event = AdapterVersion(profile, version, version - 1, VersionState.PUBLISHED)
        refused = AdapterVersion(profile, version + 1, version, VersionState.REJECTED)
        live[profile] = event
        for happened in (event, refused):
            published += latch.to_publish(happened)
            assert set(live.values()) <= set(published[-depth:])


def test_what_comes_early_waits_and_what_comes_late_is_refused() -> None:
    refused: list[Event] = []
    intake = RequestGate(limit=lambda: 3, refuse=refused.extend)
    seen: list[object] = []
    engine = SimpleNamespace(submit=seen.append, correct=seen.append, cancel=seen.append)
    early = [Query('Hi', id='1'), Correction('Ho', id='2'), '1']
    for item in [*early, Query('Hi', id='4')]:
        intake.put(item)
    assert [(r.query_id, r.error_code) for r in refused] == [('4', ErrorCode.OVERLOADED)]
    intake.open(engine)
    intake.put('5')
    assert seen == [*early, '5']
    refused.clear()
    intake.close('it is night')
    for item in early:
        intake.put(item)
    assert [type(r) for r in refused] == [Response, CorrectionStatus]
    assert refused[0].error_code is ErrorCode.NOT_SERVING
    assert refused[0].error == refused[1].reason == 'it is night'


@pytest.mark.parametrize(('given', 'shown'), [
    ('q-1', 'q-1'), ('名前', '名前'), ('a\nb', r"'a\nb'"), ('\x1b[2J', r"'\x1b[2J'"),
    ('\u202e', r"'\u202e'"), ('i' * 128, 'i' * 128), ('i' * 129, repr('i' * 128))])
def test_an_id_is_shown_as_it_is_or_escaped(given: str, shown: str) -> None:
    assert _shown(given) == shown


class ScriptedEngine:
    """Steps as it is told to: a delay until it wants to be woken, None, or an error."""

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
def device() -> Iterator[EngineThread]:
    context = Context()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('ROS_AUTOMATIC_DISCOVERY_RANGE', 'OFF')
        context.init(args=[])
    node = Node('owner', context=context)
    reasons: list[str] = []
    made = EngineThread(node, publish=lambda events: None, fatal_error=reasons.append)
    made.reasons = reasons
    yield made
    assert made.stop(30.0)
    context.shutdown()


def test_iterations_follow_each_other_or_wait_as_the_engine_says(device: EngineThread) -> None:
    engine = ScriptedEngine(0.0, 0.0, 0.3, None, None)
    device.call(lambda: device.drive(engine)).result(30.0)
    assert wait_until(lambda: len(engine.stepped_at) == 4, 30.0)
    time.sleep(0.3)
    assert len(engine.stepped_at) == 4
    device.wake()
    assert wait_until(lambda: len(engine.stepped_at) == 5, 30.0)
    waits = [b - a for a, b in pairwise(engine.stepped_at)]
    assert waits[2] >= 0.3 > max(waits[:2])
    assert device.reasons == []


def test_a_failed_iteration_is_tried_again(device: EngineThread) -> None:
    engine = ScriptedEngine(ValueError('broken'), 0.0, ValueError('broken'), None)
    device.call(lambda: device.drive(engine)).result(30.0)
    assert wait_until(lambda: not engine.script, 30.0)
    assert device.reasons == []


def test_an_engine_that_always_fails_is_given_up(device: EngineThread) -> None:
    engine = ScriptedEngine(*[ValueError('broken')] * 9)
    device.call(lambda: device.drive(engine)).result(30.0)
    assert wait_until(lambda: device.reasons, 30.0)
    device.wake()
    time.sleep(0.3)
    assert len(device.reasons) == 1
    assert 'broken' in device.reasons[0]
    assert len(engine.stepped_at) == 3
