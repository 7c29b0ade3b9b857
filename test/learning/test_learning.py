# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The engine learns corrections, with a small random model and the real tokenizer."""

from collections.abc import Callable
import math
from pathlib import Path
import time

import pytest
from support.robot import Robot, running, until_state

from mace_ros.api.events import (
    AdapterVersion,
    Correction,
    CorrectionState,
    CorrectionStatus,
    Event,
    Query,
    Response,
    ResponseChunk,
)
from mace_ros.api.settings import Settings
from mace_ros.engine.builder import build_engine
from mace_ros.finetune.step import FinetuneStep
from mace_ros.finetune.trainer import Trainer
from mace_ros.learning import criteria
from mace_ros.learning.disk import Disk
from mace_ros.learning.job import JobState
from mace_ros.scheduling.memory_arbiter import MemoryArbiter
from mace_ros.scheduling.plan import Segment, SegmentKind


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
    ({'query_id': '', 'id': ''}, 'one of them'),
    ({'query_id': ''}, "no correction 'k' is on record"),
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
    engine.parts.journal.submit(lambda _: None).result(60)      # before the last step
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
    record = robot.engine.parts.journal.submit(lambda j: j.correction('k')).result(60)
    assert record is not None and record.rejected == ''


def test_a_full_queue_still_accepts_replacements(robot: Robot) -> None:
    engine = robot.engine
    engine.update(engine.settings.updated({'finetune.budget': 0.0, 'storage.max_corrections': 2}))
    for name, about in (('1', '1'), ('2', '2'), ('2 again', '2')):
        engine.correct(Correction('A robot.', id=name, prompt=f'Question {about}?'))
        state = robot.until(lambda e, name=name: isinstance(e, CorrectionStatus)  # type: ignore[misc]
                            and e.id == name)
        assert state.state is CorrectionState.ACCEPTED
    assert [r.id for r in engine.parts.journal.submit(lambda j: j.corrections()).result(60)] == [
        '1', '2 again']
    state = robot.correct(Correction('A robot.', id='3', prompt='Question 3?'))
    assert state.state is CorrectionState.REJECTED and 'max_corrections' in state.reason
    assert [r.id for r in engine.parts.journal.submit(lambda j: j.corrections()).result(60)] == [
        '1', '2 again']


def test_training_continues_until_corrections_lead_by_the_margin(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """A right answer below the margin is learned at max_steps."""
    robot.engine.update(robot.engine.settings.updated({'finetune.max_steps': 12}))
    monkeypatch.setattr(criteria, 'LEARNED_MARGIN', 1e9)
    state = robot.correct(Correction('A robot.', id='k', prompt='Who are you?'))
    assert state.state is CorrectionState.LEARNED, state.reason
    assert robot.engine.scheduler.statistics(time.monotonic()).finetune_steps == 12
    assert robot.ask('Who are you?').text == 'A robot.'
