# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Conversations that the client keeps, tools, and raw prompts."""

from __future__ import annotations

from collections.abc import Iterator
import json
from pathlib import Path
import shutil
import time
from unittest.mock import MagicMock

import pytest
from support.chat_templates import HERMES
from support.robot import Robot, robot_with, SYSTEM

from mace_ros.api.events import (
    ChatMessage,
    Correction,
    CorrectionState,
    CorrectionStatus,
    ErrorCode,
    FinishReason,
    Tool,
    ToolCall,
)
from mace_ros.api.settings import Settings
from mace_ros.engine.answer_recorder import AnswerRecorder
from mace_ros.engine.hint_answers import HintAnswers
from mace_ros.engine.inbox import AnswerWritten, Inbox

HI, WELL = ChatMessage('user', 'Hi there.'), ChatMessage('user', 'How are you?')
MOVE = Tool('move', 'Moves to a place.', '{"type": "object", "properties": {"to": {}}}')
CALL = '<tool_call>\n{"name": "move", "arguments": {"to": "dock"}}\n</tool_call>'


@pytest.fixture(scope='module')
def tool_settings(
        settings: Settings, model_folder: Path, tmp_path_factory: pytest.TempPathFactory,
) -> Settings:
    """Return settings for a tiny model whose chat template has tools."""
    folder = tmp_path_factory.mktemp('tools') / 'model'
    shutil.copytree(model_folder, folder)
    (folder / 'chat_template.jinja').write_text(HERMES)
    return settings.updated({'model.source': str(folder), 'generation.max_tokens': 40})


@pytest.fixture
def tool_robot(tool_settings: Settings, tmp_path: Path) -> Iterator[Robot]:
    with robot_with(tool_settings, tmp_path) as robot:
        yield robot


def test_messages_and_turns_of_the_node_give_the_same_answers(robot: Robot) -> None:
    first = robot.ask(HI.content, conversation_id='c', temperature=0.0)
    second = robot.ask(WELL.content, conversation_id='c', temperature=0.0)
    history = (HI, ChatMessage('assistant', first.text), WELL)
    for messages, expected in ((history[:1], first), (history, second)):
        answer = robot.ask('', messages=messages, temperature=0.0)
        assert (answer.text, answer.prompt_tokens) == (expected.text, expected.prompt_tokens)


def test_a_longer_conversation_shares_the_blocks_of_the_shorter_one(robot: Robot) -> None:
    system = ChatMessage('system', SYSTEM)
    answer = robot.ask('', messages=(system, HI), max_tokens=1)
    before = robot.engine.status().shared_tokens
    again = robot.ask(
        '', messages=(system, HI, ChatMessage('assistant', answer.text), WELL), max_tokens=1)
    shared = robot.engine.status().shared_tokens - before
    assert shared >= answer.prompt_tokens // 16 * 16 - 16
    assert again.prompt_tokens > shared > 0


def test_a_conversation_that_is_too_long_is_rejected(robot: Robot) -> None:
    turns = (HI, ChatMessage('assistant', 'Ho. ' * 4000)) * 2
    answer = robot.ask('', messages=(*turns, WELL))
    assert (answer.finish_reason, answer.error_code) == (
        FinishReason.REJECTED, ErrorCode.PROMPT_TOO_LONG)


def test_tools_are_refused_if_the_template_has_none(robot: Robot) -> None:
    answer = robot.ask('Move.', tools=(MOVE,))
    assert answer.error_code is ErrorCode.INVALID_PARAMETER
    assert 'does not render tools' in answer.error
    # With "none" they are not rendered.
    assert robot.ask('Move.', tools=(MOVE,), tool_choice='none').error == ''


def test_a_raw_prompt_is_read_as_it_is(robot: Robot) -> None:
    templated = robot.ask(HI.content, temperature=0.0)
    ids = robot.engine.chat.prompt(({'role': 'user', 'content': HI.content},))
    if robot.engine.settings.generation.system:
        ids = robot.engine.chat.prompt((
            {'role': 'system', 'content': robot.engine.settings.generation.system},
            {'role': 'user', 'content': HI.content}))
    text = robot.engine.chat.tokenizer.decode(ids)
    answer = robot.ask(text, raw_prompt=True, temperature=0.0)
    assert (answer.text, answer.prompt_tokens) == (templated.text, templated.prompt_tokens)
    assert robot.ask(HI.content, raw_prompt=True).prompt_tokens < answer.prompt_tokens


@pytest.mark.timeout(300)
def test_a_call_is_learned_and_a_later_turn_uses_its_result(tool_robot: Robot) -> None:
    ask = {'messages': (ChatMessage('user', 'Go to the dock.'),), 'tools': (MOVE,)}
    tool_robot.ask('', id='wrong', temperature=0.0, **ask)
    status = tool_robot.correct(Correction(CALL, id='right', query_id='wrong'), 240.0)
    assert status.state is CorrectionState.LEARNED, status
    answer = tool_robot.ask('', id='called', temperature=0.0, **ask)
    [call] = answer.tool_calls
    assert (call.name, json.loads(call.arguments)) == ('move', {'to': 'dock'})
    assert (answer.text, answer.finish_reason) == ('', FinishReason.STOP)
    assert answer.matched_correction_id == 'right'
    chunks = tool_robot.tokens('called')
    assert ''.join(chunk.text for chunk in chunks) == ''
    assert chunks[-1].last and chunks[-1].tool_calls == (call,)
    record = tool_robot.engine.parts.journal.submit(lambda journal: journal.answer('called'))
    assert (record.result().calls_tool, record.result().text) == (True, CALL)

    result = tool_robot.ask('', temperature=0.0, tools=(MOVE,), messages=(
        *ask['messages'], ChatMessage('assistant', '', (ToolCall(*vars(call).values()),)),
        ChatMessage('tool', 'Arrived.', tool_call_id=call.id)))
    assert result.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    assert result.prompt_tokens > answer.prompt_tokens


@pytest.mark.parametrize('fields', [
    {'messages': (HI,), 'tools': (MOVE,)}, {'text': '<|im_start|>Hi.', 'raw_prompt': True}])
def test_a_hint_keeps_the_tools_and_the_raw_prompt(
        tool_robot: Robot, fields: dict[str, object]) -> None:
    hint = 'Say more.'
    hinted = ({'text': f'{hint}\n\n{fields["text"]}'} if 'text' in fields
              else {'messages': (ChatMessage('user', f'{hint}\n\n{HI.content}'),)})
    for name, asked in (('without', fields), ('with', {**fields, **hinted})):
        tool_robot.ask(**{'text': '', 'id': name, 'max_tokens': 3, **asked})
    tool_robot.engine.correct(Correction('', id='hint', query_id='without', hint=hint))
    tool_robot.until(lambda e: isinstance(e, CorrectionStatus) and e.state in (
        CorrectionState.PROPOSED, CorrectionState.FAILED))
    journal = tool_robot.engine.parts.journal
    record, answer = (journal.submit(read).result() for read in (
        lambda j: j.correction('hint'), lambda j: j.answer('with')))
    hints = HintAnswers(tool_robot.engine.settings, chat=tool_robot.engine.chat, journal=journal,
                        inbox=Inbox(lambda: None), clock=time.monotonic)
    hints.add(record)
    assert hints.next(4096).ids == list(answer.prompt_ids)


def test_only_answers_that_could_not_be_written_count_as_lost() -> None:
    recorder = AnswerRecorder(journal=MagicMock(), inbox=Inbox(lambda: None))
    # A hint is answered again at the next start.
    for message, lost in ((AnswerWritten('disk is full', lost=0), 0),
                          (AnswerWritten('disk is full'), 1), (AnswerWritten(''), 0)):
        recorder.written(message)
        assert (recorder.journal_error, recorder.unrecorded) == (message.error, lost)


@pytest.mark.parametrize('choice', ['required', 'stop'])
def test_a_call_can_be_demanded(tool_robot: Robot, choice: str) -> None:
    stop = Tool('stop', '', json.dumps({
        'type': 'object', 'required': ['when'], 'additionalProperties': False, 'properties': {
            'when': {'$ref': '#/$defs/When'}}, '$defs': {'When': {'enum': ['now', 'later']}}}))
    none = Tool('wait', '', '{"type": "object", "additionalProperties": false}')
    for seed in range(3):
        answer = tool_robot.ask('Sing.', tools=(stop, none), tool_choice=choice, temperature=1.0,
                                seed=seed, max_tokens=60)
        [call] = answer.tool_calls
        assert answer.finish_reason is FinishReason.STOP
        assert call.name in (('stop',) if choice == 'stop' else ('stop', 'wait'))
        if call.name == 'stop':
            assert json.loads(call.arguments)['when'] in ('now', 'later')
    invalid = tool_robot.ask(
        'Sing.', tools=(Tool('stop', '', '{"type": "nothing"}'),), tool_choice='required')
    assert (invalid.error_code, invalid.error.partition(':')[0]) == (
        ErrorCode.INVALID_PARAMETER, 'tools')
