# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""OpenAI's own client and LangChain's, against a server and a node in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import reduce
from http.client import HTTPConnection
import json
from operator import add
from pathlib import Path
import runpy
from typing import Literal

from hypothesis import given, HealthCheck, settings
import jsonschema
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from mace_ros.msg import CorrectionStatus
from openai import BadRequestError, NotFoundError, OpenAI
from pydantic import BaseModel, Field
import pytest
from support.graph import wait_until
from support.openai_server import served_node, ServerProcess
from support.records import replayed_and_bad
from support.ros_graph import ROOT

from bench.operation.fuzzed_bodies import by_hand, requests
from mace_ros.ros.client import MaceClient

MOVE = {'type': 'function', 'function': {
    'name': 'move', 'description': 'Moves to a place.', 'parameters': {
        'type': 'object', 'properties': {'to': {'type': 'string'}}, 'required': ['to']}}}
CALL = '<tool_call>\n{"name": "move", "arguments": {"to": "dock"}}\n</tool_call>'


@pytest.fixture(scope='module')
def server(tmp_path_factory: pytest.TempPathFactory,
           model_folder: Path) -> Iterator[ServerProcess]:
    """Yield a server of a node whose tiny model has tools in its template."""
    with served_node(tmp_path_factory.mktemp('openai'), model_folder) as made:
        yield made


@pytest.fixture(scope='module')
def client(server: ServerProcess) -> OpenAI:
    return OpenAI(base_url=server.url, api_key='none', max_retries=0, timeout=100.0)


def messages(*texts: str) -> list[dict[str, str]]:
    return [{'role': ('user', 'assistant')[i % 2], 'content': text}
            for i, text in enumerate(texts)]


def text_of(stream: object) -> str:
    return ''.join(chunk.choices[0].delta.content or '' for chunk in stream if chunk.choices)


def ask(client: OpenAI, *texts: str, **options: object) -> object:
    return client.chat.completions.create(
        model='mace', messages=messages(*texts),
        **{'temperature': 0.0, 'max_tokens': 12, **options})


def teach(server: ServerProcess, completion_id: str, corrected: str) -> None:
    taught = server.feedback(id=completion_id, corrected=corrected)
    status = server.status(taught, 'learned', 'failed')
    assert status['status'] == 'learned', status


def test_a_chat_is_answered_as_by_the_topics(client: OpenAI) -> None:
    reply = ask(client, 'Who are you?')
    with MaceClient() as mace:
        mace.wait_until_ready(30.0)
        answer = mace.ask('Who are you?', temperature=0.0, max_tokens=12).result(60.0)
    [choice] = reply.choices
    assert choice.message.content == answer.text
    assert choice.finish_reason in ('stop', 'length')
    assert reply.usage.prompt_tokens == answer.prompt_tokens
    assert reply.usage.completion_tokens == answer.output_tokens
    assert reply.model_extra['mace_ros']['adapter_version'] == answer.adapter_version
    assert reply.id.startswith('chatcmpl-') and reply.object == 'chat.completion'


def test_a_stream_has_the_same_text_and_the_usage(client: OpenAI) -> None:
    whole = ask(client, 'Who are you?', 'A robot.', 'What can you do?')
    chunks = list(ask(client, 'Who are you?', 'A robot.', 'What can you do?', stream=True,
                      stream_options={'include_usage': True}))
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == 'assistant'
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-2].model_extra['mace_ros']['adapter_version'] == (
        whole.model_extra['mace_ros']['adapter_version'])


def test_null_is_the_default_of_a_field(client: OpenAI) -> None:
    nulls = {'stream': None, 'parallel_tool_calls': None}
    assert ask(client, 'Hi.', extra_body=nulls).object == 'chat.completion'
    chunks = ask(client, 'Hi.', stream=True, stream_options={'include_usage': None})
    assert all(chunk.choices for chunk in chunks)


def test_all_tokens_are_sampled_from_with_the_top_k_of_vllms_clients(client: OpenAI) -> None:
    replies = [ask(client, 'Hi.', temperature=1.0, seed=7, extra_body={'top_k': top_k})
               for top_k in (-1, 0)]
    first, second = (reply.choices[0].message.content for reply in replies)
    assert first == second != ''


def test_eight_streams_at_once_give_the_answers_of_single_ones(client: OpenAI) -> None:
    questions = [f'What is {i} times {i}?' for i in range(8)]
    single = [ask(client, question).choices[0].message.content for question in questions]
    with ThreadPoolExecutor(8) as threads:
        streamed = list(threads.map(
            lambda question: text_of(ask(client, question, stream=True)), questions))
    assert streamed == single


def test_a_seed_and_a_stop_string_are_obeyed(client: OpenAI) -> None:
    texts = [ask(client, 'Sing.', temperature=1.0, seed=seed).choices[0].message.content
             for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]
    stop = texts[0][2:4]
    stopped = ask(client, 'Sing.', temperature=1.0, seed=7, stop=[stop]).choices[0]
    assert stopped.message.content == texts[0].partition(stop)[0]
    assert stopped.finish_reason == 'stop'


def test_logprobs_are_those_of_the_tokens(client: OpenAI) -> None:
    whole = ask(client, 'Who are you?', logprobs=True, top_logprobs=2).choices[0]
    positions = whole.logprobs.content
    assert len(positions) >= len(whole.message.content.split())
    assert ''.join(bytes(p.bytes or ()).decode(errors='replace') for p in positions).startswith(
        whole.message.content[:4])
    for position in positions:
        assert [t.logprob for t in position.top_logprobs] == sorted(
            (t.logprob for t in position.top_logprobs), reverse=True)
        assert position.logprob == position.top_logprobs[0].logprob <= 0.0     # greedy
    streamed = [position for chunk in ask(
        client, 'Who are you?', logprobs=True, top_logprobs=2, stream=True)
        if chunk.choices[0].logprobs for position in chunk.choices[0].logprobs.content]
    assert [p.token for p in streamed] == [p.token for p in positions]


def test_two_answers_differ_and_are_streamed_apart(client: OpenAI) -> None:
    options = {'n': 2, 'temperature': 1.0, 'seed': 5}
    reply = ask(client, 'Sing.', **options)
    texts = [choice.message.content for choice in reply.choices]
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert texts[0] == ask(client, 'Sing.', temperature=1.0, seed=5).choices[0].message.content
    assert texts[0] != texts[1]
    streamed, ends = ['', ''], []
    for chunk in ask(client, 'Sing.', stream=True, **options):
        [choice] = chunk.choices
        streamed[choice.index] += choice.delta.content or ''
        ends += [choice.index] if choice.finish_reason else []
    assert (streamed, sorted(ends)) == (texts, [0, 1])
    assert reply.usage.completion_tokens > len(texts)


END_TOKENS = ('0', '2')     # of the model, as logit_bias names them
PLAN = {'type': 'object', 'additionalProperties': False, 'required': ['steps', 'mood'],
        'properties': {
            'mood': {'enum': ['calm', 'hasty']},
            'steps': {'type': 'array', 'minItems': 1, 'maxItems': 3, 'items': {
                'type': 'object', 'additionalProperties': False, 'required': ['go', 'speed'],
                'properties': {
                    'go': {'type': 'array', 'maxItems': 2, 'items': {'enum': ['dock', 'home']}},
                    'speed': {'type': 'integer', 'minimum': 0, 'maximum': 9}}}}}}


def test_fifty_of_fifty_answers_are_json_of_the_schema(client: OpenAI) -> None:
    def answer(number: int) -> object:
        choice = ask(client, f'Plan {number}.', temperature=1.0, max_tokens=300, seed=number,
                     response_format={'type': 'json_schema', 'json_schema': {
                         'name': 'plan', 'strict': True, 'schema': PLAN}}).choices[0]
        assert choice.finish_reason == 'stop'
        return json.loads(choice.message.content)

    with ThreadPoolExecutor(8) as threads:
        plans = list(threads.map(answer, range(50)))
    for plan in plans:
        jsonschema.validate(plan, PLAN)
    assert len({json.dumps(plan) for plan in plans}) > 10


def test_an_invalid_schema_is_refused(client: OpenAI) -> None:
    for wanted in ({'type': 'json_schema', 'json_schema': {
                        'name': 'a', 'schema': {'type': 'nothing'}}},
                   {'type': 'regex', 'regex': '('},
                   {'type': 'grammar', 'grammar': 'start: nothing'}):
        with pytest.raises(BadRequestError) as refused:
            ask(client, 'Hi.', response_format=wanted)
        assert (refused.value.code, refused.value.param) == (
            'invalid_parameter', 'response_format')
        assert 'response_format: ' in refused.value.message
    assert json.loads(ask(client, 'Hi.', response_format={
        'type': 'grammar', 'grammar': 'start: "[1, 2]"'}).choices[0].message.content) == [1, 2]


def test_a_client_that_disconnects_cancels_its_answer(
        client: OpenAI, server: ServerProcess) -> None:
    name = 'mace_queries_total{finish_reason="cancelled"}'
    before = server.metric(name)
    endless = {'max_tokens': 3900, 'logit_bias': dict.fromkeys(END_TOKENS, -100)}
    stream = ask(client, 'Sing.', stream=True, **endless)
    next(iter(stream))
    stream.close()
    assert wait_until(lambda: server.metric(name) == before + 1, 60.0)
    # Also without a stream, whose client has seen no token.
    assert wait_until(lambda: server.metric('mace_scheduler_decode_rows') == 0, 60.0)
    with closing(HTTPConnection('127.0.0.1', server.port, timeout=60.0)) as connection:
        connection.request('POST', '/v1/chat/completions', json.dumps({
            'model': 'mace', 'messages': messages('Sing.'), **endless}))
        assert wait_until(lambda: server.metric('mace_scheduler_decode_rows') > 0, 60.0)
    assert wait_until(lambda: server.metric(name) == before + 2, 60.0)


def test_a_raw_prompt_is_continued(client: OpenAI) -> None:
    prompt = '<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n'
    whole = client.completions.create(
        model='mace', prompt=prompt, temperature=0.0, max_tokens=12)
    streamed = client.completions.create(
        model='mace', prompt=[prompt], temperature=0.0, max_tokens=12, stream=True)
    assert ''.join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text
    assert whole.id.startswith('cmpl-')


def test_models_are_the_robot_and_its_profiles(client: OpenAI, server: ServerProcess) -> None:
    assert 'mace' in [model.id for model in client.models.list()]
    assert client.models.retrieve('mace:ann').id == 'mace:ann'
    for call in (lambda: client.models.retrieve('gpt-4o'), lambda: client.chat.completions.create(
            model='mace:', messages=messages('Hi.'))):
        with pytest.raises(NotFoundError) as refused:
            call()
        assert refused.value.code == 'model_not_found'


def test_the_nodes_refusals_have_status_codes(client: OpenAI) -> None:
    for options, code in (
            ({'stop': ['x' * 300]}, 'invalid_parameter'), ({'temperature': 4.0}, None),
            ({'tools': [MOVE], 'tool_choice': 'fly'}, 'invalid_parameter'),
            ({'logit_bias': {'99999999': 1}}, 'invalid_parameter'),
            ({'messages': [{'role': 'tool', 'content': 'x', 'tool_call_id': 'a'}]},
             'invalid_parameter')):
        for stream in (False, True):
            if code is None:
                assert ask(client, 'Hi.', stream=stream, **options)
                continue
            with pytest.raises(BadRequestError) as refused:
                client.chat.completions.create(
                    **{'model': 'mace', 'messages': messages('Hi.'), **options}, stream=stream)
            assert (refused.value.code, refused.value.param) == (code, next(reversed(options)))
    with pytest.raises(BadRequestError) as refused:
        ask(client, 'Hi. ' * 5000)
    assert refused.value.code == 'context_length_exceeded'
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(model='mace', prompt='')
    assert (refused.value.code, refused.value.param) == ('empty_text', 'prompt')


def test_feedback_changes_the_next_answer(client: OpenAI, server: ServerProcess) -> None:
    question = 'Which colour has the gate?'
    wrong = ask(client, question)
    status, feedback, _ = server.request(
        'POST', '/v1/feedback', {'id': wrong.id, 'corrected': 'Orange.'})
    # A reply waits for a second for the first status; a later one may have followed.
    assert (status, feedback['status']) in (
        (200, 'accepted'), (200, 'training'), (200, 'learned'), (202, 'waiting'))
    assert feedback['completion_id'] == wrong.id
    assert server.status(feedback['id'], 'learned', 'failed')['status'] == 'learned'
    again = ask(client, question)
    assert again.choices[0].message.content == 'Orange.'
    assert again.model_extra['mace_ros']['matched_correction_id'] == feedback['id']
    with MaceClient() as mace:
        mace.wait_until_ready(30.0)
        mace.correct(correction_id='of-ros', query_id=wrong.id).wait(
            CorrectionStatus.RECORDED, 60.0)
    for body, status, param in (
            ({'id': 'chatcmpl-unknown', 'corrected': 'Red.'}, 404, 'id'),
            ({'id': wrong.id, 'corrected': 'Red.', 'feedback_id': 'of-ros'}, 409, 'feedback_id'),
            ({'id': wrong.id}, 400, 'corrected'),
            ({'id': wrong.id, 'corrected': 'Red.', 'rating': 'down'}, 400, 'corrected')):
        def refused(body: object = body, status: int = status, param: str = param) -> bool:
            got, reply, _ = server.request('POST', '/v1/feedback', body)
            return got == status and reply['error']['param'] == param

        # Of a slow node the refusal comes after the reply, a 202.
        assert wait_until(refused, 60.0)


def test_a_thumbs_down_is_a_bad_outcome_and_never_replayed(
        client: OpenAI, server: ServerProcess) -> None:
    teach(server, ask(client, 'Is it late today?').id, 'Never.')
    wrong = ask(client, 'Is it very late today?')       # answered by what was just learned
    assert wrong.choices[0].message.content == 'Never.'
    assert wait_until(lambda: wrong.id in replayed_and_bad(server.folder)[0], 60.0)
    assert wrong.id not in replayed_and_bad(server.folder)[1]
    down = server.feedback(id=wrong.id, rating='down')
    assert server.status(down, 'recorded', 'failed')['status'] == 'recorded'
    replayed, bad = replayed_and_bad(server.folder)
    assert wrong.id in bad and wrong.id not in replayed


def test_a_hint_is_proposed_and_its_confirmation_changes_the_answer(
        client: OpenAI, server: ServerProcess) -> None:
    """The node is taught what to answer with the hint, so that it must come to a proposal."""
    question, hint = 'Is it far?', 'Say yes or no.'
    for asked, text in ((question, 'I am not sure.'), (f'{hint}\n\n{question}', 'No.')):
        teach(server, ask(client, asked).id, text)
    wrong = ask(client, question)
    given = server.feedback(id=wrong.id, hint=hint)
    proposal = server.status(given, 'proposed', 'failed')
    assert (proposal['status'], proposal['corrected']) == ('proposed', 'No.')
    before = ask(client, question).choices[0].message.content
    assert before == wrong.choices[0].message.content == 'I am not sure.'
    assert server.feedback(id=given, corrected=proposal['corrected']) == given     # confirms it
    assert server.status(given, 'learned', 'failed')['status'] == 'learned'
    assert ask(client, question).choices[0].message.content == 'No.'


def test_a_tool_call_and_its_result(client: OpenAI, server: ServerProcess) -> None:
    question = 'Drive to the dock.'
    wrong = ask(client, question, tools=[MOVE])
    teach(server, wrong.id, CALL)
    reply = ask(client, question, tools=[MOVE], max_tokens=40).choices[0]
    [call] = reply.message.tool_calls
    assert (reply.finish_reason, reply.message.content) == ('tool_calls', None)
    assert (call.function.name, json.loads(call.function.arguments)) == ('move', {'to': 'dock'})
    chunks = list(ask(client, question, tools=[MOVE], max_tokens=40, stream=True))
    assert text_of(chunks) == ''
    [streamed] = [c.choices[0].delta.tool_calls for c in chunks if c.choices[0].delta.tool_calls]
    assert (streamed[0].function.name, streamed[0].function.arguments) == (
        call.function.name, call.function.arguments)
    assert chunks[-1].choices[0].finish_reason == 'tool_calls'
    after = client.chat.completions.create(
        model='mace', max_tokens=8, tools=[MOVE], messages=[
            *messages(question), reply.message.to_dict(),
            {'role': 'tool', 'tool_call_id': call.id, 'content': 'Arrived.'}])
    assert after.choices[0].finish_reason in ('stop', 'length')


def test_a_call_can_be_demanded(client: OpenAI) -> None:
    stop = {'type': 'function', 'function': {'name': 'stop', 'parameters': {
        'type': 'object', 'properties': {'in_s': {'enum': [1, 2]}}, 'required': ['in_s'],
        'additionalProperties': False}}}
    for choice in ('required', {'type': 'function', 'function': {'name': 'stop'}}):
        for stream in (False, True):
            reply = ask(client, 'Sing.', tools=[stop], tool_choice=choice, stream=stream,
                        temperature=1.0, max_tokens=60)
            calls = [call for chunk in reply for call in chunk.choices[0].delta.tool_calls or []
                     ] if stream else reply.choices[0].message.tool_calls
            [call] = calls
            assert call.function.name == 'stop'
            assert json.loads(call.function.arguments)['in_s'] in (1, 2)
    none = ask(client, 'Sing.', tools=[stop], tool_choice='none')
    assert none.choices[0].message.tool_calls is None
    with pytest.raises(BadRequestError) as refused:
        ask(client, 'Sing.', tool_choice='required', tools=[{'type': 'function', 'function': {
            'name': 'a', 'parameters': {'type': 'nothing'}}}])
    assert refused.value.param == 'tools'


class Plan(BaseModel):
    """What to do next."""

    go: Literal['dock', 'home']
    speeds: list[Literal[1, 2, 3]] = Field(max_length=2)


@pytest.mark.parametrize('method', ['json_schema', 'function_calling'])
def test_langchain_gets_structured_output(server: ServerProcess, method: str) -> None:
    llm = ChatOpenAI(base_url=server.url, api_key='none', model='mace', temperature=1.0,
                     max_tokens=100, seed=4)
    plan = llm.with_structured_output(Plan, method=method).invoke('Where to?')
    assert isinstance(plan, Plan)


@tool
def move(to: str) -> str:
    """Moves to a place."""
    return f'arrived at the {to}'


def test_langchain_binds_tools(client: OpenAI, server: ServerProcess) -> None:
    llm = ChatOpenAI(base_url=server.url, api_key='none', model='mace', temperature=0.0,
                     max_tokens=40)
    bound = llm.bind_tools([move])
    question = HumanMessage('Bring it to the dock.')
    wrong = bound.invoke([question])
    teach(server, wrong.response_metadata['id'], CALL)
    called = bound.invoke([question])
    [call] = called.tool_calls
    assert (call['name'], call['args']) == ('move', {'to': 'dock'})
    result = move.invoke(call)
    assert isinstance(result, ToolMessage) and result.content == 'arrived at the dock'
    assert bound.invoke([question, called, result]).response_metadata['finish_reason']
    assert ''.join(chunk.content for chunk in llm.stream('Who are you?'))


def test_a_turn_of_rosas_agent_uses_a_tool(client: OpenAI, server: ServerProcess) -> None:
    """
    The LangChain calls of ROSA 1.0.10, whose own code runs in ``test_agents.py``.

    ``create_tool_calling_agent`` makes this chain, and ``AgentExecutor`` this loop; ROSA streams.
    """
    llm = ChatOpenAI(base_url=server.url, api_key='none', model='mace', temperature=0.0,
                     max_tokens=40).with_config({'streaming': True})
    agent = ChatPromptTemplate.from_messages([
        ('system', 'You are ROSA.'), MessagesPlaceholder('chat_history'), ('user', '{input}'),
        MessagesPlaceholder('agent_scratchpad')]) | llm.bind_tools([move])

    def asked(steps: list[BaseMessage]) -> dict[str, object]:
        return {'input': 'Go to the dock now.', 'agent_scratchpad': steps,
                'chat_history': [HumanMessage('Hello.'), AIMessage('Hello, I am ROSA.')]}

    def turn() -> list[BaseMessage]:
        steps: list[BaseMessage] = []
        for _ in range(3):
            reply = reduce(add, agent.stream(asked(steps)))
            steps.append(reply)
            for call in reply.tool_calls:
                result = move.invoke(call)
                steps.append(ToolMessage(json.dumps(result.content), tool_call_id=call['id'],
                                         additional_kwargs={'name': call['name']}))
            if not reply.tool_calls:
                break
        return steps

    wrong = agent.invoke(asked([]))     # LangChain gives the id of an answer that is not streamed
    assert [step.content for step in turn()] == [wrong.content]
    teach(server, wrong.response_metadata['id'], CALL)
    called, result, *_, last = turn()
    assert [(c['name'], c['args']) for c in called.tool_calls] == [('move', {'to': 'dock'})]
    assert result.content == '"arrived at the dock"'
    assert last.response_metadata['finish_reason'] in ('stop', 'length', 'tool_calls')


def test_the_agent_of_the_examples_calls_the_robots_functions(
        client: OpenAI, server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    agent = runpy.run_path(str(ROOT / 'examples' / 'langchain_agent.py'))
    llm = ChatOpenAI(base_url=server.url, api_key='none', model='mace', temperature=0.0,
                     max_tokens=60)
    question = 'How full is the battery?'
    wrong = llm.bind_tools(list(agent['TOOLS'].values())).invoke([HumanMessage(question)])
    teach(server, wrong.response_metadata['id'],
          '<tool_call>\n{"name": "battery", "arguments": {}}\n</tool_call>')
    assert agent['answer'](llm, question)
    assert 'battery({}) -> 71' in capsys.readouterr().out


def test_a_web_page_can_neither_ask_nor_teach_without_a_key(server: ServerProcess) -> None:
    for path, body in (('/v1/feedback', {'id': 'x', 'corrected': 'Wrong.'}),
                       ('/v1/chat/completions', {'model': 'mace', 'messages': []})):
        status, reply, _ = server.request(
            'POST', path, body, {'Origin': 'https://example.com', 'Content-Type': 'text/plain'})
        assert (status, reply['error']['code']) == (403, 'origin_refused')


def refused_or_answered(server: ServerProcess, path: str, body: bytes) -> None:
    status, reply, _ = server.request('POST', path, body)
    assert status in (200, 202, 400, 404, 413, 429), (status, reply)
    assert status in (200, 202) or reply['error']['message']
    assert 'internal_error' not in str(reply)


@settings(max_examples=250, suppress_health_check=list(HealthCheck))
@given(requests())
def test_fuzzed_bodies_are_refused_or_answered(
        server: ServerProcess, sent: tuple[str, bytes]) -> None:
    refused_or_answered(server, *sent)


def test_the_server_answers_after_deep_cut_and_explosive_bodies(
        client: OpenAI, server: ServerProcess) -> None:
    for path, body in by_hand():
        refused_or_answered(server, path, body)
    assert ask(client, 'Are you there?').choices[0].finish_reason in ('stop', 'length')


def test_the_servers_metrics_are_those_of_the_node(server: ServerProcess) -> None:
    assert server.metric('mace_ttft_seconds_count') > 10
    assert server.metric('mace_scheduler_memory_budget_mb') > 0
    assert server.metric('mace_up') == 1
    assert server.metric(
        'mace_http_requests_total{path="/v1/chat/completions",status="200"}') > 10
