# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The engine learns corrections, with a small random model and the real tokenizer."""

from collections.abc import Callable, Sequence
from dataclasses import replace
import errno
import math
from pathlib import Path
import threading
import time
from typing import Any

import pytest
from support.robot import correct, DONE, Robot, running, until_state
import torch

from mace_ros.api.events import (
    AdapterVersion,
    Correction,
    CorrectionState,
    CorrectionStatus,
    Event,
    FinishReason,
    Query,
    Response,
    ResponseChunk,
    VersionState,
)
from mace_ros.api.settings import Settings
from mace_ros.engine.builder import build_engine
from mace_ros.finetune.sample import Sample
from mace_ros.finetune.step import FinetuneStep
from mace_ros.finetune.trainer import Trainer
from mace_ros.learning import backoff, criteria, gate, learner, selection
from mace_ros.learning.acceptance import Accepted
from mace_ros.learning.disk import Disk
from mace_ros.learning.drift import Drift, DriftState, MAX_PENDING
from mace_ros.learning.job import JobKind, JobState
from mace_ros.learning.task import Task
from mace_ros.learning.training import Scored, Training
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.scheduling.memory_arbiter import MemoryArbiter
from mace_ros.scheduling.plan import Segment, SegmentKind
from mace_ros.store.adapter_store import AdapterStore, CorruptVersion
from mace_ros.store.journal import Journal
from mace_ros.store.journal_file import JournalError


def test_correction_is_learned_and_a_running_request_keeps_its_version(robot: Robot) -> None:
    """Running requests keep version 0; the next uses version 1."""
    robot.engine.update(robot.engine.settings.updated({'scheduler.policy': 'continuous'}))
    wrong = robot.ask('What is your name?', conversation_id='c')
    robot.engine.submit(Query('Running?', id='running', max_tokens=3500))
    robot.until(lambda e: isinstance(e, ResponseChunk) and e.query_id == 'running')
    state = robot.correct(Correction('My name is Rover.', id='k', query_id=wrong.query_id))
    assert (state.state, state.adapter_version) == (CorrectionState.LEARNED, 1)
    running = next((e for e in robot.events if isinstance(e, Response)
                    and e.query_id == 'running'), None)
    assert running is None, 'the running query ended before the version came'
    right = robot.ask('What is your name?')
    assert (right.text, right.adapter_version) == ('My name is Rover.', 1)
    robot.engine.cancel('running')
    assert robot.response('running').adapter_version == 0
    states = [e.state for e in robot.events if isinstance(e, CorrectionStatus)]
    assert states == [CorrectionState.ACCEPTED, CorrectionState.TRAINING, CorrectionState.LEARNED]
    version = next(e for e in robot.events if isinstance(e, AdapterVersion))
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


def test_a_slow_device_splits_steps_and_returns_memory(
    robot: Robot, monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept, returned = [], []
    keep = Trainer.accumulate
    monkeypatch.setattr(Trainer, 'accumulate', lambda self: (kept.append(1), keep(self)))
    monkeypatch.setattr('mace_ros.model.heap.AFTER_LEARNING_S', 0.0)
    monkeypatch.setattr('mace_ros.model.heap.CHECK_S', 0.0)
    monkeypatch.setattr('mace_ros.model.heap.return_free_memory', lambda: returned.append(1))
    monkeypatch.setattr(MemoryArbiter, 'step_tokens', lambda self, most: 1)
    wrong = robot.ask('Who are you?')
    assert not returned
    robot.correct(Correction('A robot.', query_id=wrong.query_id, id='c'))
    assert robot.ask('Who are you?').text == 'A robot.'
    assert kept
    assert returned


def test_segments_of_a_long_correction_stay_within_the_time_limit(
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
    monkeypatch.setattr(MemoryArbiter, 'step_tokens', lambda self, most: 24)
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
    assert len([e for e in robot.events if isinstance(e, AdapterVersion)]) == 1


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
    """Each kind of bad correction is REJECTED with a reason and not learned."""
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
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == 'old')
    robot.engine.correct(Correction('A robot.', id='new', query_id=wrong.query_id))
    robot.until(lambda e: isinstance(e, CorrectionStatus)
                and e.state is CorrectionState.SUPERSEDED and e.id == 'old')
    robot.engine.update(robot.engine.settings.updated({'finetune.budget': 1.0}))
    robot.until(lambda e: isinstance(e, CorrectionStatus)
                and e.state is CorrectionState.LEARNED and e.id == 'new')
    assert robot.ask('Who are you?').text == 'A robot.'


@pytest.mark.parametrize(('changes', 'first'), [
    ({'slo.freshness_s': 1e9}, {'3', '4', '5'}),     # the weight of the oldest one is low
    ({'slo.freshness_s': 1.0}, {'0'}),
    ({'slo.freshness_s': 1.0, 'finetune.order': 'arrival'}, {'0'})])
def test_the_order_in_which_corrections_are_learned(
        robot: Robot, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object],
        first: set[str]) -> None:
    """The newest first, unless the oldest is overdue; each is scored once."""
    monkeypatch.setattr(selection, 'JOB_CANDIDATES', 4)
    monkeypatch.setattr(selection, 'JOB_CORRECTIONS', 1)
    score, scored = Training.score, []

    def noted(self: Training, samples: Sequence[Sample], *rest: Any) -> Task[Scored]:
        if running(robot).state is JobState.CHOOSING:
            scored.extend(samples)
        return score(self, samples, *rest)

    monkeypatch.setattr(Training, 'score', noted)
    settings = robot.engine.settings.updated(
        {'finetune.max_steps': 2, 'finetune.replay_samples': 1, **changes})
    robot.engine.update(settings.updated({'finetune.budget': 0.0}))
    for i in range(6):
        robot.engine.correct(Correction(
            f'Number {i}.', id=str(i), prompt=f'Question {i}?', weight=1.0 if i else 0.01))
        robot.until(lambda e, i=i: isinstance(e, CorrectionStatus) and e.id == str(i))
    time.sleep(1.0)
    robot.engine.update(settings)
    left = {str(i) for i in range(6)}
    trained = []
    while left:
        event = robot.until(lambda e: isinstance(e, CorrectionStatus))
        if event.state is CorrectionState.TRAINING:
            trained.append(event.id)
        left -= {event.id} if event.state in DONE else set()
    assert trained[0] in first
    assert len(scored) == 6
    if robot.engine.settings.finetune.order == 'arrival':
        assert trained == sorted(trained)


def test_in_calm_a_backlog_is_learned_with_the_whole_budget(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(20 + MAX_PENDING):
        robot.engine.learner.answered(f'good {i}')
    robot.ask('Who are you?', max_tokens=2)
    calm = robot.engine.status().finetune_budget
    assert calm < 0.5
    monkeypatch.setattr(robot.engine.learner, 'poll', list)         # no job begins
    for i in range(selection.JOB_CORRECTIONS):
        assert robot.engine.status().finetune_budget == calm
        robot.engine.correct(Correction('A robot.', id=str(i), prompt=f'Question {i}?'))
        robot.until(lambda e, i=i: isinstance(e, CorrectionStatus) and e.id == str(i))
        robot.engine.step()
    assert robot.engine.status().finetune_budget == robot.engine.settings.finetune.budget


def test_a_superseded_correction_keeps_its_state(robot: Robot) -> None:
    engine = robot.engine
    engine.update(engine.settings.updated({'finetune.budget': 0.0}))
    for name in ('older', 'newer'):
        engine.correct(Correction(f'The {name}.', id=name, prompt='Which one?'))
        robot.until(lambda e, name=name: isinstance(e, CorrectionStatus) and e.id == name)
    journal = engine.parts.journal
    older = journal.submit(lambda j: j.correction('older')).result()
    Disk(journal, lambda: None).set_state(older, CorrectionState.TRAINING)
    after = journal.submit(lambda j: j.correction('older')).result()
    assert after.state is CorrectionState.SUPERSEDED


@pytest.fixture
def resting(robot: Robot, monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Return the correction ids of each job of a robot in calm, which has learned one so far."""
    engine, jobs = robot.engine, []
    monkeypatch.setattr(Drift, 'state', DriftState.CALM)
    monkeypatch.setattr(Drift, 'level', 0.0)
    poll = learner.Learner.poll

    def noted(self: learner.Learner) -> list[Event]:
        events = poll(self)
        job = self.status().job
        if job is not None and job.number > len(jobs):
            jobs.append(set(job.correction_ids))
        return events

    monkeypatch.setattr(learner.Learner, 'poll', noted)
    engine.update(engine.settings.updated({
        'drift.min_budget': 0.0, 'slo.freshness_s': 1e6, 'finetune.max_steps': 2}))
    correct(robot, 'first')
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.state in DONE)
    assert jobs == [{'first'}]
    return jobs


def test_in_calm_corrections_are_learned_together_after_a_rest(
        robot: Robot, resting: list[set[str]]) -> None:
    correct(robot, '1')
    correct(robot, '2')
    for _ in range(20):
        until = robot.engine.step().wake_at
    assert until is not None and until > time.monotonic() + 1e5
    correct(robot, '1 again', about='1')    # the one that has waited longest
    assert robot.engine.step().wake_at == until
    correct(robot, '3')
    assert len(resting) == 1
    correct(robot, '4')                     # as many as a job takes
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == '4' and e.state in DONE)
    assert resting == [{'first'}, {'1 again', '2', '3', '4'}]


def test_a_rest_ends_before_a_correction_is_overdue(robot: Robot, resting: list[set[str]]) -> None:
    engine = robot.engine
    engine.update(engine.settings.updated({'slo.freshness_s': 1.0}))
    correct(robot, 'alone')
    accepted = time.monotonic()
    while len(resting) == 1:
        engine.step()
    assert 0.5 <= time.monotonic() - accepted < 30.0


def test_drift_ends_the_rest(
        robot: Robot, resting: list[set[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    correct(robot, 'another')
    monkeypatch.setattr(Drift, 'state', DriftState.DRIFTING)
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.state in DONE)
    assert resting == [{'first'}, {'another'}]


def test_the_continuous_policy_rehearses_learned_corrections(robot: Robot) -> None:
    """Rehearsal never pauses and publishes no correction status."""
    engine = robot.engine
    engine.update(engine.settings.updated({
        'scheduler.policy': 'continuous', 'finetune.period_steps': 2}))
    for name in ('1', '2'):
        correct(robot, name)
        robot.until(lambda e: isinstance(e, CorrectionStatus) and e.state in DONE)
    learned = engine.live_version('')
    told: list[Event] = []
    end = time.monotonic() + 60.0
    while engine.live_version('') < learned + 2 and time.monotonic() < end:
        told += engine.step().events
    assert engine.live_version('') >= learned + 2
    assert not [e for e in told if isinstance(e, CorrectionStatus)]
    # A repeated correction is acknowledged even if its job fails.
    while (job := engine.learner.status().job) is None or job.kind is not JobKind.REHEARSAL:
        engine.step()
    correct(robot, 'again', about='1')
    engine.learner.fail('injected')
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == 'again'
                and e.state is CorrectionState.LEARNED)


@pytest.mark.parametrize('fails', ['', 'replay_candidates', 'publish'])
def test_learning_wakes_itself(
        fails: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wait has a wake-up time or wakes the engine."""
    if fails:
        once = [JournalError('injected')]
        function = getattr(Journal, fails)

        def failing(*arguments: object) -> object:
            if once:
                raise once.pop()
            return function(*arguments)

        monkeypatch.setattr(Journal, fails, failing)
        monkeypatch.setattr(backoff, 'LONGEST_S', 0.05)
    woken = threading.Event()
    engine = build_engine(settings, storage=tmp_path / 'woken', wake=woken.set)
    try:
        engine.correct(Correction('A robot.', id='c', prompt='Who are you?'))
        states: set[CorrectionState] = set()
        while not states.intersection(DONE):
            woken.clear()
            iteration = engine.step()
            states |= {e.state for e in iteration.events if isinstance(e, CorrectionStatus)}
            if iteration.wake_at is None:
                assert woken.wait(30.0) or states.intersection(DONE)
            else:
                woken.wait(max(iteration.wake_at - time.monotonic(), 0.0))
    finally:
        engine.close()


def test_a_correction_repeated_during_training_does_not_restart_its_job(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newer one takes the older one's place in the job, and is learned with its steps."""
    def is_trained(correction_id: str) -> Callable[[Event], bool]:
        return lambda e: (isinstance(e, CorrectionStatus) and e.id == correction_id
                          and e.state is CorrectionState.TRAINING)

    engine = robot.engine
    engine.update(engine.settings.updated(
        {'finetune.learning_rate': 1e-6, 'finetune.max_steps': 1000}))
    wrong = robot.ask('Who are you?')
    engine.correct(Correction('A robot.', id='old', query_id=wrong.query_id))
    robot.until(is_trained('old'))
    job = running(robot)
    engine.correct(Correction('A robot.', id='new', query_id=wrong.query_id))
    robot.until(is_trained('new'))
    assert (running(robot).number, running(robot).correction_ids) == (job.number, ('new',))
    assert running(robot).steps >= job.steps        # the job was not abandoned
    engine.update(engine.settings.updated({'finetune.learning_rate': 0.01}))
    robot.until(lambda e: isinstance(e, CorrectionStatus)
                and e.state is CorrectionState.LEARNED and e.id == 'new')
    states = [e.state for e in robot.events if isinstance(e, CorrectionStatus) and e.id == 'old']
    assert states == [
        CorrectionState.ACCEPTED, CorrectionState.TRAINING, CorrectionState.SUPERSEDED]
    assert robot.ask('Who are you?').text == 'A robot.'


def test_a_correction_repeated_during_scoring_does_not_restart_its_job(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores in progress are those of the older one."""
    engine = robot.engine
    monkeypatch.setattr(engine.learner, 'fail', None)    # the job is not abandoned
    engine.correct(Correction('A robot.', id='old', prompt='Who are you?', rejected='A mouse.'))
    until_state(robot, JobState.CHOOSING)
    assert running(robot).corrections[0].score is None
    engine.correct(Correction('A robot.', id='new', prompt='Who are you?'))
    # It is accepted before the scores are known.
    engine.parts.journal.submit(lambda _: None).result()
    robot.until(lambda e: isinstance(e, CorrectionStatus)
                and e.id == 'new' and e.state is CorrectionState.LEARNED)
    assert robot.ask('Who are you?').text == 'A robot.'


def test_more_is_replayed_after_a_rejected_candidate(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts, seen = [True, True], []
    judge = gate.Gate.judge

    def worse(self: gate.Gate, *arguments: object) -> gate.Verdict:
        seen.append((running(robot).rejections, running(robot).lost))
        if not verdicts:
            return judge(self, *arguments)      # type: ignore[arg-type]
        verdicts.pop()
        return gate.Verdict('worse', tuple(self.samples[:1]))

    monkeypatch.setattr(gate.Gate, 'judge', worse)
    robot.engine.update(robot.engine.settings.updated({'finetune.max_steps': 200}))
    taught = robot.correct(Correction('A robot.', id='c', prompt='Who are you?'))
    assert taught.state is CorrectionState.LEARNED
    assert seen == [(0, 0), (1, 1), (2, 1)]
    rejected = [e for e in robot.events if isinstance(e, AdapterVersion)
                and e.state is VersionState.REJECTED]
    assert [e.reason for e in rejected] == ['worse', 'worse']


def test_a_candidate_relearns_lost_corrections_before_the_gate_judges(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    robot.correct(Correction('In the hall.', id='a', prompt='Where do you live?'))
    candidates: list[int] = []          # samples that earlier candidates have lost
    lost: list[list[Sample]] = []
    score = Training.score

    def losing(self: Training, samples: Sequence[Sample], *rest: Any) -> Task[Scored]:
        scored = yield from score(self, samples, *rest)
        # The exact samples of each candidate are scored first.
        if running(robot).state is JobState.JUDGING and len(candidates) == running(robot).lost:
            candidates.append(running(robot).lost)
            lost.append([*samples])
            if len(candidates) == 1:
                scored.scores = [replace(each, exact=False) for each in scored.scores]
        return scored

    judged = []
    judge = gate.Gate.judge
    monkeypatch.setattr(Training, 'score', losing)
    monkeypatch.setattr(gate.Gate, 'judge', lambda self, *arguments: (
        judged.append(1), judge(self, *arguments))[1])
    robot.engine.update(robot.engine.settings.updated({'finetune.max_steps': 200}))
    taught = robot.correct(Correction('A robot.', id='b', prompt='Who are you?'))
    assert taught.state is CorrectionState.LEARNED
    chat = robot.engine.chat
    kept = (*chat.prompt([{'role': 'user', 'content': 'Where do you live?'}]),
            *chat.answer('In the hall.'))
    assert candidates == [0, 1]
    assert [[each.tokens for each in samples] for samples in lost] == [[kept], [kept]]
    assert len(judged) == 1
    assert robot.ask('Where do you live?').text == 'In the hall.'


def test_profiles_take_turns(robot: Robot) -> None:
    for number in range(9):
        robot.engine.correct(Correction('Yes.', id=f'ann{number}', profile='ann',
                                        prompt=f'Question {number}?'))
    robot.correct(Correction('No.', id='bob', profile='bob', prompt='Question?'))
    published = [e.profile for e in robot.events if isinstance(e, AdapterVersion)]
    assert published.count('ann') <= 1 and published[-1] == 'bob'


def test_a_correction_that_cannot_be_learned_fails_with_a_reason(robot: Robot) -> None:
    """If max_steps do not suffice, the correction is FAILED and serving continues."""
    robot.engine.update(robot.engine.settings.updated(
        {'finetune.max_steps': 1, 'finetune.learning_rate': 1e-6}))
    wrong = robot.ask('Who are you?')
    state = robot.correct(Correction('A robot.', id='k', query_id=wrong.query_id))
    assert state.state is CorrectionState.FAILED
    assert 'finetune.max_steps' in state.reason
    assert robot.ask('Who are you?').text == wrong.text


def test_a_restart_serves_the_latest_version_and_resumes_learning(
        settings: Settings, tmp_path: Path) -> None:
    """A published version and an unlearned correction survive; profiles stay apart."""
    robot = Robot(build_engine(settings, storage=tmp_path))
    wrong = robot.ask('Who are you?')
    robot.correct(Correction('A robot.', id='k', query_id=wrong.query_id))
    robot.engine.update(robot.engine.settings.updated({'finetune.budget': 0.0}))
    robot.engine.correct(Correction('Your friend.', id='anna', query_id=wrong.query_id,
                                    profile='anna'))
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == 'anna')
    robot.engine.close()

    again = Robot(build_engine(settings, storage=tmp_path))
    restored = again.engine.start()
    # Repeated: the node may have stopped before publishing the status.
    assert CorrectionStatus('k', CorrectionState.LEARNED, adapter_version=1) in restored
    live = [e for e in restored if isinstance(e, AdapterVersion)]
    assert [(e.profile, e.version) for e in live] == [('', 1)]
    again.until(lambda e: isinstance(e, CorrectionStatus) and e.id == 'anna'
                and e.state is CorrectionState.LEARNED)
    assert again.ask('Who are you?').text == 'A robot.'
    assert again.ask('Who are you?', profile='anna').text == 'Your friend.'
    assert again.ask('Who are you?', profile='stranger').text == 'A robot.'
    again.engine.close()


def test_a_rejected_text_that_is_too_long_is_not_scored(robot: Robot) -> None:
    """The rejected text may have any length; the correction is learned without it."""
    last = robot.correct(Correction('A robot.', id='k', prompt='Who are you?',
                                    rejected='I am. ' * 500))
    assert last.state is CorrectionState.LEARNED
    record = robot.engine.parts.journal.submit(lambda j: j.correction('k')).result(10)
    assert record is not None and record.rejected == ''


def test_the_continuous_policy_does_not_rehearse_superseded_corrections(robot: Robot) -> None:
    """Even if the newer correction came while the version was being saved."""
    engine = robot.engine
    engine.update(engine.settings.updated({'scheduler.policy': 'continuous'}))
    correct(robot, 'old', about='this')
    until_state(robot, JobState.SAVING)
    engine.correct(Correction('Your friend.', id='new', prompt='Question this?'))
    engine.parts.journal.submit(lambda _: None).result(10)
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == 'new'
                and e.state is CorrectionState.LEARNED)
    while (job := engine.learner.status().job) is None or job.kind is not JobKind.REHEARSAL:
        engine.step()
    assert job.correction_ids == ('new',)


def test_a_full_queue_still_accepts_replacements(robot: Robot) -> None:
    engine = robot.engine
    engine.update(engine.settings.updated({'finetune.budget': 0.0, 'storage.max_corrections': 2}))
    for name, about in (('1', '1'), ('2', '2'), ('2 again', '2')):
        engine.correct(Correction('A robot.', id=name, prompt=f'Question {about}?'))
        state = robot.until(lambda e, name=name: isinstance(e, CorrectionStatus)  # type: ignore[misc]
                            and e.id == name)
        assert state.state is CorrectionState.ACCEPTED
    assert [r.id for r in engine.parts.journal.submit(lambda j: j.corrections()).result(10)] == [
        '1', '2 again']
    state = robot.correct(Correction('A robot.', id='3', prompt='Question 3?'))
    assert state.state is CorrectionState.REJECTED and 'max_corrections' in state.reason
    assert [r.id for r in engine.parts.journal.submit(lambda j: j.corrections()).result(10)] == [
        '1', '2 again']


@pytest.mark.parametrize('where', ['run_segment', '__init__'])
def test_failing_learning_loses_no_answer_and_is_retried(
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
    long = next((e for e in robot.events if isinstance(e, Response) and e.query_id == 'long'),
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


@pytest.mark.parametrize('waits', [True, False])
def test_an_error_before_a_job_is_reported(
        robot: Robot, monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    """The status shows the error; otherwise the iteration fails and the next runs."""
    wrong, learning = robot.ask('Who are you?'), robot.engine.learner

    def fail() -> list[Event]:
        if learning.busy or not waits:
            raise TypeError('injected')
        return []

    with monkeypatch.context() as patch:
        patch.setattr(learning, 'poll', fail)
        if waits:
            robot.engine.correct(Correction('A robot.', id='k', query_id=wrong.query_id))
            robot.until(lambda event: isinstance(event, CorrectionStatus))
            assert robot.ask('Who are you?').text == wrong.text
            assert 'injected' in robot.engine.status().learning_error
        else:
            with pytest.raises(TypeError, match='injected'):
                robot.engine.step()
    assert robot.ask('Who are you?').text


def test_saving_is_retried(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the disk is full, the trained version is kept and its corrections stay pending."""
    wrong = robot.ask('Who are you?')
    save, failures, problems = AdapterStore.save, [], set()

    def full(*arguments: object) -> object:
        problems.add(robot.engine.status().learning_error)
        if len(failures) < learner.MAX_JOB_TRIES + 2:
            failures.append(robot.engine.scheduler.statistics(time.monotonic()).finetune_steps)
            raise OSError(errno.ENOSPC, 'No space left on device')
        return save(*arguments)     # type: ignore[arg-type]

    monkeypatch.setattr(AdapterStore, 'save', full)
    monkeypatch.setattr(backoff, 'LONGEST_S', 0.05)
    state = robot.correct(Correction('A robot.', id='k', query_id=wrong.query_id))
    assert state.state is CorrectionState.LEARNED
    assert len(failures) == learner.MAX_JOB_TRIES + 2 and len(set(failures)) == 1
    assert any('No space left' in problem for problem in problems)
    assert robot.engine.status().learning_error == ''
    assert robot.ask('Who are you?').text == 'A robot.'


def test_reading_is_retried(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing disk is no failed attempt of the correction."""
    robot.correct(Correction('A robot.', id='k', prompt='Who are you?'))
    load, failures, problems = AdapterStore.load, [], set()

    def damaged(*arguments: object) -> object:
        problems.add(robot.engine.status().learning_error)
        if len(failures) < learner.MAX_JOB_TRIES + 2:
            failures.append(1)
            raise CorruptVersion('injected')
        return load(*arguments)     # type: ignore[arg-type]

    monkeypatch.setattr(AdapterStore, 'load', damaged)
    monkeypatch.setattr(backoff, 'LONGEST_S', 0.05)
    state = robot.correct(Correction('In the hall.', id='l', prompt='Where are you?'))
    assert state.state is CorrectionState.LEARNED
    assert any('injected' in problem for problem in problems)
    assert robot.engine.status().learning_error == ''


def test_loading_a_recorded_version_into_its_slot_is_retried(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal has it live, so it is served without retraining."""
    publish, write, failures = Journal.publish, LoRAManager.write_slot, []

    def failing(*arguments: object) -> None:
        if len(failures) <= learner.MAX_JOB_TRIES:
            failures.append(robot.engine.learner.busy)
            raise torch.OutOfMemoryError('injected')
        write(*arguments)       # type: ignore[arg-type]

    def recorded(*arguments: object) -> object:
        monkeypatch.setattr(LoRAManager, 'write_slot', failing)
        return publish(*arguments)      # type: ignore[arg-type]

    monkeypatch.setattr(Journal, 'publish', recorded)
    monkeypatch.setattr(backoff, 'LONGEST_S', 0.05)
    state = robot.correct(Correction('A robot.', id='k', prompt='Who are you?'))
    assert (state.state, state.adapter_version) == (CorrectionState.LEARNED, 1)
    assert len(failures) == learner.MAX_JOB_TRIES + 1
    answer = robot.ask('Who are you?')
    assert (answer.text, answer.adapter_version) == ('A robot.', 1)
    assert robot.engine.status().learning_error == ''


def test_an_overdue_correction_makes_the_steps_of_every_job_overdue(robot: Robot) -> None:
    """The oldest correction counts, even if another job will learn it."""
    robot.engine.correct(Correction('A robot.', id='k', prompt='Who are you?'))
    robot.until(lambda e: isinstance(e, CorrectionStatus)
                and e.state is CorrectionState.TRAINING)
    record = robot.engine.parts.journal.submit(lambda j: j.correction('k')).result(10)
    robot.engine.learner.accepted(Accepted(
        replace(record, id='older', profile='ann'), new=True, arrived=-5.0))
    step = robot.engine.learner.step
    while robot.engine.learner.step in (step, None):
        robot.engine.step()
    assert robot.engine.learner.step.oldest_correction_at == -5.0


def test_training_continues_until_corrections_lead_by_the_margin(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """A right answer below the margin is learned at max_steps."""
    robot.engine.update(robot.engine.settings.updated({'finetune.max_steps': 12}))
    monkeypatch.setattr(criteria, 'LEARNED_MARGIN', 1e9)
    state = robot.correct(Correction('A robot.', id='k', prompt='Who are you?'))
    assert state.state is CorrectionState.LEARNED, state.reason
    assert robot.engine.scheduler.statistics(time.monotonic()).finetune_steps == 12
    assert robot.ask('Who are you?').text == 'A robot.'


def test_profile_without_a_free_slot_fails_by_name(settings: Settings, tmp_path: Path) -> None:
    """With as many live profiles as slots, another one fails; the others are served."""
    robot = Robot(build_engine(settings.updated({'adapter.slots': 2}), storage=tmp_path))
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


def test_no_version_that_changes_guarded_answers_is_published(
        settings: Settings, tmp_path: Path) -> None:
    """Without replay, learning would change other answers; the gate rejects it."""
    robot = Robot(build_engine(settings.updated({
        'finetune.replay_samples': 0, 'gate.tolerance': 0.0, 'finetune.max_steps': 12,
    }), storage=tmp_path))
    wrong = robot.ask('Who are you?')

    learned = robot.correct(Correction('I am Rover.', id='k', query_id=wrong.query_id))

    rejected = [e for e in robot.events if isinstance(e, AdapterVersion)
                and e.state is VersionState.REJECTED]
    assert rejected and all('would become' in e.reason and e.version for e in rejected)
    if learned.state is CorrectionState.LEARNED:
        assert learned.adapter_version > max(e.version for e in rejected)
    else:     # a small random model may not be able to learn it
        assert learned.state is CorrectionState.FAILED and 'would become' in learned.reason
        assert robot.ask('Who are you?').text == wrong.text


def test_a_correction_that_always_fails_the_gate_fails(
        settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After finetune.max_steps it is FAILED with the gate's reason; the answer stays."""
    reason = 'probes: 1.00 would become 0.00'
    monkeypatch.setattr(gate.Gate, 'judge', lambda *_: gate.Verdict(reason))
    robot = Robot(build_engine(
        settings.updated({'finetune.max_steps': 12}), storage=tmp_path))
    before = robot.ask('Who are you?')

    failed = robot.correct(Correction('I am Rover.', id='k', query_id=before.query_id))

    assert failed.state is CorrectionState.FAILED
    assert failed.reason.startswith(reason) and 'finetune.max_steps' in failed.reason
    assert robot.ask('Who are you?').text == before.text
