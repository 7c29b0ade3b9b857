# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A running node as its clients see it: action, formats, embeddings, monitoring."""

from __future__ import annotations

from itertools import pairwise
import json
from pathlib import Path
import statistics

from action_msgs.msg import GoalStatus
from diagnostic_msgs.msg import DiagnosticArray
from jsonschema import validate
import mace_ros.msg as msg
from mace_ros.msg import Response
from mace_ros.srv import Embed, Trace
import numpy as np
import pytest
from support.graph import wait_until
from support.robot import NO_END
from support.ros_graph import (
    ANSWER_S,
    call,
    eventually,
    Generator,
    Inputs,
    NodeProcess,
    PATIENT,
    Recorder,
    resolved,
)

from mace_ros.ros.client import MaceClient

# -- the action --------------------------------------------------------------------------


def test_action_and_topics_give_the_same_tokens(
    client: MaceClient, generator: Generator,
) -> None:
    fields = {'max_tokens': 12, 'no_learn': True}
    by_topic = client.ask('What is the capital of France?', **fields)
    expected = by_topic.result(ANSWER_S)
    with Recorder(client, response=Response, response_chunk=msg.ResponseChunk) as recorder:
        goal = generator.send('What is the capital of France?', id='by action', **fields)
        assert wait_until(lambda: generator.chunks[-1:] and generator.chunks[-1].last, ANSWER_S)
        status, response = generator.result(goal)
        received = eventually(
            lambda: recorder.of(Response, query_id='by action'), ANSWER_S)
        chunks = eventually(lambda: len(recorder.of(msg.ResponseChunk)) == len(by_topic.chunks)
                            and recorder.of(msg.ResponseChunk), ANSWER_S)
    assert status == GoalStatus.STATUS_SUCCEEDED
    assert response.query_id == 'by action'
    assert response.text == expected.text
    assert [response] == received
    assert generator.chunks == chunks
    assert [c.text for c in chunks] == [c.text for c in by_topic.chunks]


@pytest.mark.parametrize('through', ['the action', 'the topic'])
def test_a_goal_is_cancelled_through_the_action_and_through_the_topic(
    client: MaceClient, generator: Generator, through: str,
) -> None:
    query_id = f'cancelled through {through}'
    goal = generator.send('Hi', id=query_id, max_tokens=3000, **PATIENT)
    assert wait_until(lambda: generator.chunks, ANSWER_S)
    if through == 'the action':
        assert len(resolved(goal.cancel_goal_async(), ANSWER_S).goals_canceling) == 1
    else:
        client.cancel(query_id)
    assert wait_until(lambda: generator.chunks[-1].last, ANSWER_S)
    status, response = generator.result(goal)
    assert response.finish_reason == Response.CANCELLED
    assert status == (GoalStatus.STATUS_CANCELED if through == 'the action'
                      else GoalStatus.STATUS_ABORTED)


def test_a_topic_query_with_a_goals_id_does_not_end_the_goal(
    client: MaceClient, generator: Generator, inputs: Inputs,
) -> None:
    with Recorder(client, response=Response) as recorder:
        goal = generator.send('Hi', id='mine', max_tokens=3900, **PATIENT)
        assert wait_until(lambda: generator.chunks, ANSWER_S)
        inputs.send(msg.Query(id='mine', text='Hi'))
        eventually(lambda: recorder.of(
            Response, error_code=Response.DUPLICATE_ID), ANSWER_S)
        # The same holds for a query that is also invalid.
        inputs.send(msg.Query(id='mine', text='', top_p=7.0))
        eventually(lambda: len(recorder.of(
            Response, error_code=Response.DUPLICATE_ID)) == 2, ANSWER_S)
    assert not generator.send('Hi', id='mine').accepted
    goal.cancel_goal_async()
    assert generator.result(goal)[1].finish_reason == Response.CANCELLED


def test_a_goal_with_the_id_of_a_running_query_is_aborted(
    client: MaceClient, generator: Generator,
) -> None:
    answer = client.ask('Hi', query_id='theirs', max_tokens=3000, **PATIENT)
    next(answer.stream(ANSWER_S))
    status, response = generator.result(generator.send('Hi', id='theirs'))
    assert (status, response.error_code) == (
        GoalStatus.STATUS_ABORTED, Response.DUPLICATE_ID)
    assert not answer.is_complete()
    answer.cancel()
    assert answer.result(ANSWER_S).finish_reason == Response.CANCELLED


def test_a_rejected_goal_says_why(generator: Generator) -> None:
    status, response = generator.result(generator.send(''))
    assert status == GoalStatus.STATUS_ABORTED
    assert (response.finish_reason, response.error_code) == (
        Response.REJECTED, Response.EMPTY_TEXT)
    assert len(response.query_id) == 36     # the goal's own


# -- formats and choices -----------------------------------------------------------------


def test_fifty_answers_through_messages_are_json_of_their_schema(client: MaceClient) -> None:
    schema = {'type': 'object', 'required': ['go', 'grid'], 'additionalProperties': False,
              'properties': {
                  'go': {'enum': ['left', 'right']},
                  'grid': {'type': 'array', 'minItems': 1, 'maxItems': 2, 'items': {
                      'type': 'array', 'maxItems': 3, 'items': {'type': 'boolean'}}}}}
    asked = [client.ask(f'Which way on day {i}?', temperature=1.0, max_tokens=300, no_learn=True,
                        response_format=msg.Query.JSON_SCHEMA, response_schema=json.dumps(schema),
                        **PATIENT) for i in range(50)]
    for answer in asked:
        response = answer.result(ANSWER_S)
        assert response.finish_reason == Response.STOP, response.error
        validate(json.loads(response.text), schema)
    refused = client.ask('Which way?', response_format=msg.Query.JSON_SCHEMA,
                         response_schema='{"type": "way"}').result(ANSWER_S)
    assert (refused.finish_reason, refused.error_code) == (
        Response.REJECTED, Response.INVALID_PARAMETER)
    assert 'way' in refused.error


def test_choices_and_log_probabilities_come_in_messages(client: MaceClient) -> None:
    fields = {'temperature': 1.0, 'seed': 3, 'max_tokens': 8, 'no_learn': True}
    answer = client.ask('Sing.', n=3, logprobs=3, **fields)
    response = answer.result(ANSWER_S)
    assert [c.index for c in response.choices] == [0, 1, 2]
    assert response.choices[1].text == client.ask(
        'Sing.', **{**fields, 'seed': 4}).result(ANSWER_S).text
    for choice in response.choices:
        assert len(choice.logprobs) == choice.output_tokens
        assert all(len(token.top) == 2 for token in choice.logprobs)
    assert wait_until(lambda: answer.chunks[-1].last, ANSWER_S)
    # The handle streams the first answer.
    assert answer.text == response.text == response.choices[0].text
    assert {c.choice for c in answer.chunks} == {0, 1, 2}


# -- embeddings --------------------------------------------------------------------------


def test_embeddings_of_similar_texts_are_close(client: MaceClient) -> None:
    reply = call(client, Embed, '/mace/embed', timeout_s=ANSWER_S,
                 texts=['A red apple.', 'A red apple!', 'Turn left at the dock.'])
    assert reply.success, reply.message
    rows = np.array(reply.values).reshape(3, reply.dimensions)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-3)
    assert len(reply.tokens) == 3 and min(reply.tokens) > 2
    assert rows[0] @ rows[1] > rows[0] @ rows[2]
    refused = call(client, Embed, '/mace/embed', texts=[''])
    assert (refused.success, refused.message) == (False, 'texts[0]: empty')


# -- monitoring --------------------------------------------------------------------------


def test_each_response_has_a_latency_message(client: MaceClient) -> None:
    with Recorder(client, latency=msg.Latency) as recorder:
        response = client.ask('Hi', max_tokens=4).result(ANSWER_S)
        [latency] = eventually(
            lambda: recorder.of(msg.Latency, query_id=response.query_id), ANSWER_S)
    for name in set(latency.get_fields_and_field_types()) - {'header'}:
        assert getattr(latency, name) == getattr(response, name), name


def test_the_scheduler_message_comes_at_monitor_rate_hz(client: MaceClient) -> None:
    with Recorder(client, scheduler=msg.Scheduler) as recorder:
        answers = [client.ask('Hi', max_tokens=3900, no_learn=True, **NO_END, **PATIENT)
                   for _ in range(6)]

        def decoding() -> list[msg.Scheduler]:
            return [m for m in recorder.of(msg.Scheduler) if m.decode_rows]

        first, *_, latest = eventually(lambda: decoding()[9:] and decoding(), ANSWER_S)
        for answer in answers:
            answer.cancel()
        times = [m.header.stamp.sec + m.header.stamp.nanosec * 1e-9
                 for m in recorder.of(msg.Scheduler)]
    between = statistics.median(b - a for a, b in pairwise(times))
    assert 0.05 < between < 0.25        # at 10 Hz; by default it would be 0.5
    assert latest.queue_depth == 0
    assert latest.decode_rate > 1
    assert 0 < latest.kv_use < 1
    assert latest.busy_share > 0
    assert latest.predicted_ms > 0
    assert latest.measured_ms > 0
    assert latest.iterations > first.iterations


def test_diagnostics_of_a_healthy_node(client: MaceClient) -> None:
    arrays: list[DiagnosticArray] = []
    subscription = client.node.create_subscription(
        DiagnosticArray, '/diagnostics', arrays.append, 10)
    assert wait_until(lambda: len(arrays) > 2, ANSWER_S)
    client.node.destroy_subscription(subscription)
    statuses = {status.name: status for status in arrays[-1].status}
    assert set(statuses) == {'mace: serving', 'mace: learning', 'mace: device'}
    serving = statuses['mace: serving']
    assert serving.hardware_id
    assert {v.key: v.value for v in serving.values}['state'] == 'active'
    memory = {v.key: v.value for v in statuses['mace: device'].values}['process_memory_mb']
    assert float(memory) > 50
    assert statuses['mace: device'].hardware_id == serving.hardware_id


def test_a_trace_is_recorded_on_request(client: MaceClient, tiny_node: NodeProcess) -> None:
    refused = call(client, Trace, '/mace/trace', name='../elsewhere')
    assert (refused.success, 'name' in refused.message) == (False, True)
    begun = call(client, Trace, '/mace/trace', iterations=20, seconds=60.0, name='mine')
    assert begun.success, begun.message
    assert Path(begun.path) == tiny_node.folder / 'storage/traces/mine.json'
    second = call(client, Trace, '/mace/trace', name='another')
    assert (second.success, 'one trace at a time' in second.message) == (False, True)
    answer = client.ask('Which secret is asked here?', max_tokens=3000, **PATIENT)
    assert wait_until(Path(begun.path).exists, ANSWER_S)
    answer.cancel()
    answer.result(ANSWER_S)
    text = Path(begun.path).read_text()
    slices = [r['name'] for r in json.loads(text)['traceEvents'] if r['ph'] == 'X']
    assert slices.count('pass') > 5
    assert f'query {answer.id}' in text
    assert 'secret' not in text
    assert not call(client, Trace, '/mace/trace', name='mine').success     # it exists
    assert wait_until(lambda: 'a trace is complete' in tiny_node.log, ANSWER_S)
