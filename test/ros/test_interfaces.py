# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A running node as operators see it: action, services, learning, monitoring, invalid input."""

from __future__ import annotations

from collections.abc import Iterator
import json
import math
from pathlib import Path
import random
import time
from types import SimpleNamespace

from action_msgs.msg import GoalStatus
from diagnostic_msgs.msg import DiagnosticArray
from jsonschema import validate
import mace_ros.msg as msg
from mace_ros.msg import CorrectionStatus, Response
from mace_ros.srv import ListVersions, Rollback, Trace
import pytest
from rcl_interfaces.srv import GetParameters
from std_srvs.srv import SetBool
from support.graph import observer, wait_until
from support.robot import RANDOM_MODEL
from support.ros_graph import (
    call,
    eventually,
    Generator,
    Inputs,
    NodeProcess,
    Recorder,
    resolved,
    set_parameters,
)

from mace_ros.api.settings import Parameter, PARAMETERS
from mace_ros.ros.client import MaceClient
from mace_ros.ros.executor_thread import ExecutorThread

START_S = 100.0
ANSWER_S = 60.0
PATIENT = {'ttft_slo_ms': 6e5, 'tpot_slo_ms': 6e5}

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope='module')
def client(tiny_node: NodeProcess) -> Iterator[MaceClient]:
    with MaceClient() as made:
        made.wait_until_ready(START_S)
        yield made


@pytest.fixture(scope='module')
def inputs(client: MaceClient) -> Inputs:
    return Inputs(client)


@pytest.fixture
def generator(client: MaceClient) -> Iterator[Generator]:
    with Generator(client) as made:
        yield made


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
    goal = generator.send('Hi', id='mine', max_tokens=3000, **PATIENT)
    assert wait_until(lambda: generator.chunks, ANSWER_S)
    with Recorder(client, response=Response) as recorder:
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


# -- learning ----------------------------------------------------------------------------


def test_the_context_of_a_follow_up_contains_the_corrected_answer(client: MaceClient) -> None:
    assert set_parameters(client, {'finetune.budget': 0.0}) == [(True, '')]

    def ask(text: str, **fields: object) -> Response:
        return client.ask(text, **fields).result(ANSWER_S)

    question, follow_up = 'What do cows drink?', 'And what do they eat?'
    prompt_tokens = {}
    for conversation in ('as it was', 'corrected'):
        first = ask(question, conversation_id=conversation, max_tokens=4)
        if conversation == 'corrected':
            learning = client.correct(
                'Cows drink a lot of fresh, clean and cool water on every single day.',
                conversation_id=conversation)
            accepted = learning.wait(CorrectionStatus.ACCEPTED, ANSWER_S)
            assert accepted.state == CorrectionStatus.ACCEPTED
        second = ask(follow_up, conversation_id=conversation, max_tokens=1)
        prompt_tokens[conversation] = second.prompt_tokens - first.prompt_tokens
    alone = ask(follow_up, max_tokens=1).prompt_tokens
    forgotten = ask(follow_up, conversation_id='corrected', max_tokens=1, reset_conversation=True)
    assert 0 < prompt_tokens['as it was'] < prompt_tokens['corrected'] - 8
    assert forgotten.prompt_tokens == alone
    # Learned before other tests correct this node.
    assert set_parameters(client, {'finetune.budget': 1.0}) == [(True, '')]
    assert learning.wait(timeout_s=ANSWER_S).state == CorrectionStatus.LEARNED


def test_frozen_learning_keeps_corrections_until_it_is_resumed(client: MaceClient) -> None:
    answered = client.ask('What is your name?', max_tokens=4).result(ANSWER_S)
    assert call(client, SetBool, '/mace/freeze_learning', data=True).success
    learning = client.correct('Rover.', query_id=answered.query_id)
    learning.wait(CorrectionStatus.ACCEPTED, ANSWER_S)
    with Recorder(client, scheduler=msg.Scheduler) as recorder:
        frozen = eventually(lambda: recorder.of(
            msg.Scheduler, learning_frozen=True, corrections_waiting=1)[5:], ANSWER_S)[-1]
    assert frozen.finetune_rate == 0
    assert frozen.freshness_s > 0
    assert [s.state for s in learning.statuses] == [CorrectionStatus.ACCEPTED]
    # Setting a parameter does not resume it.
    assert set_parameters(client, {'finetune.budget': 1.0}) == [(True, '')]
    time.sleep(0.5)
    assert len(learning.statuses) == 1
    assert call(client, SetBool, '/mace/freeze_learning', data=False).success
    learned = learning.wait(timeout_s=ANSWER_S)
    assert learned.state == CorrectionStatus.LEARNED

    listed = call(client, ListVersions, '/mace/list_versions')
    assert listed.success
    assert listed.live_version == learned.adapter_version == listed.versions[-1].version
    assert listed.versions[-1].correction_ids == [learning.id]
    assert listed.versions[-1].sha256 == client.version().sha256
    unknown = call(client, ListVersions, '/mace/list_versions', profile='unknown')
    assert (unknown.success, unknown.versions) == (True, [])


@pytest.fixture
def operator(client: MaceClient) -> Iterator[SimpleNamespace]:
    """Yield a node without a subscription of chunks, which would flood it."""
    with observer() as node:
        spinner = ExecutorThread(node, name='operator', context=node.context)
        spinner.start()
        yield SimpleNamespace(node=node)
        spinner.stop()


LONG_ANSWERS = ('Tell me a story.', 'Count to a thousand.', 'Sing a song.', 'Why is that so?',
                'List all numbers.', 'And then?', 'Describe the sea.', 'Go on, please.')


def test_a_rollback_under_load_loses_nothing(
    client: MaceClient, operator: SimpleNamespace,
) -> None:
    """The next query is served by the older version; running ones end on the newer one."""
    # So that the newer version has long answers on their way, to questions that it was not taught.
    assert set_parameters(client, {'adapter.scope': 'everywhere'}) == [(True, '')]
    question, answers = 'Where do you live?', ('In the hall.', 'In the kitchen.')
    learned = [client.correct(corrected, prompt=question) for corrected in answers[:1]]
    assert learned[0].wait(timeout_s=ANSWER_S).state == CorrectionStatus.LEARNED
    learned.append(client.correct(answers[1], prompt=question))
    assert learned[1].wait(timeout_s=ANSWER_S).state == CorrectionStatus.LEARNED
    older, newer = (learning.status.adapter_version for learning in learned)
    assert newer == older + 1
    asking = operator.node.create_publisher(msg.Query, '/mace/query', 1000)
    cancelling = operator.node.create_publisher(msg.Cancel, '/mace/cancel', 1000)
    assert wait_until(lambda: asking.get_subscription_count()
                      and cancelling.get_subscription_count(), 10.0)
    asked: list[str] = []

    def ask(text: str, count: int, **fields: object) -> list[str]:
        ids = [f'{text[:4]} {len(asked) + i}' for i in range(count)]
        for query_id in ids:
            asking.publish(msg.Query(id=query_id, text=text, **fields))
        asked.extend(ids)
        return ids

    def responses(ids: list[str]) -> list[Response]:
        return eventually(lambda: len(found := [
            r for r in recorder.of(Response) if r.query_id in ids]) == len(ids) and found, ANSWER_S)

    with Recorder(operator, response=Response, adapter_version=msg.AdapterVersion,
                  correction_status=CorrectionStatus, scheduler=msg.Scheduler) as recorder:
        eventually(lambda: recorder.of(msg.Scheduler), 10.0)
        # Of several prompts, since a random model ends some answers soon.
        running = [query_id for text in LONG_ANSWERS
                   for query_id in ask(text, 1, max_tokens=3500, **PATIENT)]
        eventually(lambda: any(s.decode_rows >= 2 for s in recorder.of(msg.Scheduler)), ANSWER_S)
        load = ask(question, 20)
        reply = call(operator, Rollback, '/mace/rollback', version=older, timeout_s=ANSWER_S)
        assert (reply.success, reply.message) == (True, '')
        after = ask(question, 5)
        for response in responses(after):
            assert (response.adapter_version, response.text) == (older, answers[0])
        # Each was served by the version that was live when it was admitted.
        for response in responses(load):
            assert response.adapter_version in (older, newer)
            assert response.text == answers[response.adapter_version == newer]
        for query_id in running:
            cancelling.publish(msg.Cancel(query_id=query_id))
        ended = responses(running)
        assert {r.adapter_version for r in ended} == {newer}
        assert Response.CANCELLED in {r.finish_reason for r in ended}
        # Every query got one response.
        assert sorted(r.query_id for r in recorder.of(Response)) == sorted(asked)
        published = [(v.version, v.state) for v in recorder.of(msg.AdapterVersion)]
        assert published[-2:] == [(newer, msg.AdapterVersion.ROLLED_BACK),
                             (older, msg.AdapterVersion.PUBLISHED)]
        statuses = {s.id: s for s in recorder.of(CorrectionStatus)}
        assert statuses[learned[0].id].state == CorrectionStatus.LEARNED
        assert statuses[learned[1].id].state == CorrectionStatus.FAILED
        assert '~/rollback' in statuses[learned[1].id].reason
    listed = call(operator, ListVersions, '/mace/list_versions')
    assert listed.live_version == older
    assert listed.versions[-1].state == msg.AdapterVersion.ROLLED_BACK
    refused = call(operator, Rollback, '/mace/rollback', version=newer + 7)
    assert not refused.success and 'on record' in refused.message


# -- monitoring -------------------------------------------------------------


def test_each_response_has_a_latency_message(client: MaceClient) -> None:
    with Recorder(client, latency=msg.Latency) as recorder:
        response = client.ask('Hi', max_tokens=4).result(ANSWER_S)
        [latency] = eventually(
            lambda: recorder.of(msg.Latency, query_id=response.query_id), ANSWER_S)
    for name in set(latency.get_fields_and_field_types()) - {'header'}:
        assert getattr(latency, name) == getattr(response, name), name


def test_the_scheduler_message_comes_at_monitor_rate_hz(client: MaceClient) -> None:
    # Sampled answers: some may end soon.
    answers = [client.ask('Hi', max_tokens=3000, temperature=1.0, seed=n, no_learn=True, **PATIENT)
               for n in range(6)]
    next(answers[0].stream(ANSWER_S))
    with Recorder(client, scheduler=msg.Scheduler) as recorder:
        eventually(lambda: recorder.messages, ANSWER_S)
        start = len(recorder.messages)
        time.sleep(2.0)
        count = len(recorder.messages) - start
    for answer in answers:
        answer.cancel()
    assert count > 8       # at 10 Hz; by default it would be 4
    first, *_, latest = [m for m in recorder.of(msg.Scheduler) if m.decode_rows]
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


# -- invalid input -------------------------------------------------------------------------------

# Values of this node that are not defaults.
KEPT = {'monitor.rate_hz': 10.0, **RANDOM_MODEL}


def bounds(parameter: Parameter) -> tuple[list[object], list[object]]:
    """Return allowed values, and values that must be refused."""
    wrong: list[object] = ['text', True, 1, 1.0, [1, 2]]
    wrong = [w for w in wrong if type(w) is not type(parameter.default)]
    if parameter.choices:
        return list(parameter.choices), [*wrong, 'no such choice', '']
    if parameter.minimum is None or parameter.maximum is None:
        return [parameter.default], wrong
    kind = type(parameter.default)
    low, high = kind(parameter.minimum), kind(parameter.maximum)
    beyond = ([low - 1, high + 1] if kind is int else
              [math.nextafter(low, -math.inf) - 1e-6, high * 1.001 + 1e-6,
               math.inf, -math.inf, math.nan])
    return [low, high], [*wrong, *beyond]


def test_parameters_accept_their_bounds_and_nothing_beyond(client: MaceClient) -> None:
    writable = [p for p in PARAMETERS.values() if not p.read_only]
    for parameter in writable:
        allowed, refused = bounds(parameter)
        for value in allowed:
            assert set_parameters(client, {parameter.name: value}) == [(True, '')]
            answer = client.ask('Hi', max_tokens=1, no_learn=True).result(ANSWER_S)
            if answer.finish_reason == Response.REJECTED:     # no memory is left for the node
                assert parameter.name == 'memory.headroom_mb' and value == parameter.maximum
                assert 'memory.budget_mb' in answer.error
            else:
                assert answer.finish_reason in (Response.STOP, Response.LENGTH), parameter.name
        for value in refused:
            [(successful, reason)] = set_parameters(client, {parameter.name: value})
            assert not successful, (parameter.name, value)
            assert reason
        assert set_parameters(client, {
            parameter.name: KEPT.get(parameter.name, parameter.default)}) == [(True, '')]
    for parameter in PARAMETERS.values():
        if parameter.read_only:
            [(successful, reason)] = set_parameters(client, {parameter.name: parameter.default})
            assert not successful
            assert 'read-only' in reason


ALPHABETS = ('abc XYZ.,?', 'äöü ß é', 'こんにちは ロボット', '🤖👋🏽 ', '\x00\n\t\x07 \u202e\ufeff')
NUMBERS = (-1.0, 0.0, 1.0, 0.5, -0.5, 1e30, math.nan, math.inf, -math.inf)
INTEGERS = (-1, 0, 1, 2, -5, -2**31, 2**31 - 1)


class Fuzzer:
    """Makes messages that are mostly invalid, the same ones in each run."""

    def __init__(self, answered: Response, name: str) -> None:
        self._random = random.Random(4)
        self._answered = answered
        self._name = name       # in its ids: a test's cancellations must not reach another's

    def text(self) -> str:
        # Few are of the maximum length, or longer.
        length = self._random.choice((0, 1, 5, 20, 20, 100, 300) * 20 + (65536, 65537))
        return ''.join(self._random.choices(self._random.choice(ALPHABETS), k=length))

    def id(self) -> str:
        kind = self._random.randrange(6)
        if kind == 0:
            return ''
        if kind == 1:
            return (self._name + self.text())[:200]
        return f'{self._name} {self._random.randrange(300)}'     # often used twice

    def query(self) -> msg.Query:
        pick = self._random.choice
        return msg.Query(
            id=self.id(), conversation_id=pick(('', 'a', self.id())), profile=pick(('', '', '\n')),
            system=pick(('', self.text())), text=self.text(), max_tokens=pick((0, 1, 1, 2, -5)),
            temperature=pick(NUMBERS), top_p=pick(NUMBERS), seed=pick(INTEGERS),
            stop=pick(([], [], [self.text()], ['a'] * 20)), ttft_slo_ms=pick(NUMBERS),
            tpot_slo_ms=pick(NUMBERS), priority=pick(INTEGERS),
            reset_conversation=pick((False, True)), no_learn=True,
            **(self._sampling() if self._random.random() < 0.3 else {}))

    def _sampling(self) -> dict[str, object]:
        pick = self._random.choice
        odd = pick(({}, {'min_p': pick(NUMBERS)}, {'repetition_penalty': pick(NUMBERS)},
                    {'frequency_penalty': pick(NUMBERS)}, {'presence_penalty': pick(NUMBERS)},
                    {'top_k': 2**31 - 1}, {'logprobs': 255}, {'n': 0}, {'response_format': 255},
                    {'logit_bias_tokens': [1, 2**31 - 1], 'logit_bias_values': [1.0, math.nan]}))
        return {'top_k': pick((-1, 0, 5)), 'logprobs': pick((0, 3)), 'n': pick((1, 2)),
                'logit_bias_tokens': [5], 'logit_bias_values': [1.0],
                'response_format': pick((0, 0, 1, 2, 3, 4)),
                'response_schema': pick(('', '', '{}', 'a|b', '(', self.text())), **odd}

    def correction(self) -> msg.Correction:
        pick = self._random.choice
        return msg.Correction(
            id=self.id(), query_id=pick(('', self.id(), self._answered.query_id)),
            conversation_id=pick(('', 'a', self.id())), prompt=pick(('', self.text())),
            rejected=pick(('', self.text())), corrected=self.text(),
            profile=pick(('', '\n')), weight=pick(NUMBERS), source=self.text())

    def cancel(self) -> msg.Cancel:
        return msg.Cancel(query_id=self.id())


def test_two_thousand_messages_on_every_input(
        client: MaceClient, inputs: Inputs, tiny_node: NodeProcess) -> None:
    # Learned anew: with tolerance 1, the corrections of other tests may have changed it.
    taught = client.correct('Orange.', prompt='What is your colour?', rejected='Grey.')
    assert taught.wait(timeout_s=ANSWER_S).state == CorrectionStatus.LEARNED
    before = client.ask('What is your colour?', max_tokens=8, no_learn=True).result(ANSWER_S)
    assert set_parameters(client, {'finetune.budget': 0.0}) == [(True, '')]
    fuzzer = Fuzzer(before, 'message')
    with Recorder(client, response=Response, correction_status=CorrectionStatus) as recorder:
        for wave in range(1, 21):      # a wave fits into the depth of the topics
            for _ in range(100):
                inputs.send(fuzzer.query())
                inputs.send(fuzzer.correction())
                inputs.send(fuzzer.cancel())
            expected = 100 * wave
            eventually(lambda n=expected: len(recorder.of(Response)) >= n
                       and len(recorder.of(CorrectionStatus)) >= n, ANSWER_S)
        time.sleep(0.3)
        responses, statuses = recorder.of(Response), recorder.of(CorrectionStatus)
    assert len(responses) == 2000
    assert all(r.error for r in responses if r.finish_reason == Response.REJECTED)
    assert [r.error for r in responses if r.finish_reason == Response.ERROR] == []
    assert sum(r.finish_reason in (Response.STOP, Response.LENGTH) for r in responses) > 10
    assert all(s.reason for s in statuses if s.state == CorrectionStatus.REJECTED)
    assert 'Traceback' not in tiny_node.log
    after = client.ask('What is your colour?', max_tokens=8, no_learn=True).result(ANSWER_S)
    assert after.text == before.text == 'Orange.'

    # No acknowledged correction is lost: with an unknown id, the one sent below is refused.
    accepted = {s.id for s in statuses if s.state == CorrectionStatus.ACCEPTED}
    assert len(accepted) > 5
    # Each is learned or fails: no text stops the learner.
    hurried = {'finetune.budget': 1.0, 'finetune.max_steps': 4, 'finetune.replay_samples': 1}
    assert all(done for done, _ in set_parameters(client, hurried))
    ended = (CorrectionStatus.LEARNED, CorrectionStatus.FAILED)
    with Recorder(client, correction_status=CorrectionStatus) as recorder:
        eventually(lambda: sum(s.state in ended for s in recorder.of(CorrectionStatus)) >= 5,
                   ANSWER_S)
    calm = {name: PARAMETERS[name].default for name in hurried} | {'finetune.budget': 0.0}
    assert all(done for done, _ in set_parameters(client, calm))
    assert 'Traceback' not in tiny_node.log
    for correction_id in accepted:
        again = client.correct('x', correction_id=correction_id, prompt='y', rejected='x')
        eventually(lambda s=again: s.statuses, ANSWER_S)
        assert again.statuses[0].state != CorrectionStatus.REJECTED, again.statuses


def test_goals_and_service_calls_with_any_content_are_answered(
    client: MaceClient, generator: Generator, tiny_node: NodeProcess,
) -> None:
    before = client.ask('What is your colour?', max_tokens=8, no_learn=True).result(ANSWER_S)
    fuzzer, reasons = Fuzzer(before, 'goal'), []
    for _ in range(150):
        query = fuzzer.query()
        goal = generator.send(**{name: getattr(query, name)
                                 for name in query.get_fields_and_field_types()})
        status, response = generator.result(goal)
        good = response.finish_reason in (Response.STOP, Response.LENGTH)
        assert good == (status == GoalStatus.STATUS_SUCCEEDED)
        assert good or (response.finish_reason == Response.REJECTED and response.error)
        reasons.append(response.error)
    assert len(set(reasons)) > 5 and '' in reasons
    for _ in range(50):
        unknown = f'x{fuzzer.id()}'
        rollback = call(client, Rollback, '/mace/rollback', profile=unknown,
                        version=random.Random(unknown).randrange(2**64))
        assert not rollback.success and rollback.message
        listed = call(client, ListVersions, '/mace/list_versions', profile=unknown)
        assert (listed.success and not listed.versions) or listed.message
        trace = call(client, Trace, '/mace/trace', name=f'/{unknown}',
                     iterations=random.Random(unknown).randrange(2**32),
                     seconds=random.Random(unknown).choice(NUMBERS))
        assert not trace.success and trace.message
    assert 'Traceback' not in tiny_node.log
    after = client.ask('What is your colour?', max_tokens=8, no_learn=True).result(ANSWER_S)
    assert after.text == before.text


def test_texts_are_not_in_the_log(client: MaceClient, tiny_node: NodeProcess) -> None:
    secret = 'hush-hush'
    answered = client.ask(f'{secret}?', system=secret, stop=[secret], max_tokens=2)
    answered.result(ANSWER_S)
    for refused in ({'stop': [secret] * 20}, {'text': secret * 9000}, {'temperature': -7.0}):
        response = client.ask(**{'text': secret, 'system': secret, **refused}).result(ANSWER_S)
        assert response.finish_reason == Response.REJECTED
        assert secret not in response.error
    for fields in ({'query_id': answered.id}, {'query_id': answered.id, 'weight': -7.0},
                   {'prompt': secret, 'rejected': secret}, {'prompt': secret * 9000}):
        status = client.correct(secret, **fields).wait(CorrectionStatus.ACCEPTED, ANSWER_S)
        assert secret not in status.reason
    assert 'REJECTED' in tiny_node.log      # the reason is logged
    assert secret not in tiny_node.log


def test_two_hundred_queries_at_once_each_get_a_response(client: MaceClient) -> None:
    service = client.node.create_client(GetParameters, '/mace/get_parameters')
    assert service.wait_for_service(30.0)
    request = GetParameters.Request(names=['slo.ttft_ms'])
    waits = []
    start = time.monotonic()
    answers = []
    while not answers or not all(a.is_complete() for a in answers):
        if len(answers) < 200:
            answers += [client.ask(f'Say {n}.', max_tokens=8, no_learn=True) for n in range(10)]
        asked = time.monotonic()
        resolved(service.call_async(request), ANSWER_S)
        waits.append(time.monotonic() - asked)
        time.sleep(0.02)
        assert time.monotonic() < start + ANSWER_S
    client.node.destroy_client(service)
    responses = [a.result(0.0) for a in answers]
    assert len(responses) == 200
    assert all(r.finish_reason in (Response.STOP, Response.LENGTH) or (
        r.finish_reason == Response.REJECTED and r.error) for r in responses)
    assert len(waits) > 5      # python -m bench.operation measures their duration
