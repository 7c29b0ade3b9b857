# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The engine by itself, with a small random model behind the real tokenizer."""

from itertools import pairwise
import math
from pathlib import Path
import time
import tracemalloc

import pytest
from support.robot import Robot
from support.virtual_device import FixedCache
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mace_ros.api.events import (
    Correction,
    CorrectionState,
    CorrectionStatus,
    ErrorCode,
    FinishReason,
    Query,
    Response,
    ResponseChunk,
)
from mace_ros.api.settings import Settings
from mace_ros.api.validation import MAX_ID
from mace_ros.engine import anchor_requests
from mace_ros.engine.active_request import RequestKind
from mace_ros.engine.anchor_requests import AnchorRequests, MIN_TOKENS
from mace_ros.engine.builder import build_engine
from mace_ros.engine.early_aborts import EarlyAborts, KEPT, KEPT_S
from mace_ros.engine.paged_kv_cache import PagedKVCache
from mace_ros.scheduling.plan import Plan, State
from mace_ros.scheduling.request import Request
from mace_ros.scheduling.waiting_queue import WaitingQueue
from mace_ros.store.adapter_store import AdapterStore, OtherModel
from mace_ros.store.journal import Journal
from mace_ros.store.layout import JOURNAL
from mace_ros.store.records import VersionRecord
from mace_ros.store.version_info import OtherAdapter, peft_config


def test_answer_is_that_of_transformers_generate(robot: Robot, model_folder: Path) -> None:
    """The greedy answer equals that of ``generate()``, token for token."""
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
    """The chunks of two queries alternate, and the chunks of each add up to its answer."""
    robot.engine.submit(Query('One?', id='one'))
    robot.engine.submit(Query('Two?', id='two'))
    answers = {i: robot.response(i) for i in ('one',)}
    answers['two'] = next((e for e in robot.events if isinstance(e, Response)
                           and e.query_id == 'two'), None) or robot.response('two')
    order = [e.query_id for e in robot.events if isinstance(e, ResponseChunk)]
    assert sum(a != b for a, b in pairwise(order)) > 4
    for query_id, answer in answers.items():
        pieces = robot.tokens(query_id)
        assert ''.join(p.text for p in pieces) == answer.text
        assert [p.index for p in pieces] == list(range(len(pieces)))
        assert [p.last for p in pieces] == [False] * (len(pieces) - 1) + [True]


def test_cancel_ends_a_query_within_one_iteration(robot: Robot) -> None:
    """No chunk follows the cancellation; other queries continue."""
    robot.engine.submit(Query('Long?', id='long', max_tokens=200))
    robot.engine.submit(Query('Other?', id='other'))
    robot.until(lambda e: isinstance(e, ResponseChunk) and e.query_id == 'long' and e.index == 2)
    robot.engine.cancel('long')
    events = robot.engine.step().events
    ended = [e for e in events if isinstance(e, Response)]
    assert [e.finish_reason for e in ended] == [FinishReason.CANCELLED]
    assert [e.last for e in events
            if isinstance(e, ResponseChunk) and e.query_id == 'long'] == [True]
    assert robot.response('other').finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    assert not [t for t in robot.tokens('long') if t.index > 4]


def test_a_cancellation_may_come_before_its_query(robot: Robot) -> None:
    """An early cancellation ends one query of its id; a late one ends none."""
    engine = robot.engine
    engine.cancel('early')
    engine.submit(Query('Hm?', id='early'))
    early = robot.response('early')
    assert (early.finish_reason, early.output_tokens) == (FinishReason.CANCELLED, 0)
    assert [(t.index, t.last) for t in robot.tokens('early')] == [(0, True)]
    assert robot.ask('Hm?', id='early').output_tokens > 0
    engine.cancel('early')
    assert robot.ask('Hm?', id='early').output_tokens > 0


def test_events_of_an_iteration_that_fails_are_published_by_the_next_one(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every query gets its response, also in an iteration that raises."""
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
    engine._published_first = True       # so that this iteration runs the pass
    with pytest.raises(RuntimeError, match='injected'):
        engine.step()
    assert robot.response('empty').error_code is ErrorCode.EMPTY_TEXT
    assert robot.answer('fine').output_tokens > 0


def test_a_duplicate_id_is_the_first_reason_for_rejection(robot: Robot) -> None:
    """Any other rejection would be taken for the response of the running query."""
    robot.engine.submit(Query('Hm?', id='mine', origin='me'))
    robot.engine.submit(Query('', id='mine', top_p=7.0))
    refused = robot.response('mine')
    assert (refused.error_code, refused.origin) == (ErrorCode.DUPLICATE_ID, '')
    ended = robot.response('mine')
    assert (ended.error_code, ended.origin) == (ErrorCode.NONE, 'me')
    assert {t.origin for t in robot.tokens('mine')} == {'me'}


def test_early_cancellations_are_kept_for_a_limited_time_and_number() -> None:
    """Topics have no common order, so a cancellation may arrive shortly before its query."""
    early = EarlyAborts()
    for number in range(KEPT + 1):
        early.cancelled(str(number), float(number))
    assert not early.take('0', 0.0) and early.take('1', 1.0 + KEPT_S)
    assert not early.take('2', 2.1 + KEPT_S) and not early.take('1', 1.0)


def test_texts_cannot_end_their_turn(robot: Robot) -> None:
    """Special tokens in a question, and in a corrected text, are plain text."""
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
    """Each kind of bad query is rejected with its code and a reason; the next one is served."""
    robot.engine.submit(query)
    answer = robot.response(query.id)
    assert (answer.finish_reason, answer.error_code) == (FinishReason.REJECTED, code)
    assert word in answer.error
    assert robot.ask('Fine?').output_tokens > 0


def test_duplicate_and_overload_are_rejected(robot: Robot) -> None:
    """An id in use and a full queue lead to rejections; admitted queries are served."""
    robot.engine.update(robot.engine.settings.updated({'scheduler.max_queue': 2}))
    for query_id in ('a', 'a', 'b', 'c', 'd'):
        robot.engine.submit(Query('Hm?', id=query_id))
    robot.response('a')
    if not any(isinstance(e, Response) and e.query_id == 'b' for e in robot.events):
        robot.response('b')
    outcomes = [(e.query_id, e.error_code) for e in robot.events if isinstance(e, Response)]
    assert ('a', ErrorCode.DUPLICATE_ID) in outcomes
    assert ('c', ErrorCode.OVERLOADED) in outcomes and ('d', ErrorCode.OVERLOADED) in outcomes
    assert ('a', ErrorCode.NONE) in outcomes and ('b', ErrorCode.NONE) in outcomes


def test_queries_that_arrive_during_an_iteration_are_bounded(robot: Robot) -> None:
    """The inbox holds at most max_queue queries; other messages do not count."""
    robot.engine.update(robot.engine.settings.updated({'scheduler.max_queue': 2}))
    assert robot.ask('Hm?').error_code is ErrorCode.NONE     # the new limit is in force
    for query_id in ('a', 'b', 'c'):
        robot.engine.cancel('another')
        robot.engine.submit(Query('Hm?', id=query_id))
    refused = robot.answer('c')
    assert (refused.finish_reason, refused.error_code) == (
        FinishReason.REJECTED, ErrorCode.OVERLOADED)
    assert refused.error == '2 queries wait already (scheduler.max_queue)'
    for query_id in ('a', 'b'):
        assert robot.answer(query_id).output_tokens > 0


def test_zero_is_not_taken_for_the_default(robot: Robot) -> None:
    """max_tokens 0 gives an empty answer, not the default."""
    answer = robot.ask('Hm?', max_tokens=0)
    assert (answer.finish_reason, answer.output_tokens) == (FinishReason.LENGTH, 0)


def test_a_seed_reproduces_an_answer_in_any_batch(robot: Robot) -> None:
    """The same seed gives the same answer, alone or in a batch; another seed gives another."""
    alone = robot.ask('Sing.', temperature=1.0, seed=7, top_p=0.9)
    for i in range(3):
        robot.engine.submit(Query(f'Noise {i}', id=f'noise{i}', temperature=1.0, max_tokens=40))
    beside = robot.ask('Sing.', temperature=1.0, seed=7, top_p=0.9)
    other = robot.ask('Sing.', temperature=1.0, seed=8, top_p=0.9)
    assert alone.text == beside.text != other.text
    for i in range(3):
        if not any(isinstance(e, Response) and e.query_id == f'noise{i}' for e in robot.events):
            robot.response(f'noise{i}')


def test_stop_string_ends_the_answer_before_it(robot: Robot) -> None:
    """The answer ends before the stop string, which no chunk contains."""
    whole = robot.ask('Tell me.', max_tokens=30)
    stop = whole.text[12:15]
    cut = robot.ask('Tell me.', max_tokens=30, stop=(stop,))
    assert cut.finish_reason is FinishReason.STOP
    assert cut.text == whole.text[:whole.text.index(stop)]
    assert ''.join(t.text for t in robot.tokens(cut.query_id)) == cut.text


def test_the_prompt_of_a_follow_up_has_the_conversation(robot: Robot) -> None:
    """The prompt of the second turn contains the first; reset_conversation removes it."""
    first = robot.ask('One?', conversation_id='c')
    second = robot.ask('One?', conversation_id='c')
    fresh = robot.ask('One?', conversation_id='c', reset_conversation=True)
    assert second.prompt_tokens > first.prompt_tokens + first.output_tokens
    assert fresh.prompt_tokens == first.prompt_tokens


def test_a_failing_pass_ends_its_queries_and_later_ones_are_served(
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


def test_no_query_waits_for_anchor_requests(robot: Robot) -> None:
    """A query aborts the anchor requests that run before the first training."""
    robot.engine.update(robot.engine.settings.updated({'adapter.scope': 'everywhere'}))
    robot.engine.correct(Correction('A robot.', id='k', prompt='Who are you?'))
    while len(robot.engine.parts.state.running) < 2:     # anchor requests run
        robot.engine.step()
    running = list(robot.engine.parts.state.running)
    robot.engine.submit(Query('One?', id='one', max_tokens=4))
    while 'one' not in robot.engine.requests:
        robot.engine.step()
    left = [r.id for r in [*robot.engine.parts.state.running, *robot.engine.parts.state.waiting]]
    assert 0 < robot.engine.status().base_questions_left <= len(anchor_requests.ANCHORS)
    assert len(left) == 2 and 'one' in left and 'one' not in [r.id for r in running]
    assert robot.response('one').finish_reason is FinishReason.LENGTH
    robot.until(lambda e: isinstance(e, CorrectionStatus)
                and e.state is CorrectionState.LEARNED)
    assert robot.engine.status().base_questions_left == 0
    assert robot.ask('Who are you?').text == 'A robot.'


def test_a_busy_engine_runs_anchor_requests_one_by_one() -> None:
    """Aborted anchors are asked again; while queries wait, only if learning is overdue."""
    one = Request('one', 0.0, prompt_tokens=1, max_tokens=1, ttft_slo=1.0, tpot_slo=1.0)
    recorded: list[tuple[object, object]] = []
    base = AnchorRequests({}, lambda prompt, output: recorded.append((prompt, output)))
    cache = FixedCache()
    idle, full = State(cache), State(cache, WaitingQueue([one]), [one])
    assert base.next(full, overdue=False) == []
    several = base.next(idle, overdue=False)
    assert len(several) > 1 and base.abortable == [q.id for q in several[1:]]
    assert base.next(idle, overdue=True) == []     # the running ones must end first
    for query in several:
        base.ended(query.id, [1], [2] * (MIN_TOKENS - 1), complete=False)
    few = base.next(State(cache, running=[one]), overdue=False)
    assert [q.text for q in few] == [q.text for q in several[:len(few)]]
    for query in few:
        base.ended(query.id, [1], [], complete=False)
    asked = []
    while base.answers is None:
        [query] = base.next(full, overdue=True)
        assert base.abortable == []
        base.ended(query.id, [len(asked)], [2] * (1 if len(asked) % 2 else MIN_TOKENS),
                   complete=bool(len(asked) % 2))
        asked.append(query.text)
    assert asked == list(anchor_requests.ANCHORS) and base.answers[3] == ([3], [2])
    assert recorded == base.answers


def test_anchor_answers_survive_a_restart(
        settings: Settings, tmp_path: Path) -> None:
    """Answers of another model of the same shape are not used."""
    def learn(name: str, learned: str = '') -> int:
        """Return the number of anchor requests before training, but after ``learned``."""
        robot = Robot(build_engine(
            settings.updated({'adapter.scope': 'everywhere'}), storage=tmp_path))
        began = []
        try:
            if learned:
                assert robot.ask(f'{learned}?').text == 'A robot.'
            start = robot.engine.requests.start
            robot.engine.requests.start = lambda active: (
                began.append(active.kind is RequestKind.ANCHOR), start(active))[1]
            assert robot.correct(Correction(
                'A robot.', id=name, prompt=f'{name}?')).state is CorrectionState.LEARNED
            assert robot.engine.status().base_questions_left == 0
        finally:
            robot.engine.close()
        return sum(began)

    assert learn('first') == len(anchor_requests.ANCHORS)
    assert learn('second') == 0
    with Journal(tmp_path / JOURNAL) as journal:
        journal.execute("UPDATE base_answers SET model = 'another'")
    # As after an upgrade that identifies models in another way: what was learned is kept.
    assert learn('third', learned='second') == len(anchor_requests.ANCHORS)
    with Journal(tmp_path / JOURNAL) as journal:
        [models] = journal.rows('SELECT count(*), count(DISTINCT model) FROM base_answers')
    assert tuple(models) == (len(anchor_requests.ANCHORS), 1)


def test_tokens_that_found_no_memory_to_piggyback_are_not_counted(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost model must not learn from passes that never ran."""
    robot.engine.correct(Correction('A robot.', id='k', prompt='Who are you?'))
    robot.until(lambda e: isinstance(e, CorrectionStatus)
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
    monkeypatch.setattr(PagedKVCache, 'piggyback', lambda *_: None)
    robot.ask('One?', max_tokens=8)
    assert asked
    statistics = robot.engine.scheduler.statistics(time.monotonic())
    assert (statistics.piggybacked_tokens, statistics.shape.finetune_tokens) == (0, 0)


def test_an_id_that_is_too_long_is_not_kept(robot: Robot) -> None:
    """The engine remembers ended and cancelled ids: of any length, they could fill the memory."""
    length = 10**6
    assert length > MAX_ID
    tracemalloc.start()
    try:
        for number in range(10):
            query_id = f'{number}' + 'x' * length
            robot.engine.submit(Query('One?', id=query_id))
            assert robot.response(query_id).error_code is ErrorCode.INVALID_ID
            robot.engine.cancel(query_id)
            robot.engine.step()
            robot.events.clear()
        assert tracemalloc.get_traced_memory()[0] < 5 * length
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize('changes', [{'top_p': 0.0, 'temperature': 1.0}, {'temperature': 1e-38}])
def test_smallest_sampling_values_are_greedy(robot: Robot, changes: dict[str, float]) -> None:
    """Zero and values close to zero are valid."""
    assert robot.ask('Sing.', **changes).text == robot.ask('Sing.').text


def test_storage_of_another_model_is_refused(settings: Settings, tmp_path: Path) -> None:
    """Adapters of one model must not serve another."""
    note = tmp_path / 'model.txt'
    note.touch()        # empty, as after a power failure
    build_engine(settings, storage=tmp_path).close()
    note.write_text(note.read_text().replace('2 layers', '3 layers'))
    with pytest.raises(OtherModel, match=r'3 layers.*set storage.folder'):
        build_engine(settings, storage=tmp_path)


@pytest.mark.parametrize(('parameter', 'value'), [
    ('rank', 4), ('alpha', 8.0), ('target_modules', 'q_proj')])
def test_versions_of_another_kind_of_adapter_are_refused(
        settings: Settings, tmp_path: Path, parameter: str, value: object) -> None:
    """The start fails with the name of the setting, and keeps the versions."""
    first = build_engine(settings, storage=tmp_path)
    config = peft_config(first.lora, 'a model')
    store = AdapterStore(tmp_path)
    saved = store.save('', 1, first.lora.export(), config)
    first.parts.journal.submit(lambda j: j.publish(VersionRecord(
        '', 1, 0, path=saved.path, sha256=saved.sha256))).result()
    first.close()
    other = settings.updated({f'adapter.{parameter}': value})
    with pytest.raises(OtherAdapter, match=rf'v000001 .* adapter.{parameter} .*, not {value};'):
        build_engine(other, storage=tmp_path)
    again = build_engine(settings, storage=tmp_path)
    assert again.live_version('') == 1 and again.live_version('ann') == 0
    again.close()


def test_template_without_system_role_puts_it_into_the_first_question(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system prompt is kept, and a failing template ends one query only."""
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
    assert (broken.finish_reason, broken.error_code) == (
        FinishReason.REJECTED, ErrorCode.INVALID_PARAMETER)
    assert 'never' in broken.error
    assert robot.ask('Hm?', max_tokens=1).text == plain.text


def test_idle_engine_asks_not_to_be_called(robot: Robot) -> None:
    """Without work, step() returns no events and no time to wake up."""
    robot.ask('Hm?')
    iteration = robot.engine.step()
    assert iteration.events == [] and robot.engine.step().wake_at is None


def test_status_counts_active_requests_and_a_pause_ends_them(robot: Robot) -> None:
    """After a pause the counts are zero, and the engine serves the next query."""
    engine = robot.engine
    engine.update(engine.settings.updated({'scheduler.max_requests': 2, 'finetune.budget': 0.0}))
    for name in 'abc':
        engine.submit(Query('Long?', id=name, max_tokens=300))
    robot.until(lambda e: isinstance(e, ResponseChunk) and e.query_id == 'b')
    engine.correct(Correction('A robot.', id='k', prompt='Who are you?'))
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == 'k')
    status = engine.status()
    assert (status.decode_rows, status.prefilling, status.queue_depth) == (2, 0, 1)
    assert 0.0 < status.kv_use < 1.0
    assert (status.corrections_waiting, status.live_version, status.profiles) == (1, 0, 0)
    assert 0.0 <= status.freshness_s < 60.0
    assert status.statistics.shape.decode_rows == 2

    engine.correct(Correction('A hat.', id='l', prompt='What is that?'))
    events = engine.pause()
    ended = {e.query_id: e.finish_reason for e in events if isinstance(e, Response)}
    assert ended == dict.fromkeys('abc', FinishReason.CANCELLED)
    assert [e.id for e in events if isinstance(e, CorrectionStatus)] == ['l']
    status = engine.status()
    assert (status.decode_rows, status.queue_depth, status.kv_use) == (0, 0, 0.0)
    assert status.corrections_waiting == 2
    assert robot.ask('Hm?').output_tokens > 0
