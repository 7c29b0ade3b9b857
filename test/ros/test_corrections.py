# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Corrections of a running node, early and imperfect ones among them; freezing and rollback."""

from __future__ import annotations

from collections.abc import Iterator
import time
from types import SimpleNamespace

import mace_ros.msg as msg
from mace_ros.msg import CorrectionStatus, Response
from mace_ros.srv import ListVersions, Rollback
import pytest
from std_srvs.srv import SetBool
from support.graph import observer, wait_until
from support.records import replayed_and_bad
from support.robot import NO_END
from support.ros_graph import (
    ANSWER_S,
    call,
    DISCOVERY_S,
    eventually,
    NodeProcess,
    PATIENT,
    Recorder,
    set_parameters,
)

from mace_ros.ros.client import MaceClient
from mace_ros.ros.executor_thread import ExecutorThread


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


def test_a_correction_during_its_answer_is_accepted(client: MaceClient) -> None:
    answer = client.ask('Tell me a tale.', max_tokens=3900, **NO_END, **PATIENT)
    next(answer.stream(ANSWER_S))
    correction = client.correct('Once upon a time.', query_id=answer.id)
    received = len(answer.chunks)
    eventually(lambda: len(answer.chunks) > received + 50, ANSWER_S)
    assert not correction.statuses and not answer.is_complete()
    answer.cancel()
    assert correction.wait(CorrectionStatus.ACCEPTED, ANSWER_S).state == CorrectionStatus.ACCEPTED
    assert correction.wait(timeout_s=ANSWER_S).state == CorrectionStatus.LEARNED
    after = client.ask('Tell me a tale.', max_tokens=24).result(ANSWER_S)
    assert after.text == 'Once upon a time.'


def learned(client: MaceClient, corrected: str, prompt: str) -> None:
    status = client.correct(corrected, prompt=prompt).wait(timeout_s=ANSWER_S)
    assert status.state == CorrectionStatus.LEARNED, status


def test_a_thumbs_down_is_a_bad_outcome_and_never_replayed(
        client: MaceClient, tiny_node: NodeProcess) -> None:
    learned(client, 'Never.', 'Is it late today?')
    wrong = client.ask('Is it very late today?').result(ANSWER_S)
    assert wrong.text == 'Never.'       # answered by what was just learned
    assert wait_until(lambda: wrong.query_id in replayed_and_bad(tiny_node.folder)[0], ANSWER_S)
    assert wrong.query_id not in replayed_and_bad(tiny_node.folder)[1]
    status = client.correct(query_id=wrong.query_id).wait(timeout_s=ANSWER_S)
    assert (status.state, status.reason) == (CorrectionStatus.RECORDED, '')
    replayed, bad = replayed_and_bad(tiny_node.folder)
    assert wrong.query_id in bad and wrong.query_id not in replayed


def test_a_hint_is_proposed_and_its_confirmation_changes_the_answer(client: MaceClient) -> None:
    """The node is taught what to answer with the hint, so that it must come to a proposal."""
    question, hint = 'Is it far?', 'Say yes or no.'
    learned(client, 'I am not sure.', question)
    learned(client, 'No.', f'{hint}\n\n{question}')
    wrong = client.ask(question).result(ANSWER_S)
    correction = client.correct(query_id=wrong.query_id, hint=hint)
    status = correction.wait(CorrectionStatus.PROPOSED, ANSWER_S)
    assert (status.state, status.corrected) == (CorrectionStatus.PROPOSED, 'No.'), status
    assert client.ask(question).result(ANSWER_S).text == wrong.text == 'I am not sure.'
    client.correct(status.corrected, correction_id=correction.id, query_id=wrong.query_id)
    assert correction.wait(timeout_s=ANSWER_S).state == CorrectionStatus.LEARNED
    assert client.ask(question).result(ANSWER_S).text == 'No.'
    assert [s.state for s in correction.statuses] == [
        CorrectionStatus.ACCEPTED, CorrectionStatus.PROPOSED, CorrectionStatus.ACCEPTED,
        CorrectionStatus.TRAINING, CorrectionStatus.LEARNED]


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
                      and cancelling.get_subscription_count(), DISCOVERY_S)
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
        eventually(lambda: recorder.of(msg.Scheduler), ANSWER_S)
        running = [query_id for text in LONG_ANSWERS
                   for query_id in ask(text, 1, max_tokens=3900, **NO_END, **PATIENT)]
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
