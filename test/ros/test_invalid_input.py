# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Invalid and abundant input of all kinds is answered, and the node keeps serving."""

from __future__ import annotations

import random
import time

from action_msgs.msg import GoalStatus
from mace_ros.msg import CorrectionStatus, Response
from mace_ros.srv import ListVersions, Rollback, Trace
from rcl_interfaces.srv import GetParameters
from support.fuzzing import bounds, Fuzzer, NUMBERS
from support.robot import RANDOM_MODEL
from support.ros_graph import (
    ANSWER_S,
    call,
    eventually,
    Generator,
    Inputs,
    NodeProcess,
    Recorder,
    resolved,
    set_parameters,
)

from mace_ros.api.settings import PARAMETERS
from mace_ros.learning.acceptance import USED_ID
from mace_ros.ros.client import MaceClient

# Values of this node that are not defaults.
KEPT = {'monitor.rate_hz': 10.0, **RANDOM_MODEL}


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

    # No acknowledged correction is lost: with an unknown id, the one sent below is refused because
    # its text is equal to the rejected answer, and with a known one because it is another.
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
        [status, *_] = again.statuses
        assert status.state != CorrectionStatus.REJECTED or status.reason == USED_ID, status


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
        assert time.monotonic() < start + 2 * ANSWER_S
    client.node.destroy_client(service)
    responses = [a.result(0.0) for a in answers]
    assert len(responses) == 200
    assert all(r.finish_reason in (Response.STOP, Response.LENGTH) or (
        r.finish_reason == Response.REJECTED and r.error) for r in responses)
    assert len(waits) > 5      # python -m bench.operation measures their duration
