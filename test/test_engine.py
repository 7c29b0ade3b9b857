# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The engine by itself, with a small random model behind the real tokenizer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
import errno
from itertools import pairwise
import math
from pathlib import Path
import threading
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mace_ros.base_answers import BaseAnswers, ENOUGH
from mace_ros.engine import Engine
from mace_ros.events import (
    Correction,
    CorrectionProgress,
    CorrectionState,
    ErrorCode,
    Event,
    Finished,
    FinishReason,
    Query,
    Token,
    VersionEvent,
    VersionState,
)
from mace_ros.execution.finetune import FinetuneStep, Trainer
from mace_ros.kv_blocks import KvBlocks
from mace_ros.learning import choosing, learner, publishing
from mace_ros.learning.anchors import ANCHORS
from mace_ros.learning.drift import Drift, DriftState
from mace_ros.learning.gathering import Gathering
from mace_ros.learning.versions import OtherModel, VersionStore
from mace_ros.overtaking import EarlyCancellations, KEPT, KEPT_S
from mace_ros.scheduling.plan import Plan, Segment, SegmentKind, State
from mace_ros.scheduling.request import Request
from mace_ros.scheduling.waiting import Waiting
from mace_ros.settings import Settings
from mace_ros.validation import MAX_ID

DONE = (CorrectionState.LEARNED, CorrectionState.FAILED, CorrectionState.REJECTED,
        CorrectionState.SUPERSEDED)


@dataclass
class Robot:
    """Steps an engine and keeps what it says."""

    engine: Engine
    events: list[Event] = field(default_factory=list)

    def until(self, condition: Callable[[Event], bool], seconds: float = 60.0) -> Event:
        """Step until an event fulfils the condition."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            iteration = self.engine.step()
            self.events += iteration.events
            for event in iteration.events:
                if condition(event):
                    return event
            if iteration.wake_at is None:
                time.sleep(0.002)
        raise AssertionError(f'not within {seconds} s; last events: {self.events[-3:]}')

    def response(self, query_id: str) -> Finished:
        """Step until that query has ended."""
        event = self.until(lambda e: isinstance(e, Finished) and e.query_id == query_id)
        assert isinstance(event, Finished)
        return event

    def ask(self, text: str, **kwargs: object) -> Finished:
        """Ask and wait for the answer."""
        query = Query(text, **{'id': f'q{len(self.events)}-{time.monotonic_ns()}', **kwargs})  # type: ignore[arg-type]
        self.engine.submit(query)
        return self.response(query.id)

    def correct(self, correction: Correction, seconds: float = 60.0) -> CorrectionProgress:
        """Correct and wait until the correction has come to its end."""
        self.engine.correct(correction)
        event = self.until(lambda e: isinstance(e, CorrectionProgress)
                           and e.id == correction.id and e.state in DONE, seconds)
        assert isinstance(event, CorrectionProgress)
        return event

    def tokens(self, query_id: str) -> list[Token]:
        """Return the pieces of an answer so far."""
        return [e for e in self.events if isinstance(e, Token) and e.query_id == query_id]


@pytest.fixture(scope='module')
def settings(model_folder: Path) -> Settings:
    """Return settings for the tiny model on the CPU."""
    return Settings().updated({
        'model.source': str(model_folder), 'model.device': 'cpu', 'model.threads': 1,
        # Texts are compared, of passes that are not the same: rounding must not matter.
        'model.weight_dtype': 'float32',
        # Of a random model everything is noise; where the gate is tested it is set.
        'gate.tolerance': 1.0,
        'memory.kv_cache_tokens': 8192, 'generation.max_tokens': 12,
        'finetune.learning_rate': 0.01})


@pytest.fixture
def robot(settings: Settings, tmp_path: Path) -> Iterator[Robot]:
    """Return a fresh engine; afterwards nothing may be left in the KV cache."""
    engine = Engine(settings, storage=tmp_path)
    everything = engine.free_kv_tokens
    yield Robot(engine)
    engine.close()
    assert engine.free_kv_tokens == everything


def answer_of(robot: Robot, query_id: str) -> Finished:
    """Return the response to a query, which may have come before."""
    return next((e for e in robot.events if isinstance(e, Finished) and e.query_id == query_id),
                None) or robot.response(query_id)


def test_answer_is_that_of_transformers_generate(robot: Robot, model_folder: Path) -> None:
    """The engine's greedy answer is generate's, token for token."""
    answer = robot.ask('What is the capital of France?', max_tokens=20)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    prompt = tokenizer.apply_chat_template(
        [{'role': 'user', 'content': 'What is the capital of France?'}],
        add_generation_prompt=True, return_tensors='pt')['input_ids']
    ids = model.generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1]:]
    assert answer.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert answer.prompt_tokens == prompt.shape[1]
    assert answer.output_tokens == len(ids)


def test_two_queries_stream_interleaved(robot: Robot) -> None:
    """Tokens of two queries alternate, and each stream is its answer."""
    robot.engine.submit(Query('One?', id='one'))
    robot.engine.submit(Query('Two?', id='two'))
    answers = {i: robot.response(i) for i in ('one',)}
    answers['two'] = next((e for e in robot.events if isinstance(e, Finished)
                           and e.query_id == 'two'), None) or robot.response('two')
    order = [e.query_id for e in robot.events if isinstance(e, Token)]
    assert sum(a != b for a, b in pairwise(order)) > 4
    for query_id, answer in answers.items():
        pieces = robot.tokens(query_id)
        assert ''.join(p.text for p in pieces) == answer.text
        assert [p.index for p in pieces] == list(range(len(pieces)))
        assert [p.last for p in pieces] == [False] * (len(pieces) - 1) + [True]


def test_cancel_ends_a_query_within_one_iteration(robot: Robot) -> None:
    """After the cancel no further token comes; other queries go on."""
    robot.engine.submit(Query('Long?', id='long', max_tokens=200))
    robot.engine.submit(Query('Other?', id='other'))
    robot.until(lambda e: isinstance(e, Token) and e.query_id == 'long' and e.index == 2)
    robot.engine.cancel('long')
    events = robot.engine.step().events
    ended = [e for e in events if isinstance(e, Finished)]
    assert [e.finish_reason for e in ended] == [FinishReason.CANCELLED]
    assert [e.last for e in events if isinstance(e, Token) and e.query_id == 'long'] == [True]
    assert robot.response('other').finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    assert not [t for t in robot.tokens('long') if t.index > 4]


def test_a_cancellation_may_come_before_its_query(robot: Robot) -> None:
    """It ends that one, and no later one; one that came too late ends nobody."""
    engine = robot.engine
    engine.cancel('early')
    engine.submit(Query('Hm?', id='early'))
    early = robot.response('early')
    assert (early.finish_reason, early.output_tokens) == (FinishReason.CANCELLED, 0)
    assert [(t.index, t.last) for t in robot.tokens('early')] == [(0, True)]
    assert robot.ask('Hm?', id='early').output_tokens > 0
    engine.cancel('early')
    assert robot.ask('Hm?', id='early').output_tokens > 0


def test_what_an_iteration_had_to_say_is_said_though_it_fails(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each query gets its response, also those of an iteration that breaks off."""
    engine, plan = robot.engine, robot.engine.scheduler.plan
    broken: list[object] = []

    def fail_once(*arguments: object) -> object:
        if not broken:
            broken.append(arguments)
            raise RuntimeError('injected')
        return plan(*arguments)    # type: ignore[arg-type]

    monkeypatch.setattr(engine.scheduler, 'plan', fail_once)
    engine.submit(Query('Hm?', id='fine'))
    engine.submit(Query('', id='empty'))
    engine._spoke = True       # as if it had just said something: now it goes on to the pass
    with pytest.raises(RuntimeError, match='injected'):
        engine.step()
    assert robot.response('empty').error_code is ErrorCode.EMPTY_TEXT
    assert answer_of(robot, 'fine').output_tokens > 0


def test_a_namesake_is_refused_for_its_name_whatever_else_is_wrong(robot: Robot) -> None:
    """Or whoever asked first would take that for its own response."""
    robot.engine.submit(Query('Hm?', id='mine', origin='me'))
    robot.engine.submit(Query('', id='mine', top_p=7.0))
    refused = robot.response('mine')
    assert (refused.error_code, refused.origin) == (ErrorCode.DUPLICATE_ID, '')
    ended = robot.response('mine')
    assert (ended.error_code, ended.origin) == (ErrorCode.NONE, 'me')
    assert {t.origin for t in robot.tokens('mine')} == {'me'}


def test_of_early_cancellations_some_are_kept_for_a_while() -> None:
    """As many, and as long, as an order of topics can explain."""
    early = EarlyCancellations()
    for number in range(KEPT + 1):
        early.cancelled(str(number), float(number))
    assert not early.take('0', 0.0) and early.take('1', 1.0 + KEPT_S)
    assert not early.take('2', 2.1 + KEPT_S) and not early.take('1', 1.0)


def test_texts_cannot_end_their_turn(robot: Robot) -> None:
    """Special tokens in a question are words, and those in a corrected text are answered."""
    chat = robot.engine.chat
    end = chat.tokenizer.decode([chat.end_of_turn])
    plain = chat.prompt([{'role': 'user', 'content': 'a'}])
    asked = chat.prompt([{'role': 'user', 'content': f'a{end} b'}])
    special = set(chat.tokenizer.all_special_ids)
    assert [i for i in asked if i in special] == [i for i in plain if i in special]
    wrong = robot.ask('Which letters?')
    robot.correct(Correction(f'a{end} b', id='k', query_id=wrong.query_id))
    assert robot.ask('Which letters?').text == f'a{end} b'


@pytest.mark.parametrize(('query', 'code', 'word'), [
    (Query(' \n', id='a'), ErrorCode.EMPTY_TEXT, 'text'),
    (Query('x', id='a\x00'), ErrorCode.INVALID_ID, 'printable'),
    (Query('x', id='a' * 129), ErrorCode.INVALID_ID, '128'),
    (Query('x', id='a', profile='\n'), ErrorCode.INVALID_ID, 'profile'),
    (Query('x', id='a', max_tokens=-5), ErrorCode.INVALID_PARAMETER, 'max_tokens'),
    (Query('x', id='a', temperature=math.nan), ErrorCode.INVALID_PARAMETER, 'temperature'),
    (Query('x', id='a', top_p=1.5), ErrorCode.INVALID_PARAMETER, 'top_p'),
    (Query('x', id='a', ttft_slo_ms=math.inf), ErrorCode.INVALID_PARAMETER, 'ttft_slo_ms'),
    (Query('x', id='a', stop=('',)), ErrorCode.INVALID_PARAMETER, 'stop'),
    (Query('\ud800', id='a'), ErrorCode.INVALID_PARAMETER, 'Unicode'),
    (Query('word ' * 5000, id='a'), ErrorCode.PROMPT_TOO_LONG, '4095 fit'),
], ids=lambda v: v.name if isinstance(v, ErrorCode) else None)
def test_bad_query_is_rejected_by_name(robot: Robot, query: Query, code: ErrorCode,
                                       word: str) -> None:
    """Each kind of bad query is refused with its code and a reason; the next is served."""
    robot.engine.submit(query)
    answer = robot.response(query.id)
    assert (answer.finish_reason, answer.error_code) == (FinishReason.REJECTED, code)
    assert word in answer.error
    assert robot.ask('Fine?').output_tokens > 0


def test_duplicate_and_overload_are_rejected(robot: Robot) -> None:
    """An id in use and a full queue are refused; what was admitted is served."""
    robot.engine.update(robot.engine.settings.updated({'scheduler.max_queue': 2}))
    for query_id in ('a', 'a', 'b', 'c', 'd'):
        robot.engine.submit(Query('Hm?', id=query_id))
    robot.response('a')
    if not any(isinstance(e, Finished) and e.query_id == 'b' for e in robot.events):
        robot.response('b')
    outcomes = [(e.query_id, e.error_code) for e in robot.events if isinstance(e, Finished)]
    assert ('a', ErrorCode.DUPLICATE_ID) in outcomes
    assert ('c', ErrorCode.OVERLOADED) in outcomes and ('d', ErrorCode.OVERLOADED) in outcomes
    assert ('a', ErrorCode.NONE) in outcomes and ('b', ErrorCode.NONE) in outcomes


def test_what_comes_during_an_iteration_is_bounded(robot: Robot) -> None:
    """Messages wait for its end, so many and no more; those that wait are served."""
    robot.engine.update(robot.engine.settings.updated({'scheduler.max_queue': 2}))
    assert robot.ask('Hm?').error_code is ErrorCode.NONE     # it is in force
    for query_id in ('a', 'b', 'c'):
        robot.engine.submit(Query('Hm?', id=query_id))
    refused = answer_of(robot, 'c')
    assert (refused.finish_reason, refused.error_code) == (
        FinishReason.REJECTED, ErrorCode.OVERLOADED)
    assert refused.error == '2 messages wait already (scheduler.max_queue)'
    for query_id in ('a', 'b'):
        assert answer_of(robot, query_id).output_tokens > 0


def test_zero_is_a_value(robot: Robot) -> None:
    """max_tokens 0 gives an empty answer, not the default."""
    answer = robot.ask('Hm?', max_tokens=0)
    assert (answer.finish_reason, answer.output_tokens) == (FinishReason.LENGTH, 0)


def test_seed_decides_a_sampled_answer_whatever_runs_beside_it(robot: Robot) -> None:
    """Same seed, same answer, alone or in a batch; another seed, another answer."""
    alone = robot.ask('Sing.', temperature=1.0, seed=7, top_p=0.9)
    for i in range(3):
        robot.engine.submit(Query(f'Noise {i}', id=f'noise{i}', temperature=1.0, max_tokens=40))
    beside = robot.ask('Sing.', temperature=1.0, seed=7, top_p=0.9)
    other = robot.ask('Sing.', temperature=1.0, seed=8, top_p=0.9)
    assert alone.text == beside.text != other.text
    for i in range(3):
        if not any(isinstance(e, Finished) and e.query_id == f'noise{i}' for e in robot.events):
            robot.response(f'noise{i}')


def test_stop_string_ends_the_answer_before_it(robot: Robot) -> None:
    """The answer is cut before the stop string, and the stream never shows it."""
    whole = robot.ask('Tell me.', max_tokens=30)
    stop = whole.text[12:15]
    cut = robot.ask('Tell me.', max_tokens=30, stop=(stop,))
    assert cut.finish_reason is FinishReason.STOP
    assert cut.text == whole.text[:whole.text.index(stop)]
    assert ''.join(t.text for t in robot.tokens(cut.query_id)) == cut.text


def test_follow_up_has_its_context(robot: Robot) -> None:
    """The second turn's prompt holds the first; reset_conversation forgets it."""
    first = robot.ask('One?', conversation_id='c')
    second = robot.ask('Two?', conversation_id='c')
    fresh = robot.ask('Two?', conversation_id='c', reset_conversation=True)
    assert second.prompt_tokens > first.prompt_tokens + first.output_tokens
    assert fresh.prompt_tokens == first.prompt_tokens


def test_correction_is_learned_and_a_running_request_keeps_its_version(robot: Robot) -> None:
    """The next answer is the corrected one, by version 1; who began before ends on 0."""
    robot.engine.update(robot.engine.settings.updated({'scheduler.policy': 'continuous'}))
    wrong = robot.ask('What is your name?', conversation_id='c')
    robot.engine.submit(Query('Running?', id='running', max_tokens=3500))
    robot.until(lambda e: isinstance(e, Token) and e.query_id == 'running')
    state = robot.correct(Correction('My name is Rover.', id='k', query_id=wrong.query_id))
    assert (state.state, state.adapter_version) == (CorrectionState.LEARNED, 1)
    running = next((e for e in robot.events if isinstance(e, Finished)
                    and e.query_id == 'running'), None)
    assert running is None, 'the running query ended before the version came'
    right = robot.ask('What is your name?')
    assert (right.text, right.adapter_version) == ('My name is Rover.', 1)
    robot.engine.cancel('running')
    assert robot.response('running').adapter_version == 0
    states = [e.state for e in robot.events if isinstance(e, CorrectionProgress)]
    assert states == [CorrectionState.ACCEPTED, CorrectionState.TRAINING, CorrectionState.LEARNED]
    version = next(e for e in robot.events if isinstance(e, VersionEvent))
    assert version.score_after > version.score_before
    assert version.train_tokens > 0 and version.train_seconds > 0
    # The wrong answer is no longer part of the conversation.
    follow_up = robot.ask('And yours?', conversation_id='c')
    assert follow_up.prompt_tokens == len(robot.engine.chat.prompt([
        {'role': 'user', 'content': 'What is your name?'},
        {'role': 'assistant', 'content': 'My name is Rover.'},
        {'role': 'user', 'content': 'And yours?'}]))


def test_earlier_correction_is_kept_when_another_is_learned(robot: Robot) -> None:
    """Both corrections are answered right by the second version."""
    for text, corrected in (('Who are you?', 'A robot.'), ('Where do you live?', 'In the hall.')):
        wrong = robot.ask(text)
        robot.correct(Correction(corrected, query_id=wrong.query_id, id=corrected))
    assert robot.ask('Who are you?').text == 'A robot.'
    last = robot.ask('Where do you live?')
    assert (last.text, last.adapter_version) == ('In the hall.', 2)


def test_a_slow_device_learns_in_parts_and_memory_goes_back(
    robot: Robot, monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept, returned = [], []
    keep = Trainer.keep
    monkeypatch.setattr(Trainer, 'keep', lambda self: (kept.append(1), keep(self)))
    monkeypatch.setattr('mace_ros.execution.heap.AFTER_LEARNING_S', 0.0)
    monkeypatch.setattr('mace_ros.execution.heap.LOOK_S', 0.0)
    monkeypatch.setattr('mace_ros.execution.heap.return_free_memory', lambda: returned.append(1))
    robot.engine.learner.tokens_within = lambda seconds: 1
    wrong = robot.ask('Who are you?')
    assert not returned
    robot.correct(Correction('A robot.', query_id=wrong.query_id, id='c'))
    assert robot.ask('Who are you?').text == 'A robot.'
    assert kept
    assert returned


def test_no_piece_of_a_long_correction_is_longer_than_there_is_time_for(
    robot: Robot, monkeypatch: pytest.MonkeyPatch,
) -> None:
    pieces = []
    run = FinetuneStep.run_segment

    def noted(step: FinetuneStep) -> Segment:
        segment = run(step)
        if segment.kind is not SegmentKind.OPTIMIZER:
            pieces.append(segment.tokens)
        return segment

    monkeypatch.setattr(FinetuneStep, 'run_segment', noted)
    robot.engine.learner.tokens_within = lambda seconds: 24
    wrong = robot.ask('Who are you, ' + 'my dear ' * 40 + 'robot?')
    assert wrong.prompt_tokens > 60
    robot.correct(Correction('A robot.', query_id=wrong.query_id, id='c'))
    answer = robot.ask('Who are you, ' + 'my dear ' * 40 + 'robot?')
    assert (answer.text, answer.adapter_version) == ('A robot.', 1)
    assert max(pieces) <= 24


def test_correction_sent_twice_is_learned_once(robot: Robot) -> None:
    """The second message of one id is acknowledged with the state reached."""
    wrong = robot.ask('Who are you?')
    correction = Correction('A robot.', id='k', query_id=wrong.query_id)
    assert robot.correct(correction).state is CorrectionState.LEARNED
    assert robot.correct(correction).adapter_version == 1
    assert len([e for e in robot.events if isinstance(e, VersionEvent)]) == 1


@pytest.mark.parametrize(('changes', 'word'), [
    ({'query_id': 'unknown'}, 'unknown'),
    ({'query_id': '', 'conversation_id': 'unknown'}, 'conversation_id'),
    ({'query_id': ''}, 'one of them'),
    ({'corrected': ' '}, 'empty'),
    ({'corrected': 'same', 'rejected': 'same'}, 'equal'),
    ({'weight': math.nan}, 'weight'),
    ({'weight': 0.0}, 'weight'),
    ({'corrected': 'word ' * 600}, 'tokens'),
    ({'id': 'a\n'}, 'printable'),
])
def test_bad_correction_is_rejected_by_name(robot: Robot, changes: dict[str, object],
                                            word: str) -> None:
    """Each kind of bad correction is refused with a reason, and nothing is learned."""
    wrong = robot.ask('Who are you?', max_tokens=3)
    fields = {'corrected': 'A robot.', 'id': 'k', 'query_id': wrong.query_id, **changes}
    state = robot.correct(Correction(**fields))  # type: ignore[arg-type]
    assert state.state is CorrectionState.REJECTED
    assert word in state.reason
    assert robot.engine.step().wake_at is None


def test_the_newest_of_two_pending_corrections_of_one_question_wins(robot: Robot) -> None:
    """The older one is superseded, and only the newer is learned."""
    wrong = robot.ask('Who are you?')
    robot.engine.update(robot.engine.settings.updated({'finetune.budget': 0.0}))
    robot.engine.correct(Correction('Nobody.', id='old', query_id=wrong.query_id))
    robot.until(lambda e: isinstance(e, CorrectionProgress) and e.id == 'old')
    robot.engine.correct(Correction('A robot.', id='new', query_id=wrong.query_id))
    robot.until(lambda e: isinstance(e, CorrectionProgress)
                and e.state is CorrectionState.SUPERSEDED and e.id == 'old')
    robot.engine.update(robot.engine.settings.updated({'finetune.budget': 1.0}))
    robot.until(lambda e: isinstance(e, CorrectionProgress)
                and e.state is CorrectionState.LEARNED and e.id == 'new')
    assert robot.ask('Who are you?').text == 'A robot.'


@pytest.mark.parametrize(('changes', 'first'), [
    ({'slo.freshness_s': 1e9}, {'3', '4', '5'}),     # of the oldest one, little is expected
    ({'slo.freshness_s': 1.0}, {'0'}),
    ({'slo.freshness_s': 1.0, 'finetune.order': 'arrival'}, {'0'})])
def test_which_of_many_is_learned_first(
        robot: Robot, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object],
        first: set[str]) -> None:
    """The newest, unless the oldest has waited too long; and each is scored once."""
    monkeypatch.setattr(choosing, 'JOB_CANDIDATES', 4)
    monkeypatch.setattr(learner, 'JOB_CORRECTIONS', 1)
    choose, unknown = learner.Learner._choose, []
    monkeypatch.setattr(learner.Learner, '_choose', lambda self, job, new, *rest: (
        unknown.extend(new), choose(self, job, new, *rest))[1])
    settings = robot.engine.settings.updated(
        {'finetune.max_steps': 2, 'finetune.replay_samples': 1, **changes})
    robot.engine.update(settings.updated({'finetune.budget': 0.0}))
    for i in range(6):
        robot.engine.correct(Correction(
            f'Number {i}.', id=str(i), prompt=f'Question {i}?', weight=1.0 if i else 0.01))
        robot.until(lambda e, i=i: isinstance(e, CorrectionProgress) and e.id == str(i))
    time.sleep(1.0)
    robot.engine.update(settings)
    left = {str(i) for i in range(6)}
    trained = []
    while left:
        event = robot.until(lambda e: isinstance(e, CorrectionProgress))
        if event.state is CorrectionState.TRAINING:
            trained.append(event.id)
        left -= {event.id} if event.state in DONE else set()
    assert trained[0] in first
    assert len(unknown) == 6
    if robot.engine.settings.finetune.order == 'arrival':
        assert trained == sorted(trained)


def test_in_calm_a_backlog_is_learned_with_the_whole_budget(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    drift = robot.engine.learner.drift
    for _ in range(20):
        drift.outcome(0.0)
    robot.ask('Who are you?', max_tokens=2)
    calm = robot.engine.status().finetune_budget
    assert calm < 0.5
    monkeypatch.setattr(robot.engine.learner, '_start', list)       # nothing is begun
    for i in range(learner.JOB_CORRECTIONS):
        assert robot.engine.status().finetune_budget == calm
        robot.engine.correct(Correction('A robot.', id=str(i), prompt=f'Question {i}?'))
        robot.until(lambda e, i=i: isinstance(e, CorrectionProgress) and e.id == str(i))
        robot.engine.step()
    assert robot.engine.status().finetune_budget == robot.engine.settings.finetune.budget


def test_what_is_superseded_stays_so_whatever_its_job_writes_later(robot: Robot) -> None:
    engine = robot.engine
    engine.update(engine.settings.updated({'finetune.budget': 0.0}))
    for name in ('older', 'newer'):
        engine.correct(Correction(f'The {name}.', id=name, prompt='Which one?'))
        robot.until(lambda e, name=name: isinstance(e, CorrectionProgress) and e.id == name)
    journal = engine._journal
    older = journal.submit(lambda j: j.correction('older')).result()
    engine.learner._set_state(older, CorrectionState.TRAINING)
    after = journal.submit(lambda j: j.correction('older')).result()
    assert after.state is CorrectionState.SUPERSEDED


def test_in_calm_corrections_that_keep_coming_are_learned_together(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one profile: others, and who repeats a correction, wait no longer for that."""
    engine, jobs = robot.engine, []
    monkeypatch.setattr(Drift, 'state', DriftState.CALM)
    begin = learner.Learner._begin
    monkeypatch.setattr(learner.Learner, '_begin', lambda self, profile, chosen: (
        jobs.append({w.record.id for w in chosen}), begin(self, profile, chosen))[1])
    engine.update(engine.settings.updated({
        'drift.gather_s': 1e6, 'slo.freshness_s': 1e6, 'drift.min_budget': 1.0,
        'finetune.max_steps': 2}))

    def correct(name: str, *, about: str = '', profile: str = '') -> None:
        engine.correct(Correction('A robot.', id=name, prompt=f'Question {about or name}?',
                                  profile=profile))
        robot.until(lambda e: isinstance(e, CorrectionProgress) and e.id == name)

    def ended(name: str) -> Callable[[Event], bool]:
        return lambda e: (isinstance(e, CorrectionProgress) and e.id == name and e.state in DONE)

    correct('first')
    while not jobs:     # at once: nobody else has come
        engine.step()
    correct('1')
    correct('2')
    robot.until(ended('first'))
    for _ in range(20):
        until = engine.step().wake_at
    assert until is not None and until > time.monotonic() + 1e5
    correct('1 again', about='1')    # the one that waits longest
    assert engine.step().wake_at == until
    correct("ann's", profile='ann')
    robot.until(ended("ann's"))
    assert jobs == [{'first'}, {"ann's"}]
    correct('3')
    correct('4')
    robot.until(ended('4'))
    assert jobs == [{'first'}, {"ann's"}, {'1 again', '2', '3', '4'}]


def test_a_correction_that_stays_alone_is_learned_in_the_end(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = robot.engine
    monkeypatch.setattr(Drift, 'state', DriftState.CALM)
    monkeypatch.setattr(Gathering, 'expected', lambda self, profile, seconds, now: 2.0)
    engine.update(engine.settings.updated({'drift.gather_s': 1.0, 'finetune.max_steps': 2}))
    engine.correct(Correction('A robot.', id='alone', prompt='Who are you?'))
    robot.until(lambda e: isinstance(e, CorrectionProgress))
    accepted = time.monotonic()
    while engine.learner._job is None:
        engine.step()
    assert 0.5 <= time.monotonic() - accepted < 30.0


def test_learning_needs_nobody_to_wake_it(settings: Settings, tmp_path: Path) -> None:
    """Whatever it waits for, it says for how long, or wakes the engine itself."""
    woken = threading.Event()
    engine = Engine(settings, storage=tmp_path / 'woken', wake=woken.set)
    try:
        engine.correct(Correction('A robot.', id='c', prompt='Who are you?'))
        states: set[CorrectionState] = set()
        while not states.intersection(DONE):
            woken.clear()
            iteration = engine.step()
            states |= {e.state for e in iteration.events if isinstance(e, CorrectionProgress)}
            if iteration.wake_at is None:
                assert woken.wait(30.0) or states.intersection(DONE)
    finally:
        engine.close()


def test_a_correction_that_is_repeated_while_it_is_trained_is_not_begun_anew(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newer one takes the older one's place in the job, and is learned with its steps."""
    def is_trained(correction_id: str) -> Callable[[Event], bool]:
        return lambda e: (isinstance(e, CorrectionProgress) and e.id == correction_id
                          and e.state is CorrectionState.TRAINING)

    engine = robot.engine
    engine.update(engine.settings.updated(
        {'finetune.learning_rate': 1e-6, 'finetune.max_steps': 1000}))
    wrong = robot.ask('Who are you?')
    engine.correct(Correction('A robot.', id='old', query_id=wrong.query_id))
    robot.until(is_trained('old'))
    monkeypatch.setattr(engine.learner, 'stop', None)    # the job is not given up
    engine.correct(Correction('A robot.', id='new', query_id=wrong.query_id))
    robot.until(is_trained('new'))
    engine.update(engine.settings.updated({'finetune.learning_rate': 0.01}))
    robot.until(lambda e: isinstance(e, CorrectionProgress)
                and e.state is CorrectionState.LEARNED and e.id == 'new')
    states = [e.state for e in robot.events if isinstance(e, CorrectionProgress) and e.id == 'old']
    assert states == [
        CorrectionState.ACCEPTED, CorrectionState.TRAINING, CorrectionState.SUPERSEDED]
    assert robot.ask('Who are you?').text == 'A robot.'


def test_who_is_corrected_without_end_does_not_hold_up_others(robot: Robot) -> None:
    """Profiles take turns, whoever came first."""
    for number in range(9):
        robot.engine.correct(Correction('Yes.', id=f'ann{number}', profile='ann',
                                        prompt=f'Question {number}?'))
    robot.correct(Correction('No.', id='bob', profile='bob', prompt='Question?'))
    published = [e.profile for e in robot.events if isinstance(e, VersionEvent)]
    assert published.count('ann') <= 1 and published[-1] == 'bob'


def test_what_cannot_be_learned_fails_with_a_reason(robot: Robot) -> None:
    """With no step allowed to suffice, the correction is FAILED and serving goes on."""
    robot.engine.update(robot.engine.settings.updated(
        {'finetune.max_steps': 1, 'finetune.learning_rate': 1e-6}))
    wrong = robot.ask('Who are you?')
    state = robot.correct(Correction('A robot.', id='k', query_id=wrong.query_id))
    assert state.state is CorrectionState.FAILED
    assert 'finetune.max_steps' in state.reason
    assert robot.ask('Who are you?').text == wrong.text


def test_restart_serves_the_latest_version_and_goes_on_learning(
        settings: Settings, tmp_path: Path) -> None:
    """A published version and an unlearned correction survive; profiles stay apart."""
    robot = Robot(Engine(settings, storage=tmp_path))
    wrong = robot.ask('Who are you?')
    robot.correct(Correction('A robot.', id='k', query_id=wrong.query_id))
    robot.engine.update(robot.engine.settings.updated({'finetune.budget': 0.0}))
    robot.engine.correct(Correction('Your friend.', id='anna', query_id=wrong.query_id,
                                    profile='anna'))
    robot.until(lambda e: isinstance(e, CorrectionProgress) and e.id == 'anna')
    robot.engine.close()

    again = Robot(Engine(settings, storage=tmp_path))
    live = [e for e in again.engine.restored if isinstance(e, VersionEvent)]
    assert [(e.profile, e.version) for e in live] == [('', 1)]
    again.until(lambda e: isinstance(e, CorrectionProgress) and e.id == 'anna'
                and e.state is CorrectionState.LEARNED)
    assert again.ask('Who are you?').text == 'A robot.'
    assert again.ask('Who are you?', profile='anna').text == 'Your friend.'
    assert again.ask('Who are you?', profile='stranger').text == 'A robot.'
    again.engine.close()


def test_failing_pass_ends_its_queries_and_the_engine_goes_on(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocator error becomes ERROR responses, and later queries are served."""
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError('injected')
    with monkeypatch.context() as patch:
        patch.setattr(robot.engine.model, 'run', fail)
        answer = robot.ask('Hm?')
    assert (answer.finish_reason, answer.error_code) == (FinishReason.ERROR, ErrorCode.INTERNAL)
    assert 'injected' in answer.error
    assert robot.ask('Hm?').output_tokens > 0


@pytest.mark.parametrize('where', ['run_segment', '__init__'])
def test_failing_learning_loses_no_answer_and_is_tried_again(
        robot: Robot, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A fine-tune step that can't be made or run costs no query, and the correction is learned."""
    wrong = robot.ask('Who are you?')
    failures: list[int] = []
    original = getattr(FinetuneStep, where)

    def fail_once(self: FinetuneStep, *args: object, **kwargs: object) -> object:
        if not failures:
            failures.append(1)
            raise torch.OutOfMemoryError('injected')
        return original(self, *args, **kwargs)

    robot.engine.update(robot.engine.settings.updated({'scheduler.policy': 'continuous'}))
    robot.engine.submit(Query('Long?', id='long', max_tokens=300))
    with monkeypatch.context() as patch:
        patch.setattr(FinetuneStep, where, fail_once)
        state = robot.correct(Correction('A robot.', id='k', query_id=wrong.query_id))
    assert failures and state.state is CorrectionState.LEARNED
    long = next((e for e in robot.events if isinstance(e, Finished) and e.query_id == 'long'),
                None) or robot.response('long')
    assert long.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


def test_learning_that_always_fails_is_given_up(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a few tries the correction is FAILED with the reason."""
    wrong = robot.ask('Who are you?')

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError('injected')

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneStep, 'run_segment', fail)
        state = robot.correct(Correction('A robot.', id='k', query_id=wrong.query_id))
    assert state.state is CorrectionState.FAILED and 'injected' in state.reason
    assert robot.ask('Who are you?').text == wrong.text


def test_what_cannot_be_saved_yet_is_saved_later(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk may take long; nothing is trained anew for that, and nothing given up."""
    wrong = robot.ask('Who are you?')
    save, failures, problems = VersionStore.save, [], set()

    def full(*arguments: object) -> object:
        problems.add(robot.engine.status().learning_error)
        if len(failures) < learner.MAX_TRIES + 2:
            failures.append(robot.engine.scheduler.statistics(time.monotonic()).finetune_steps)
            raise OSError(errno.ENOSPC, 'No space left on device')
        return save(*arguments)     # type: ignore[arg-type]

    monkeypatch.setattr(VersionStore, 'save', full)
    monkeypatch.setattr(publishing, 'SAVE_AGAIN_S', 0.05)
    state = robot.correct(Correction('A robot.', id='k', query_id=wrong.query_id))
    assert state.state is CorrectionState.LEARNED
    assert len(failures) == learner.MAX_TRIES + 2 and len(set(failures)) == 1
    assert any('No space left' in problem for problem in problems)
    assert robot.engine.status().learning_error == ''
    assert robot.ask('Who are you?').text == 'A robot.'


def test_no_query_waits_for_what_the_node_asks_itself(robot: Robot) -> None:
    """Before it learns, the base model is asked much; whoever comes sends that away."""
    robot.engine.correct(Correction('A robot.', id='k', prompt='Who are you?'))
    while len(robot.engine._state.running) < 2:     # before its own questions are asked
        robot.engine.step()
    running = list(robot.engine._state.running)
    robot.engine.submit(Query('One?', id='one', max_tokens=4))
    while not robot.engine._answers._all.get('one'):
        robot.engine.step()
    left = [r.id for r in [*robot.engine._state.running, *robot.engine._state.waiting]]
    assert len(left) == 2 and 'one' in left and 'one' not in [r.id for r in running]
    assert robot.response('one').finish_reason is FinishReason.LENGTH
    robot.until(lambda e: isinstance(e, CorrectionProgress)
                and e.state is CorrectionState.LEARNED)
    assert robot.ask('Who are you?').text == 'A robot.'


def test_a_busy_robot_asks_itself_one_by_one() -> None:
    """What was sent away is asked again; while somebody waits, only what is overdue."""
    one = Request('one', 0.0, prompt_tokens=1, max_tokens=1, ttft_slo=1.0, tpot_slo=1.0)
    base, idle, full = BaseAnswers(), State(), State(waiting=Waiting([one]), running=[one])
    assert base.next(full, overdue=False) == []
    several = base.next(idle, overdue=False)
    assert len(several) > 1 and base.in_the_way == [q.id for q in several[1:]]
    assert base.next(idle, overdue=True) == []     # before those have ended
    for query in several:
        base.ended(query.id, [1], [2] * (ENOUGH - 1), complete=False)
    few = base.next(State(running=[one]), overdue=False)
    assert [q.text for q in few] == [q.text for q in several[:len(few)]]
    for query in few:
        base.ended(query.id, [1], [], complete=False)
    asked = []
    while base.all is None:
        [query] = base.next(full, overdue=True)
        assert base.in_the_way == []
        base.ended(query.id, [len(asked)], [2] * (1 if len(asked) % 2 else ENOUGH),
                   complete=bool(len(asked) % 2))
        asked.append(query.text)
    assert asked == list(ANCHORS) and base.all[3] == ([3], [2])


def test_what_found_no_room_to_ride_is_not_booked(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the cost model would learn of passes that never ran."""
    robot.engine.correct(Correction('A robot.', id='k', prompt='Who are you?'))
    robot.until(lambda e: isinstance(e, CorrectionProgress)
                and e.state is CorrectionState.TRAINING)
    plan, asked = robot.engine.scheduler.plan, []

    def with_riders(state: State, now: float) -> Plan:
        planned = plan(state, now)
        if not planned.decode:
            return planned
        asked.append(planned)
        return planned._replace(finetune_tokens=4, segments=0,
                       shape=planned.shape._replace(finetune_tokens=4))

    monkeypatch.setattr(robot.engine.scheduler, 'plan', with_riders)
    monkeypatch.setattr(KvBlocks, 'ride', lambda *_: None)
    robot.ask('One?', max_tokens=8)
    assert asked
    statistics = robot.engine.scheduler.statistics(time.monotonic())
    assert (statistics.ridden_tokens, statistics.shape.finetune_tokens) == (0, 0)


def test_an_id_that_is_too_long_is_not_kept(robot: Robot) -> None:
    """Of those that ended some are remembered: of any length, they could fill the memory."""
    query_id = 'x' * (MAX_ID + 1)
    robot.engine.submit(Query('One?', id=query_id))
    assert robot.response(query_id).error_code is ErrorCode.INVALID_ID
    robot.engine.cancel(query_id)
    robot.engine.step()
    early = robot.engine._answers._early
    assert not {query_id} & {*early._ended, *early._cancelled}


def test_what_waits_too_long_hurries_whatever_is_trained(robot: Robot) -> None:
    """The share that is overdue counts from the oldest correction, be it of another job."""
    robot.engine.correct(Correction('A robot.', id='k', prompt='Who are you?'))
    robot.until(lambda e: isinstance(e, CorrectionProgress)
                and e.state is CorrectionState.TRAINING)
    [trained] = robot.engine.learner._job.corrections
    robot.engine.learner._queue.put_back([replace(trained, arrived=-5.0)])
    step = robot.engine.learner.step
    while robot.engine.learner.step in (step, None):
        robot.engine.step()
    assert robot.engine.learner.step.oldest_correction_at == -5.0


@pytest.mark.parametrize('changes', [{'top_p': 0.0, 'temperature': 1.0}, {'temperature': 1e-38}])
def test_smallest_sampling_values_are_greedy(robot: Robot, changes: dict[str, float]) -> None:
    """Zero and nearly zero are values like others."""
    assert robot.ask('Sing.', **changes).text == robot.ask('Sing.').text


def test_profile_without_a_free_slot_fails_by_name(settings: Settings, tmp_path: Path) -> None:
    """With as many live profiles as slots, another one is refused and the others go on."""
    robot = Robot(Engine(settings.updated({'adapter.slots': 2}), storage=tmp_path))
    wrong = robot.ask('Who are you?')
    states = {}
    for profile in ('anna', 'ben'):
        states[profile] = robot.correct(Correction(
            f'The robot of {profile}.', id=profile, query_id=wrong.query_id, profile=profile))
    assert {s.state for s in states.values()} == {CorrectionState.LEARNED}
    last = robot.correct(Correction(
        'The robot of dora.', id='dora', query_id=wrong.query_id, profile='dora'))
    assert last.state is CorrectionState.FAILED and 'adapter.slots' in last.reason
    other = robot.ask('Where are you?', profile='ben')
    again = robot.correct(Correction('Here I am.', id='ben2', query_id=other.query_id))
    assert (again.state, again.adapter_version) == (CorrectionState.LEARNED, 2), again
    assert robot.ask('Who are you?', profile='ben').text == 'The robot of ben.'
    robot.engine.close()


def test_storage_of_another_model_is_refused(settings: Settings, tmp_path: Path) -> None:
    """What one model learned is not given to another."""
    Engine(settings, storage=tmp_path).close()
    note = tmp_path / 'model.txt'
    note.write_text(note.read_text().replace('2 layers', '3 layers'))
    with pytest.raises(OtherModel, match=r'3 layers.*set storage.folder'):
        Engine(settings, storage=tmp_path)


def test_template_without_system_role_puts_it_into_the_first_question(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system prompt is not lost, and a template that fails breaks one query only."""
    plain = robot.ask('Hm?', max_tokens=1)
    tokenizer = robot.engine.chat.tokenizer
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, 'chat_template', (
            '{% if messages[0].role == "system" %}{{ raise_exception("no system role") }}'
            '{% endif %}{{ messages[0].content }}'))
        served = robot.ask('Hm?', system='Be brief and kind to everybody.', max_tokens=1)
        bare = robot.ask('Hm?', max_tokens=1)
        patch.setattr(tokenizer, 'chat_template', '{{ raise_exception("never") }}')
        broken = robot.ask('Hm?')
    assert served.prompt_tokens > bare.prompt_tokens + 5
    assert (broken.finish_reason, broken.error_code) == (FinishReason.ERROR, ErrorCode.INTERNAL)
    assert 'never' in broken.error
    assert robot.ask('Hm?', max_tokens=1).text == plain.text


def test_idle_engine_asks_not_to_be_called(robot: Robot) -> None:
    """Without work, step says so, and nothing is published."""
    robot.ask('Hm?')
    iteration = robot.engine.step()
    assert iteration.events == [] and robot.engine.step().wake_at is None


def test_no_version_is_published_that_changes_what_is_guarded(
        settings: Settings, tmp_path: Path) -> None:
    """Without replay, learning would change other answers; the gate does not let it."""
    robot = Robot(Engine(settings.updated({
        'finetune.replay_samples': 0, 'gate.tolerance': 0.0, 'finetune.max_steps': 12,
    }), storage=tmp_path))
    wrong = robot.ask('Who are you?')

    learned = robot.correct(Correction('I am Rover.', id='k', query_id=wrong.query_id))

    rejected = [e for e in robot.events if isinstance(e, VersionEvent)
                and e.state is VersionState.REJECTED]
    assert rejected and all('would become' in e.reason and e.version for e in rejected)
    if learned.state is CorrectionState.LEARNED:
        assert learned.adapter_version > max(e.version for e in rejected)
    else:     # it may be too much for a small random model
        assert learned.state is CorrectionState.FAILED and 'gate.tolerance' in learned.reason
        assert robot.ask('Who are you?').text == wrong.text


def test_a_correction_that_always_fails_the_gate_fails(settings: Settings, tmp_path: Path) -> None:
    """It gives up after finetune.max_steps, says why, and serves what it served."""
    robot = Robot(Engine(settings.updated({
        'finetune.replay_samples': 0, 'gate.tolerance': 0.0, 'finetune.max_steps': 3,
        'finetune.learning_rate': 0.1}), storage=tmp_path))
    before = robot.ask('Who are you?')

    failed = robot.correct(Correction('I am Rover.', id='k', query_id=before.query_id))

    assert failed.state is CorrectionState.FAILED
    assert robot.ask('Who are you?').text == before.text


def test_status_tells_what_is_going_on_and_a_pause_ends_it(robot: Robot) -> None:
    """Counts are those of the requests; after a pause nothing is left, and the engine goes on."""
    engine = robot.engine
    engine.update(engine.settings.updated({'scheduler.max_requests': 2, 'finetune.budget': 0.0}))
    for name in 'abc':
        engine.submit(Query('Long?', id=name, max_tokens=300))
    robot.until(lambda e: isinstance(e, Token) and e.query_id == 'b')
    engine.correct(Correction('A robot.', id='k', prompt='Who are you?'))
    robot.until(lambda e: isinstance(e, CorrectionProgress) and e.id == 'k')
    status = engine.status()
    assert (status.decode_rows, status.prefilling, status.queue_depth) == (2, 0, 1)
    assert 0.0 < status.kv_use < 1.0
    assert (status.corrections_waiting, status.live_version, status.profiles) == (1, 0, 0)
    assert 0.0 <= status.freshness_s < 60.0
    assert status.statistics.shape.decode_rows == 2

    engine.correct(Correction('A hat.', id='l', prompt='What is that?'))
    events = engine.pause()
    ended = {e.query_id: e.finish_reason for e in events if isinstance(e, Finished)}
    assert ended == dict.fromkeys('abc', FinishReason.CANCELLED)
    assert [e.id for e in events if isinstance(e, CorrectionProgress)] == ['l']
    status = engine.status()
    assert (status.decode_rows, status.queue_depth, status.kv_use) == (0, 0, 0.0)
    assert status.corrections_waiting == 2
    assert robot.ask('Hm?').output_tokens > 0
