# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The node end to end: real processes and a real model, connected by messages only.

The tests share one node, which learns during the file, and is killed and restarted near its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
import math
from pathlib import Path
import shutil
import signal
import time
from types import SimpleNamespace
import uuid

from action_msgs.msg import GoalStatus
import mace_ros.msg as msg
from mace_ros.msg import CorrectionStatus, Response
import pytest
from support.graph import ENVIRONMENT, wait_until
from support.mace import ENDLESS, Mace, OTHERS, PATIENT, START_S
from support.precision import WEIGHT_DTYPE
from support.ros_graph import (
    ANSWER_S,
    eventually,
    Generator,
    NodeProcess,
    Recorder,
    set_parameters,
)

from mace_ros.model.loading import LoadedModel
from mace_ros.ros.client import MaceClient

LEARN_S = 700.0
# At most, of an answer that is being cancelled: far fewer than it would have.
DELAY_CHUNKS = 500

NAME, ROVER = 'What is your name?', 'My name is Rover.'
ORDINARY = ('Why is the sky blue?', 'What do bees eat?')

pytestmark = [pytest.mark.dtype, pytest.mark.timeout(900)]


@pytest.fixture(scope='module')
def mace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mace]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        made = Mace(NodeProcess(tmp_path_factory.mktemp('mace'), **{
            # On a slow CPU, many small learning slices take several times as long.
            'finetune.replay_samples': 4, 'finetune.max_blocking_ms': 200.0}))
        made.start()
        yield made
        made.kill()


# -- answering ---------------------------------------------------------------------------


def test_a_query_sent_during_the_load_is_answered(mace: Mace) -> None:
    assert mace.early.result(ANSWER_S).finish_reason == Response.LENGTH


def test_an_idle_node_uses_almost_no_cpu(mace: Mace) -> None:
    assert mace.serves()

    def share() -> float:
        before, start = mace.node.cpu_seconds(), time.monotonic()
        time.sleep(3.0)
        return (mace.node.cpu_seconds() - before) / (time.monotonic() - start)

    # What follows an answer, such as writes of the journal, ends at some time.
    assert wait_until(lambda: share() < 0.03, 30.0)


def test_two_queries_stream_interleaved(mace: Mace) -> None:
    with Recorder(mace.client, response_chunk=msg.ResponseChunk) as recorder:
        # The endless one still streams when the other begins, however slow the machine is.
        answers = [mace.begin_endless(), mace.client.ask(ENDLESS, max_tokens=80, no_learn=True)]
        answers[1].result(ANSWER_S)
        answers[0].cancel()
        responses = [a.result(ANSWER_S) for a in answers]
        for answer in answers:
            eventually(lambda a=answer: recorder.of(
                msg.ResponseChunk, query_id=a.id, last=True), 30.0)
        order = [m.query_id for m in recorder.messages]
    changes = sum(a != b for a, b in pairwise(order))
    assert changes > 10
    assert [r.finish_reason for r in responses] == [Response.CANCELLED, Response.LENGTH]
    for answer, response in zip(answers, responses, strict=True):
        chunks = recorder.of(msg.ResponseChunk, query_id=answer.id)
        assert [c.index for c in chunks] == list(range(len(chunks)))
        assert [c.last for c in chunks] == [False] * (len(chunks) - 1) + [True]
        assert ''.join(c.text for c in chunks) == response.text
        assert 0 <= response.queue_ms <= response.ttft_ms <= response.e2e_ms
        assert response.tpot_ms > 0


def test_chunks_never_split_a_character(mace: Mace) -> None:
    answer = mace.client.ask(ENDLESS, max_tokens=12, no_learn=True)
    text = answer.result(ANSWER_S).text
    assert set(text) == {'🤖'}
    assert len(answer.chunks) < 12
    assert all('\N{REPLACEMENT CHARACTER}' not in c.text for c in answer.chunks)


def test_cancelling_a_query_leaves_others_running(mace: Mace) -> None:
    answer = mace.begin_endless()
    other = mace.begin_endless()
    received = len(answer.chunks)
    answer.cancel()
    response = answer.result(ANSWER_S)
    assert response.finish_reason == Response.CANCELLED
    assert response.text.startswith('🤖')
    # test_live_parameters.py counts iterations; here, messages add some delay.
    assert len(answer.chunks) <= received + DELAY_CHUNKS
    received = len(other.chunks)
    eventually(lambda: len(other.chunks) > received, ANSWER_S)
    other.cancel()
    assert other.result(ANSWER_S).finish_reason == Response.CANCELLED


def test_a_cancellation_that_overtakes_its_query_is_not_lost(mace: Mace) -> None:
    """Messages of two topics have no order: the query may still be queued."""
    answers = [mace.client.ask(ENDLESS, max_tokens=n, no_learn=True) for n in (*[12] * 5, 2000)]
    answers[-1].cancel()
    assert answers[-1].result(ANSWER_S).finish_reason == Response.CANCELLED
    assert {a.result(ANSWER_S).finish_reason for a in answers[:-1]} == {Response.LENGTH}


def test_a_cancelled_goal_ends_as_canceled(mace: Mace) -> None:
    with Generator(mace.client) as generator:
        goal = generator.send(ENDLESS, max_tokens=2000, no_learn=True, **PATIENT)
        assert wait_until(lambda: generator.chunks, ANSWER_S)
        received = len(generator.chunks)
        goal.cancel_goal_async()
        status, response = generator.result(goal)
    assert (status, response.finish_reason) == (
        GoalStatus.STATUS_CANCELED, Response.CANCELLED)
    assert len(generator.chunks) <= received + DELAY_CHUNKS


def test_a_query_without_an_id_gets_one(mace: Mace) -> None:
    with Recorder(mace.client, response=Response) as recorder:
        mace.inputs.send(msg.Query(text='Hi', max_tokens=1, conversation_id='nameless'))
        [response] = eventually(
            lambda: recorder.of(Response, conversation_id='nameless'), ANSWER_S)
    assert str(uuid.UUID(response.query_id)) == response.query_id


MALFORMED = {
    'empty text': ({'text': ''}, 'EMPTY_TEXT', 'text'),
    'blank text': ({'text': ' \n'}, 'EMPTY_TEXT', 'text'),
    'negative max_tokens': ({'max_tokens': -5}, 'INVALID_PARAMETER', 'max_tokens'),
    'negative temperature': ({'temperature': -0.5}, 'INVALID_PARAMETER', 'temperature'),
    'temperature not a number': ({'temperature': math.nan}, 'INVALID_PARAMETER', 'temperature'),
    'infinite temperature': ({'temperature': math.inf}, 'INVALID_PARAMETER', 'temperature'),
    'top_p above 1': ({'top_p': 1.5}, 'INVALID_PARAMETER', 'top_p'),
    'negative SLO': ({'ttft_slo_ms': -2.0}, 'INVALID_PARAMETER', 'ttft_slo_ms'),
    'empty stop string': ({'stop': ['']}, 'INVALID_PARAMETER', 'stop'),
    'too much text': ({'text': 'a' * 70000}, 'INVALID_PARAMETER', 'text'),
    'prompt longer than the context': ({'text': 'a b ' * 8000}, 'PROMPT_TOO_LONG', 'tokens'),
    'id not printable': ({'query_id': 'a\nb'}, 'INVALID_ID', 'id'),
    'id too long': ({'query_id': 'i' * 200}, 'INVALID_ID', 'id'),
    'profile not printable': ({'profile': '\x01'}, 'INVALID_ID', 'profile'),
}


@pytest.mark.parametrize('case', MALFORMED)
def test_a_malformed_query_is_rejected_with_a_reason(mace: Mace, case: str) -> None:
    given, code, reason = MALFORMED[case]
    answer = mace.client.ask(**{'text': 'Hi', **given})
    response = answer.result(ANSWER_S)
    assert response.finish_reason == Response.REJECTED
    assert response.error_code == getattr(Response, code)
    assert reason in response.error
    assert answer.chunks == []
    assert response.text == ''


@pytest.mark.parametrize('kind', ['query', 'correction'])
def test_an_id_can_not_forge_a_line_of_the_log(mace: Mace, kind: str) -> None:
    forged = f'[FATAL] forged by a {kind}'
    given = f'id\n{forged}\x1b[2J' + 'x' * 10_000
    time.sleep(2.0)     # the log is throttled to one rejection per second
    if kind == 'query':
        assert mace.ask('Hi', query_id=given).finish_reason == Response.REJECTED
    else:
        learning = mace.client.correct('Ho.', correction_id=given, prompt='Hi')
        assert learning.wait(timeout_s=ANSWER_S).state == CorrectionStatus.REJECTED
    assert wait_until(lambda: forged in mace.node.log, 30.0)
    [line] = [line for line in mace.node.log.splitlines() if forged in line]
    assert f"{kind} 'id\\n{forged}\\x1b" in line
    assert len(line) < 1000


def test_a_duplicate_id_is_rejected_and_the_running_query_continues(mace: Mace) -> None:
    answer = mace.begin_endless()
    with Recorder(mace.client, response=Response) as recorder:
        mace.inputs.send(msg.Query(id=answer.id, text='Hi'))
        [rejected] = eventually(
            lambda: recorder.of(Response, query_id=answer.id), ANSWER_S)
    assert rejected.error_code == Response.DUPLICATE_ID
    assert not answer.is_complete()
    answer.cancel()
    assert answer.result(ANSWER_S).finish_reason == Response.CANCELLED


def test_a_duplicate_id_does_not_receive_the_running_query_s_answer(mace: Mace) -> None:
    answer = mace.begin_endless()
    next_one = len(answer.chunks)
    with MaceClient() as other:
        other.wait_until_ready(60.0)
        mine = other.ask('What is 2 + 2?', query_id=answer.id, max_tokens=5)
        assert mine.result(ANSWER_S).error_code == Response.DUPLICATE_ID
        assert not mine.chunks
    assert wait_until(lambda: len(answer.chunks) > next_one, ANSWER_S)
    answer.cancel()
    assert answer.result(ANSWER_S).finish_reason == Response.CANCELLED


def test_every_query_of_a_burst_is_answered_or_rejected(mace: Mace) -> None:
    limit = 30
    mace.set('scheduler.max_queue', limit)
    answers = [mace.client.ask(f'Say {n}.', max_tokens=1, no_learn=True) for n in range(200)]
    responses = [a.result(ANSWER_S) for a in answers]
    mace.set('scheduler.max_queue', 1000)
    served = [r for r in responses if r.finish_reason == Response.LENGTH]
    rejected = [r for r in responses if r.finish_reason == Response.REJECTED]
    assert len(served) + len(rejected) == 200
    assert len(served) >= limit
    assert all(r.error_code == Response.OVERLOADED and str(limit) in r.error for r in rejected)


# -- parameters --------------------------------------------------------------------------


def test_a_parameter_changes_while_serving(mace: Mace) -> None:
    mace.set('generation.max_tokens', 3)
    assert mace.ask('Count to ten.', no_learn=True).output_tokens == 3
    mace.set('generation.max_tokens', 128)


@pytest.mark.parametrize(('name', 'value', 'reason'), [
    ('generation.max_tokens', 0, 'generation.max_tokens'),
    ('scheduler.policy', 'best', 'mace, inference_only'),
    ('slo.ttft_ms', 5, 'type'),
    ('adapter.rank', 4, 'read-only'),
    ('no.such.parameter', 1, 'undeclared'),
])
def test_an_invalid_parameter_change_is_refused_with_a_reason(
    mace: Mace, name: str, value: object, reason: str,
) -> None:
    [(successful, said)] = set_parameters(mace.client, {name: value})
    assert not successful
    assert reason in said


# -- learning ----------------------------------------------------------------------------


@pytest.fixture(scope='module')
def answered(mace: Mace) -> Response:
    """Return the response to a query that may be corrected."""
    return mace.ask('What is the opposite of hot?', max_tokens=6, conversation_id='opposites')


MALFORMED_CORRECTIONS = {
    'unknown query_id': ({'query_id': 'unknown'}, 'unknown'),
    'unknown conversation_id': ({'conversation_id': 'nowhere'}, 'nowhere'),
    'without a prompt': ({'query_id': ''}, 'query_id, conversation_id or prompt'),
    'equal to the answer': ({'corrected': None}, 'equal'),
    'equal to rejected': ({'rejected': 'Warm.', 'corrected': ' Warm. '}, 'equal'),
    'too long to learn': ({'corrected': 'cold ' * 600}, 'finetune.max_sample_tokens'),
    'weight 0': ({'weight': 0.0}, 'weight'),
    'weight not a number': ({'weight': math.nan}, 'weight'),
    'id too long': ({'correction_id': 'i' * 200}, 'id'),
}


@pytest.mark.parametrize('case', MALFORMED_CORRECTIONS)
def test_a_malformed_correction_is_rejected_with_a_reason(
    mace: Mace, answered: Response, case: str,
) -> None:
    given, reason = MALFORMED_CORRECTIONS[case]
    given = {'corrected': 'Cold.', 'query_id': answered.query_id, **given}
    if given['corrected'] is None:
        given['corrected'] = answered.text
    if 'conversation_id' in given:
        del given['query_id']
    status = mace.client.correct(**given).wait(timeout_s=ANSWER_S)
    assert status.state == CorrectionStatus.REJECTED
    assert reason in status.reason


@pytest.fixture(scope='module')
def lesson(mace: Mace) -> SimpleNamespace:
    """Return the messages around a correction that is learned beside a running query."""
    seen = SimpleNamespace()
    seen.first = mace.client.wait_until_ready(30.0)
    seen.others = {q: mace.ask(q, max_tokens=16, no_learn=True).text for q in OTHERS}
    seen.wrong = mace.ask(NAME, max_tokens=10)
    mace.set('slo.freshness_s', 1.0)          # otherwise learning would wait for the query
    mace.set('finetune.min_share', 0.9)
    learning = mace.client.correct(ROVER, query_id=seen.wrong.query_id)
    # The anchors come first, and would take several times as long beside a query.
    assert learning.wait(CorrectionStatus.TRAINING, LEARN_S).state == CorrectionStatus.TRAINING
    running = mace.begin_endless()
    end = time.monotonic() + LEARN_S
    while not learning.is_final() and time.monotonic() < end:
        if running.is_complete():       # the answer ended after all
            running = mace.begin_endless()
        time.sleep(0.01)
    seen.learned = learning.wait(timeout_s=0.0)
    seen.states = [s.state for s in learning.statuses]
    seen.version = mace.client.wait_for_version(seen.learned.adapter_version, timeout_s=30.0)
    seen.was_running = not running.is_complete()
    running.cancel()
    seen.running = running.result(ANSWER_S)
    mace.set('slo.freshness_s', 120.0)
    mace.set('finetune.min_share', 0.1)
    seen.right = mace.ask(NAME, max_tokens=24)
    return seen


def test_a_correction_is_learned(lesson: SimpleNamespace) -> None:
    assert ROVER not in lesson.wrong.text
    assert lesson.states == [
        CorrectionStatus.ACCEPTED, CorrectionStatus.TRAINING, CorrectionStatus.LEARNED]
    assert lesson.right.text == ROVER
    assert lesson.right.adapter_version == lesson.learned.adapter_version > lesson.first.version


def test_the_new_version_is_announced(lesson: SimpleNamespace) -> None:
    version = lesson.version
    assert version.state == msg.AdapterVersion.PUBLISHED
    assert (version.profile, version.parent) == ('', lesson.wrong.adapter_version)
    assert version.correction_ids == [lesson.learned.id]
    assert version.score_after > version.score_before
    assert version.train_tokens > 0
    assert version.train_seconds > 0
    assert len(version.sha256) == 64


def test_a_running_query_keeps_its_version(lesson: SimpleNamespace) -> None:
    assert lesson.was_running
    assert lesson.running.finish_reason == Response.CANCELLED
    assert lesson.running.adapter_version == lesson.wrong.adapter_version


def test_other_answers_are_unchanged(mace: Mace, lesson: SimpleNamespace) -> None:
    for question, text in lesson.others.items():
        assert mace.ask(question, max_tokens=16, no_learn=True).text == text


def test_a_correction_sent_twice_is_learned_once(mace: Mace, lesson: SimpleNamespace) -> None:
    again = mace.client.correct(
        ROVER, correction_id=lesson.learned.id, query_id=lesson.wrong.query_id)
    status = again.wait(timeout_s=ANSWER_S)
    assert (status.state, status.adapter_version) == (
        CorrectionStatus.LEARNED, lesson.learned.adapter_version)
    assert mace.ask(NAME, max_tokens=2).adapter_version == lesson.learned.adapter_version


def test_a_late_subscriber_receives_the_live_version(mace: Mace, lesson: SimpleNamespace) -> None:
    with MaceClient() as late:
        # The history of the topic may deliver earlier versions first.
        late.wait_until_ready(60.0)
        assert late.wait_for_version(lesson.version.version, timeout_s=60.0) == lesson.version


def test_peft_gives_the_same_answers(
        mace: Mace, lesson: SimpleNamespace, base_model: LoadedModel, tmp_path: Path) -> None:
    """
    Long answers too, in float32: int8 changes the weights.

    Questions out of scope are answered without the adapter, also under adapter.scope everywhere: it
    was not trained for them.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    exact, name = mace, base_model.name
    if WEIGHT_DTYPE != 'float32':
        shutil.copytree(mace.node.folder / 'storage', tmp_path / 'storage')
        exact = Mace(NodeProcess(
            tmp_path, namespace='/exact', **{'model.weight_dtype': 'float32'}))
        exact.ask_early()
    try:
        # While the node loads, PEFT answers.
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(name), lesson.version.path)
        version, others = lesson.version.version, (*OTHERS, *ORDINARY)
        right = {}
        for question in (NAME, *others):
            prompt = tokenizer.apply_chat_template(
                [{'role': 'user', 'content': question}], add_generation_prompt=True,
                return_tensors='pt', return_dict=True)
            in_scope = question == NAME
            with nullcontext() if in_scope else model.disable_adapter():
                output = model.generate(**prompt, do_sample=False, max_new_tokens=24)
            right[question] = tokenizer.decode(
                output[0, prompt['input_ids'].shape[1]:],
                skip_special_tokens=True), version * in_scope
        exact.client.wait_until_ready(START_S)
        for scope in ('similar', 'everywhere'):
            assert set_parameters(
                exact.client, {'adapter.scope': scope}, node=exact.node.name) == [(True, '')]
            answers = {question: exact.client.ask(question, max_tokens=24, no_learn=True)
                       for question in right}
            for question, answer in answers.items():
                response = answer.result(ANSWER_S)
                assert (response.text, response.adapter_version) == right[question]
        assert set_parameters(
            exact.client, {'adapter.scope': 'similar'}, node=exact.node.name) == [(True, '')]
    finally:
        if exact is not mace:
            exact.kill()


# -- ending ------------------------------------------------------------------------------


def test_a_killed_node_resumes_after_a_restart(mace: Mace, lesson: SimpleNamespace) -> None:
    mace.set('finetune.budget', 0.0)
    before = mace.client.version()
    wrong = mace.ask('What is your favourite colour?', max_tokens=4)
    waiting = mace.client.correct('Orange.', query_id=wrong.query_id)
    assert waiting.wait(CorrectionStatus.ACCEPTED, ANSWER_S).state == CorrectionStatus.ACCEPTED
    with MaceClient() as watching:
        watching.wait_until_ready(30.0)
        lost = watching.ask(ENDLESS, max_tokens=2000, no_learn=True, **PATIENT)
        next(lost.stream(ANSWER_S))
        mace.kill()

        mace.start()
        with pytest.raises(ConnectionError, match=f'query {lost.id}: /mace has disappeared'):
            lost.result(30.0)
    served = mace.client.wait_until_ready(30.0)
    assert (served.version, served.sha256) == (before.version, before.sha256)
    after = mace.client.wait_for_version(before.version + 1, timeout_s=LEARN_S)
    while waiting.id not in after.correction_ids:
        after = mace.client.wait_for_version(after.version + 1, timeout_s=LEARN_S)
    right = mace.ask('What is your favourite colour?', max_tokens=8)
    assert (right.text, right.adapter_version) == ('Orange.', after.version)


def test_earlier_corrections_stay_learned_after_a_kill(mace: Mace, lesson: SimpleNamespace) -> None:
    assert mace.client.version().version > lesson.version.version
    assert mace.ask(NAME, max_tokens=24, no_learn=True).text == ROVER


def test_a_signal_cancels_running_queries(mace: Mace) -> None:
    """The last test, since it ends the node."""
    # After learning, an answer may end: sampled ones are long enough that some still run.
    answers = [mace.client.ask(f'{text} 🤖', max_tokens=2000, no_learn=True, temperature=1.0,
                               seed=seed, **PATIENT)
               for seed, text in enumerate(('Tell me a long story.', 'Write a long letter.') * 2)]
    for answer in answers:
        next(answer.stream(ANSWER_S))
    mace.node.send(signal.SIGINT)
    time.sleep(0.05)
    mace.node.send(signal.SIGINT)    # a second one, as launch sends it
    ends = [answer.result(30.0).finish_reason for answer in answers]
    assert Response.CANCELLED in ends and not {Response.REJECTED, Response.ERROR} & {*ends}
    assert mace.node.wait(60.0) == 0
    assert 'Traceback' not in mace.node.log
    assert '🤖' not in mace.node.log     # texts of queries and answers are private
