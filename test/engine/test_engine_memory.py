# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The engine with little memory: the answers are the same, and every request ends."""

from __future__ import annotations

from itertools import count
import math
from pathlib import Path
import subprocess
import sys
import time

import pytest
from support.robot import RANDOM_MODEL, Robot, robot_with, SYSTEM

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
from mace_ros.api.settings import InvalidSetting, Settings
from mace_ros.engine.builder import build_engine
from mace_ros.finetune.footprint import measure_footprint
from mace_ros.memory.budget import MIN_CHUNK_TOKENS
from mace_ros.model.heap import AFTER_LEARNING_S, CHECK_S, HeapTrimmer, NEAR

PROMPT = 'Tell me about number {}, and what it is good for.'


@pytest.fixture(scope='module')
def settings(model_folder: Path) -> Settings:
    """Return settings for the tiny model, without learning."""
    return Settings().updated({
        'model.source': str(model_folder), 'model.device': 'cpu', 'model.threads': 1,
        'model.weight_dtype': 'float32', 'finetune.budget': 0.0})


@pytest.fixture(scope='module')
def large_head(settings: Settings, all_tokens: Path) -> Settings:
    """Return settings for a model whose head takes most of the memory of a fine-tune step."""
    return settings.updated({'model.source': str(all_tokens)})


def answer(robot: Robot, query_id: str) -> Response:
    """Return the response to a query, which may be among the recorded events already."""
    return next((e for e in robot.events if isinstance(e, Response) and e.query_id == query_id),
                None) or robot.response(query_id)


def answers(robot: Robot, count: int, **values: object) -> dict[str, str]:
    """Ask several queries at once; return each text, which its chunks must add up to."""
    queries = [Query(PROMPT.format(n), id=str(n), seed=n, **values) for n in range(count)]  # type: ignore[arg-type]
    for query in queries:
        robot.engine.submit(query)
    texts: dict[str, str] = {}
    for number in map(str, range(count)):
        event = answer(robot, number)
        assert event.finish_reason in (FinishReason.STOP, FinishReason.LENGTH), event
        pieces = robot.tokens(event.query_id)
        assert [p.index for p in pieces] == list(range(len(pieces)))
        assert ''.join(p.text for p in pieces) == event.text
        texts[event.query_id] = event.text
    return texts


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_too_little_memory_changes_no_answer(
        settings: Settings, tmp_path: Path, temperature: float) -> None:
    """With a quarter of the blocks, all queries end by preemption, with the same answers."""
    with robot_with(settings, tmp_path / 'a', memory__kv_cache_tokens=16384) as roomy:
        expected = answers(roomy, 8, max_tokens=100, temperature=temperature)
        assert roomy.engine.status().preemptions == 0
    with robot_with(settings, tmp_path / 'b', memory__kv_cache_tokens=304) as tight:
        assert answers(tight, 8, max_tokens=100, temperature=temperature) == expected
        assert tight.engine.status().preemptions > 0


def test_a_query_that_cannot_fit_is_rejected_by_name(settings: Settings, tmp_path: Path) -> None:
    """The answer gets the tokens that the prompt leaves; without any, the query is rejected."""
    with robot_with(settings, tmp_path, memory__kv_cache_tokens=256) as small:
        refused = small.ask('word ' * 300)
        assert refused.error_code is ErrorCode.PROMPT_TOO_LONG and '255 fit' in refused.error
        cut = small.ask('Long?', max_tokens=1000)
        assert cut.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        assert cut.prompt_tokens + cut.output_tokens <= 256


def test_a_conversations_prefix_is_computed_once(settings: Settings, tmp_path: Path) -> None:
    """The prefix cache holds the system prompt and earlier turns, if sharing is on."""
    computed, texts = {}, {}
    for sharing in (True, False):
        with robot_with(settings, tmp_path / str(sharing), memory__prefix_sharing=sharing) as one:
            before = one.engine.status().statistics.prefill_tokens
            texts[sharing] = [
                one.ask(f'Question {n}?', conversation_id='c', system=SYSTEM, max_tokens=20).text
                for n in range(5)]
            status = one.engine.status()
            computed[sharing] = status.statistics.prefill_tokens - before
            assert (status.shared_tokens > 0) == sharing
    assert texts[True] == texts[False]
    assert computed[True] <= 0.3 * computed[False]


def test_a_long_conversation_drops_many_turns_at_once(settings: Settings, tmp_path: Path) -> None:
    """If turns were dropped one by one, no prompt would share a prefix with the one before."""
    with robot_with(settings, tmp_path, conversation__max_turns=6) as one:
        prompts, computed = [], []
        for n in range(20):
            before = one.engine.status().statistics.prefill_tokens
            prompts.append(one.ask(
                f'Question {n}?', conversation_id='c', max_tokens=20).prompt_tokens)
            computed.append(one.engine.status().statistics.prefill_tokens - before)
    assert max(prompts[7:]) < 1.1 * max(prompts[:7])    # up to the limit
    assert 2 * sum(computed[7:]) < sum(prompts[7:])


def test_prefix_sharing_can_be_switched_while_serving(settings: Settings, tmp_path: Path) -> None:
    """A change of the parameter is in force at the next query."""
    with robot_with(settings, tmp_path) as one:
        def shared() -> int:
            before = one.engine.status().shared_tokens
            one.ask('Hm?', system=SYSTEM, max_tokens=1)
            return one.engine.status().shared_tokens - before

        assert shared() == 0 and shared() > 80
        one.engine.update(one.engine.settings.updated({'memory.prefix_sharing': False}))
        assert shared() == 0 and shared() == 0
        assert one.engine.status().kv_cached == 0.0
        one.engine.update(one.engine.settings.updated({'memory.prefix_sharing': True}))
        assert shared() == 0 and shared() > 80


def test_preempted_requests_can_be_cancelled(settings: Settings, tmp_path: Path) -> None:
    """A preempted request ends like any other."""
    with robot_with(settings, tmp_path, memory__kv_cache_tokens=256) as tight:
        for name in 'abcd':
            tight.engine.submit(Query(PROMPT.format(name), id=name, max_tokens=120))
        while tight.engine.status().preemptions == 0:
            tight.until(lambda e: isinstance(e, ResponseChunk))
        for name in 'abcd':
            tight.engine.cancel(name)
        ended = [e for e in tight.engine.step().events if isinstance(e, Response)]
        assert len(ended) + sum(isinstance(e, Response) for e in tight.events) == 4


def test_a_smaller_budget_is_kept_while_serving_and_changes_no_answer(
        settings: Settings, tmp_path: Path) -> None:
    """Requests are preempted until it holds; after it has grown again, no limit remains."""
    with robot_with(settings, tmp_path / 'a') as roomy:
        expected = answers(roomy, 6, max_tokens=150)
    with robot_with(settings, tmp_path / 'b') as one:
        engine = one.engine
        everything, fixed = engine.free_kv_tokens, engine.status().planned_mb
        for n in range(6):
            engine.submit(Query(PROMPT.format(n), id=str(n), seed=n, max_tokens=150))
        one.until(lambda e: isinstance(e, ResponseChunk) and e.index == 60)
        used = engine.status()
        budget = fixed + 0.4 * (used.planned_mb - fixed)
        engine.update(engine.settings.updated({'memory.budget_mb': budget}))
        while len([e for e in one.events if isinstance(e, Response)]) < 6:
            one.until(lambda e: True)
            status = engine.status()
            # The budget may be below the minimum, which depends on the progress of each request.
            assert status.planned_mb <= status.budget_mb + 1e-6 or status.preemptions == 0
        assert engine.status().preemptions > used.preemptions
        assert {e.query_id: e.text for e in one.events if isinstance(e, Response)} == expected
        assert engine.free_kv_tokens < 0.2 * everything
        refused = one.ask('word ' * 1000)
        assert refused.error_code is ErrorCode.PROMPT_TOO_LONG
        engine.update(engine.settings.updated({'memory.budget_mb': 0.0}))
        assert one.ask('Hm?').text
        assert engine.free_kv_tokens == everything


def test_blocks_that_cannot_be_moved_are_computed_again(
        settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moving blocks may fail for lack of memory; the answers stay the same."""
    with robot_with(settings, tmp_path / 'a') as roomy:
        expected = answers(roomy, 6, max_tokens=150)
    with robot_with(settings, tmp_path / 'b') as one:
        engine, move, failed = one.engine, one.engine.model.move_blocks, []

        def fail_once(moved: dict[int, int]) -> None:
            if not failed:
                failed.append(moved)
                raise MemoryError('injected')
            move(moved)

        monkeypatch.setattr(engine.model, 'move_blocks', fail_once)
        fixed = engine.status().planned_mb
        for n in range(6):
            engine.submit(Query(PROMPT.format(n), id=str(n), seed=n, max_tokens=150))
        one.until(lambda e: isinstance(e, ResponseChunk) and e.index == 60)
        budget = fixed + 0.4 * (engine.status().planned_mb - fixed)
        engine.update(engine.settings.updated({'memory.budget_mb': budget}))
        assert {str(n): answer(one, str(n)).text for n in range(6)} == expected
        assert failed
        engine.update(engine.settings.updated({'memory.budget_mb': 0.0}))
        engine.step()


def test_a_budget_below_the_minimum_is_raised_to_it(settings: Settings, tmp_path: Path) -> None:
    """No request waits for memory that never becomes free."""
    with robot_with(settings, tmp_path) as one:
        engine = one.engine
        engine.submit(Query('Long?', id='long', max_tokens=100))
        one.until(lambda e: isinstance(e, ResponseChunk) and e.index == 5)
        engine.update(engine.settings.updated({'memory.budget_mb': 0.001}))
        assert answer(one, 'long').output_tokens > 5
        assert one.ask('Hm?').text
        assert engine.status().budget_mb > 0.001
        engine.update(engine.settings.updated({'memory.budget_mb': 0.0}))
        engine.step()


def test_a_long_answer_ends_when_the_memory_is_full(settings: Settings, tmp_path: Path) -> None:
    """A request whose tokens fill the rest of the budget ends with LENGTH."""
    with robot_with(settings, tmp_path) as one:
        engine = one.engine
        fixed = engine.status().planned_mb
        engine.submit(Query('Long?', id='long', max_tokens=2000))
        one.until(lambda e: isinstance(e, ResponseChunk) and e.index == 400)
        half = fixed + 0.5 * (engine.status().planned_mb - fixed)
        engine.update(engine.settings.updated({'memory.budget_mb': half}))
        ended = one.response('long')
        assert ended.finish_reason is FinishReason.LENGTH and 400 <= ended.output_tokens < 500
        engine.update(engine.settings.updated({'memory.budget_mb': 0.0}))
        engine.step()


def test_a_budget_too_small_to_serve_is_refused_by_name(
        settings: Settings, tmp_path: Path) -> None:
    """The error names the parameter and the memory needed."""
    with pytest.raises(InvalidSetting, match=r'memory\.budget_mb: 1 MB .* are needed'):
        build_engine(settings.updated({'memory.budget_mb': 1.0}), storage=tmp_path)


def test_learning_and_answers_share_a_small_budget(settings: Settings, tmp_path: Path) -> None:
    """A step fits without its graphs only; queries come first, and learning ends as well."""
    values = {'finetune.budget': 1.0, **RANDOM_MODEL}
    with robot_with(settings.updated(values), tmp_path) as one:
        engine = one.engine
        fixed = engine.status().planned_mb
        footprint = measure_footprint(engine.model, engine.lora)
        room, graphs = (footprint.step_bytes([300], keep_graphs=k) / 1e6 for k in (False, True))
        wrong = one.ask('Who are you?')
        engine.update(engine.settings.updated({'memory.budget_mb': fixed + room}))
        # Fine-tune steps compete with answers that need all of the memory.
        for n in range(4):
            engine.submit(Query(PROMPT.format(n), id=f'long{n}', max_tokens=600))
        planned = []
        step, engine.step = engine.step, lambda: (planned.append(engine.status()), step())[1]
        learned = one.correct(Correction('I am Rover.', id='k', query_id=wrong.query_id))
        assert learned.state is CorrectionState.LEARNED, learned
        for n in range(4):
            assert answer(one, f'long{n}').finish_reason in (
                FinishReason.STOP, FinishReason.LENGTH)
        assert one.ask('Who are you?').text == 'I am Rover.'
        # There was a step, without its graphs, and the total never exceeded the budget.
        learning = [s.planned_mb for s in planned if s.planned_mb > fixed + 0.8 * room]
        assert learning and max(s.planned_mb for s in planned[1:]) <= fixed + room < fixed + graphs
        engine.update(engine.settings.updated({'memory.budget_mb': 0.0}))
        engine.step()


def test_matrix_products_of_many_sizes_do_not_fill_the_memory() -> None:
    """The kernel cache is bounded; without a bound it would take several hundred MB."""
    script = """
from pathlib import Path
import re

import torch

from mace_ros.model.hardware import limit_kernel_caches

def resident_mb():
    return int(re.search(r'RssAnon:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 1e3

limit_kernel_caches()
weights = [torch.randn(n, 576, dtype=torch.bfloat16) for n in (960, 576, 1536, 3072)]
before = resident_mb()
for tokens in range(100, 260):
    for weight in weights:
        torch.nn.functional.linear(torch.zeros(tokens, 576, dtype=torch.bfloat16), weight)
print(resident_mb() - before)
"""
    ran = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 150.0


def test_gaps_in_the_heap_are_returned_to_the_system() -> None:
    script = """
from pathlib import Path
import re

import torch

from mace_ros.model.heap import limit_heap, return_free_memory

def resident_mb():
    return int(re.search(r'RssAnon:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 1e3

def gaps(megabytes, count):
    'Return the growth of resident memory by freed tensors between ones that stay.'
    before, large = resident_mb(), []
    for _ in range(count):
        large.append(torch.ones(int(megabytes * 250_000)))
        stays.append(torch.ones(10_000))
    del large
    return resident_mb() - before

stays = []
limit_heap()
for megabytes in (8, 16, 30):     # by default glibc would map none of these sizes from now on
    torch.ones(megabytes * 250_000)
print(gaps(2, 50), gaps(0.5, 200))
before = resident_mb()
return_free_memory()
print(before - resident_mb())
"""
    ran = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    large, small, returned = map(float, ran.stdout.split())
    assert large < 20.0
    assert small > 80.0       # which is why ...
    assert returned > 80.0


def test_free_memory_is_returned_near_the_budget(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Also some time after a fine-tune step, but not repeatedly without effect."""
    private, returned = [1000.0], []
    monkeypatch.setattr('mace_ros.model.heap.private_bytes', lambda: private[0])
    monkeypatch.setattr('mace_ros.model.heap.return_free_memory', lambda: returned.append(1))
    heap = HeapTrimmer(300.0, 0.0)      # the remaining 700 do not count towards the budget
    returned.clear()
    times = iter(range(10 ** 6))

    def tended(budget: float, seconds: float = 2 * CHECK_S) -> int:
        before = len(returned)
        now = next(times) * 60.0
        heap.trim(now, budget)
        heap.trim(now + CHECK_S / 2, budget)      # too soon to measure again
        heap.trim(now + seconds, budget)
        return len(returned) - before

    assert tended(301.0 / NEAR) == 0
    assert tended(299.0 / NEAR) == 2
    private[0] = math.nan
    assert tended(0.0) == 0
    heap.step_ended(next(times) * 60.0 - 59.0)
    assert tended(0.0) == 1
    assert AFTER_LEARNING_S < 59.0

    now = next(times) * 60.0
    heap.step_ended(now)
    heap.trim(now, math.inf)
    assert len(returned) == 3
    heap.trim(now, math.inf, idle=True)     # no request is waiting
    heap.trim(now, math.inf, idle=True)
    assert len(returned) == 4

    def slow() -> None:
        returned.append(1)
        time.sleep(0.03)

    private[0] = 1000.0
    monkeypatch.setattr('mace_ros.model.heap.return_free_memory', slow)
    assert tended(299.0) == 1
    assert tended(299.0, 3.0) == 2


def test_the_engine_returns_memory_near_its_budget(
        settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    returned = []
    with robot_with(settings, tmp_path) as one:
        monkeypatch.setattr('mace_ros.model.heap.CHECK_S', 0.0)
        monkeypatch.setattr(
            'mace_ros.model.heap.return_free_memory', lambda: returned.append(1))
        one.ask('Who are you?')
        assert not returned
        monkeypatch.setattr('mace_ros.model.heap.private_bytes', lambda: math.inf)
        one.ask('Where are you?')
        assert returned


def test_a_correction_too_large_for_the_memory_fails_by_name(
        settings: Settings, tmp_path: Path) -> None:
    """Also without queries; a shorter correction is learned afterwards."""
    values = {'finetune.budget': 1.0, **RANDOM_MODEL}
    with robot_with(settings.updated(values), tmp_path) as one:
        engine = one.engine
        footprint = measure_footprint(engine.model, engine.lora)
        room = sum(footprint.step_bytes([n], keep_graphs=False, chunk_tokens=MIN_CHUNK_TOKENS)
                   for n in (100, 300)) / 2e6
        long, short = one.ask('word ' * 300, max_tokens=1), one.ask('Who are you?')
        engine.update(engine.settings.updated(
            {'memory.budget_mb': engine.status().planned_mb + room}))
        failed = one.correct(Correction('I am Rover.', id='long', query_id=long.query_id))
        assert failed.state is CorrectionState.FAILED
        assert 'memory.budget_mb' in failed.reason and 'needed to learn' in failed.reason
        learned = one.correct(Correction('I am Rover.', id='short', query_id=short.query_id))
        assert learned.state is CorrectionState.LEARNED, learned
        engine.update(engine.settings.updated({'memory.budget_mb': 0.0}))
        engine.step()


def test_a_step_that_does_not_fit_whole_runs_in_chunks(
        large_head: Settings, tmp_path: Path) -> None:
    values = {'finetune.budget': 1.0, **RANDOM_MODEL}
    with robot_with(large_head.updated(values), tmp_path) as one:
        engine = one.engine
        room = measure_footprint(engine.model, engine.lora).max_step_bytes(150) / 1e6
        long = one.ask('word ' * 300, max_tokens=1)
        engine.update(engine.settings.updated(
            {'memory.budget_mb': engine.status().planned_mb + room}))
        learned = one.correct(Correction('I am Rover.', id='long', query_id=long.query_id))
        assert learned.state is CorrectionState.LEARNED, learned
        assert one.ask('word ' * 300).text == 'I am Rover.'


def test_evicted_learning_resumes_when_idle(
        settings: Settings, tmp_path: Path) -> None:
    values = {'finetune.budget': 1.0, **RANDOM_MODEL}
    with robot_with(settings.updated(values), tmp_path) as one:
        engine = one.engine
        wrong = one.ask('Who are you?')
        room = measure_footprint(engine.model, engine.lora).max_step_bytes(150) / 1e6
        engine.update(engine.settings.updated(
            {'memory.budget_mb': engine.status().planned_mb + room}))
        engine.correct(Correction('I am Rover.', id='k', query_id=wrong.query_id))
        # With so small a model, a step may end in the iteration that started it.
        while (step := engine.parts.memory.granted) is None or step.done:
            one.events += engine.step().events
        assert engine.parts.memory.reclaim(lacks_memory=True)
        one.events += engine.step().events
        assert engine.parts.memory.granted is not None
        engine.update(engine.settings.updated({'memory.budget_mb': 0.0}))
        engine.step()


def test_overdue_learning_gets_its_memory_under_any_load(
        large_head: Settings, tmp_path: Path) -> None:
    """Admission reserves the memory of a step, so no running request is preempted for it."""
    values = {'finetune.budget': 1.0, **RANDOM_MODEL,
              'slo.freshness_s': 1.0, 'finetune.min_share': 0.9, 'drift.min_budget': 1.0,
              'scheduler.max_requests': 4}
    with robot_with(large_head.updated(values), tmp_path) as one:
        engine, memory = one.engine, one.engine.parts.memory
        first, wrong = one.ask('Who made you?'), one.ask('Who are you?')
        one.correct(Correction('My maker.', id='first', query_id=first.query_id))
        room = memory.budget.footprint.min_step_bytes([100]) + 1e6
        engine.update(engine.settings.updated(
            {'memory.budget_mb': (memory.budget.fixed + room) / 1e6}))
        numbers = count()

        def ask() -> None:
            number = next(numbers)
            engine.submit(Query(f'{number} {"word " * 500}', id=f'{number}', max_tokens=50))

        for _ in range(8):
            ask()
        engine.correct(Correction('I am Rover.', id='k', query_id=wrong.query_id))
        end, state, most_held, preempted = time.monotonic() + 120.0, None, 0, 0
        while state is not CorrectionState.LEARNED:
            assert time.monotonic() < end
            waits = engine.learner.step is not None and not memory.budget.learning
            if waits:
                most_held = max(most_held, engine.parts.pool.held_blocks)
                preempted -= engine.parts.kv_cache.preemptions
            for event in engine.step().events:
                if isinstance(event, Response):
                    assert event.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
                    ask()
                elif isinstance(event, CorrectionStatus):
                    state = event.state
            if waits:
                preempted += engine.parts.kv_cache.preemptions
        assert most_held > memory.budget.kv_beside(room - 1e6) and not preempted
        engine.update(engine.settings.updated({'memory.budget_mb': 0.0}))
        for number in range(next(numbers)):
            engine.cancel(f'{number}')
        engine.step()


def test_a_step_layout_error_fails_the_job_and_not_the_engine(
        settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {'finetune.budget': 1.0, **RANDOM_MODEL}
    with robot_with(settings.updated(values), tmp_path) as one:
        engine = one.engine
        wrong = one.ask('Who are you?')
        grant, failures = engine.parts.memory.grant, iter([MemoryError('none left')])

        def failing(step: object, **values: bool) -> bool:
            error = None if step is None else next(failures, None)
            if error is not None:
                raise error
            return grant(step, **values)     # type: ignore[arg-type]

        monkeypatch.setattr(engine.parts.memory, 'grant', failing)
        learned = one.correct(Correction('I am Rover.', id='k', query_id=wrong.query_id))
        assert learned.state is CorrectionState.LEARNED
        assert next(failures, None) is None


def test_a_publication_leaves_the_prefix_cache_warm(settings: Settings, tmp_path: Path) -> None:
    """What comes before the last user turn is the base model's under every version."""
    values = {'finetune.budget': 1.0, **RANDOM_MODEL}
    with robot_with(settings.updated(values), tmp_path) as one:
        wrong = one.ask('Who are you?', system=SYSTEM)
        learned = one.correct(Correction('I am Rover.', id='k', query_id=wrong.query_id))
        assert learned.state is CorrectionState.LEARNED
        before = one.engine.status()
        answered = one.ask('Who are you?', system=SYSTEM)
        after = one.engine.status()
        assert answered.adapter_version == learned.adapter_version == 1
        assert answered.text == 'I am Rover.'
        assert after.shared_tokens - before.shared_tokens > 80


def learned_conversation(one: Robot) -> None:
    """Correct an answer, and ask in other words, which the base model has never computed."""
    question = f'Who are you, {"my dear " * 40}robot?'
    wrong = one.ask(question, system=SYSTEM, conversation_id='c')
    learned = one.correct(Correction('I am Rover.', id='k', query_id=wrong.query_id))
    assert learned.state is CorrectionState.LEARNED
    one.ask('Hm?', conversation_id='d')     # ends the idle time
    again = one.ask(f'Please say. {question}', system=SYSTEM, conversation_id='c',
                    reset_conversation=True)
    assert again.adapter_version == 1 and again.matched_correction_id == 'k'


def test_history_that_an_adapter_wrote_is_computed_again_in_idle_time(
        settings: Settings, tmp_path: Path) -> None:
    values = {'finetune.budget': 1.0, **RANDOM_MODEL}
    with robot_with(settings.updated(values), tmp_path) as one:
        learned_conversation(one)
        while one.engine.step().wake_at is not None:
            pass
        before = one.engine.status()
        followed = one.ask('And you?', conversation_id='c', max_tokens=1)
        shared = one.engine.status().shared_tokens - before.shared_tokens
        assert followed.prompt_tokens - shared < 48      # the last turn and a partial block


def test_a_query_interrupts_the_computing_of_history(settings: Settings, tmp_path: Path) -> None:
    """The request is cancelled at once, and starts again when the engine is idle."""
    values = {'finetune.budget': 1.0, **RANDOM_MODEL}
    with robot_with(settings.updated(values), tmp_path) as one:
        engine = one.engine
        learned_conversation(one)
        engine.step()
        assert engine.status().queue_depth == 0
        computed = engine.status().statistics.prefill_tokens
        asked = one.ask('Hm?', max_tokens=1)
        assert engine.status().statistics.prefill_tokens - computed <= asked.prompt_tokens
        while engine.step().wake_at is not None:
            pass
        before = engine.status().shared_tokens
        followed = one.ask('And you?', conversation_id='c', max_tokens=1)
        assert followed.prompt_tokens - (engine.status().shared_tokens - before) < 48
