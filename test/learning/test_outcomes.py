# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A version whose answers get worse is taken back by itself, and no other one is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
import random

import pytest
from support.records import answer, correction
from support.robot import DONE, RANDOM_MODEL, Robot, running
import torch

from mace_ros.api.events import (
    AdapterVersion,
    Correction,
    CorrectionState,
    CorrectionStatus,
    VersionState,
)
from mace_ros.api.settings import Settings
from mace_ros.engine.engine import Engine
from mace_ros.learning import regression_check
from mace_ros.learning.job import JobKind
from mace_ros.learning.outcomes import (
    chance,
    ENOUGH,
    FALSE_ALARMS,
    got_worse,
    Outcomes,
    suspected,
    SuspectedRegression,
    to_blame,
    WATCHED,
)
from mace_ros.learning.rollback import roll_back
from mace_ros.learning.training import Training
from mace_ros.store.journal import Journal, VersionRecord
from mace_ros.store.layout import JOURNAL
from mace_ros.store.version_info import peft_config

ROLLED_BACK = VersionState.ROLLED_BACK


# The test

def alarm(chance_of: random.Random, before: float, since: float, *, answers: int = 50,
          ) -> int | None:
    """Return after how many answers an alarm comes, of two versions corrected so often."""
    known = Outcomes(answers, sum(chance_of.random() < before for _ in range(answers)))
    corrected = 0
    for n in range(1, WATCHED + 1):
        corrected += chance_of.random() < since
        if got_worse(Outcomes(n, corrected), known):
            return n
    return None


def test_chance_is_that_of_fisher() -> None:
    """As by hand: of 5 balls that are drawn of 10, all of the 5 white ones."""
    assert chance(Outcomes(5, 5), Outcomes(5, 0)) == pytest.approx(1 / 252)
    assert chance(Outcomes(9, 7), Outcomes(20, 1)) == pytest.approx(729 / 4292145)
    assert chance(Outcomes(9, 0), Outcomes(20, 1)) == 1.0


@pytest.mark.parametrize('rate', [0.02, 0.2, 0.5, 0.8, 0.98])
def test_a_steady_rate_is_no_alarm_however_high(rate: float) -> None:
    """Not more than is promised, in 300 versions that are looked at after each answer."""
    alarms = [alarm(random.Random(f'{rate} {i}'), rate, rate) for i in range(300)]
    assert sum(a is not None for a in alarms) <= FALSE_ALARMS * len(alarms)


@pytest.mark.parametrize(('before', 'since', 'within'), [
    (0.02, 1.0, 5), (0.1, 0.9, 15), (0.3, 0.9, 40)])
def test_a_broken_version_is_found_soon(before: float, since: float, within: int) -> None:
    """In nineteen of twenty cases within so many answers."""
    alarms = [alarm(random.Random(f'{before} {i}'), before, since) for i in range(100)]
    assert sum(a is not None and a <= within for a in alarms) >= 95


def test_without_a_record_nobody_is_to_blame() -> None:
    """Few answers, of either side, say nothing."""
    assert not got_worse(Outcomes(ENOUGH - 1, ENOUGH - 1), Outcomes(90, 0))
    assert not got_worse(Outcomes(90, 90), Outcomes(ENOUGH - 1, 0))


def test_the_older_version_must_have_done_better() -> None:
    """A little better is not, nor is one that is better as often as not."""
    assert to_blame([2.0] * ENOUGH) and to_blame([2.0] * 9 + [-1.0, -1.0])
    assert not to_blame([0.05] * 30) and not to_blame([2.0, -2.0] * 10)
    assert not to_blame([2.0] * (ENOUGH - 1))


# In the journal

@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """Return an empty journal."""
    with Journal(tmp_path / JOURNAL) as opened:
        yield opened


def serve(journal: Journal, version: int, count: int, corrected: int = 0, *, profile: str = '',
          lineage: str | None = None, question: str = '') -> None:
    """Give answers with a version, the first of which are corrected."""
    with journal.transaction():
        for i in range(count):
            name = f'{profile}-{version}-{len(journal.answers())}'
            journal.record_answer(answer(
                name, question or f'question {name}', profile=profile, adapter_version=version,
                lineage=profile if lineage is None else lineage))
            if i < corrected:
                journal.accept(correction(f'k{name}', question or f'question {name}',
                                          query_id=name, profile=profile))


def publish(journal: Journal, version: int, profile: str = '') -> None:
    """Publish the next version."""
    live = journal.live(profile)
    journal.publish(VersionRecord(profile, version, live.version if live else 0,
                                  path=f'v{version}', sha256='ab'))


def test_the_version_that_brought_it_is_found(journal: Journal) -> None:
    """Also if others grew from it since; those that were taken back don't count."""
    serve(journal, 0, 10)
    publish(journal, 1)
    serve(journal, 1, 20, 1)
    assert suspected(journal, '') is None
    for version in (2, 3, 4):
        publish(journal, version)
        serve(journal, version, 3, 2)
    found = suspected(journal, '')
    assert found is not None
    assert (found.version, found.better) == (4, 1)
    assert found.reason == 'answers got worse: 6 of 8 corrected, 1 of 30 before'
    assert len(found.corrections) == 6
    roll_back(journal, '', 1, found.reason)
    assert suspected(journal, '') is None
    publish(journal, 5)
    serve(journal, 5, 4, 4)
    assert suspected(journal, '') is None


def test_one_question_is_one_thing_wrong(journal: Journal) -> None:
    """However often it is asked and corrected before it is learned."""
    serve(journal, 0, 30)
    publish(journal, 1)
    serve(journal, 1, 20, 20, question='Again?')
    assert suspected(journal, '') is None


def test_an_id_that_is_used_again_is_of_another_answer(journal: Journal) -> None:
    """What was corrected before says nothing of that."""
    serve(journal, 0, 10)
    publish(journal, 1)
    serve(journal, 1, 20, 20)
    assert suspected(journal, '') is not None
    for again in journal.answers()[10:]:
        journal.record_answer(again)
    assert suspected(journal, '') is None


def test_a_version_that_has_served_long_is_left_alone(journal: Journal) -> None:
    """What gets worse then is not its doing."""
    serve(journal, 0, 30)
    publish(journal, 1)
    serve(journal, 1, WATCHED)
    serve(journal, 1, 40, 40)
    assert suspected(journal, '') is None


def test_a_persons_first_version_is_compared_with_the_robots(journal: Journal) -> None:
    """With what that has answered to this person; others' answers are others' affair."""
    publish(journal, 1)
    serve(journal, 1, 20, 20, profile='bob', lineage='')
    serve(journal, 1, 20, 0, profile='ann', lineage='')
    publish(journal, 1, 'ann')
    serve(journal, 1, 8, 8, profile='ann')
    found = suspected(journal, 'ann')
    assert found is not None
    assert (found.profile, found.version, found.better) == ('ann', 1, 0)
    assert str(found.before) == '0 of 20'
    assert suspected(journal, '') is None


# In the engine

QUESTIONS = [f'Question {word}?' for word in (
    'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten', 'eleven',
    'twelve')]


@pytest.fixture(scope='module')
def settings(model_folder: Path) -> Settings:
    """Return settings for the tiny model on the CPU."""
    return Settings().updated({
        'model.source': str(model_folder), 'model.device': 'cpu', 'model.threads': 1,
        'model.weight_dtype': 'float32', 'memory.kv_cache_tokens': 8192,
        'generation.max_tokens': 8, **RANDOM_MODEL})


def with_version(settings: Settings, folder: Path, scale: float) -> tuple[Robot, dict[str, str]]:
    """
    Return a robot whose first version has random weights, and the base model's answers.

    With a ``scale`` of 0.02 it is another one, but no worse.
    """
    robot = Robot(Engine(settings, storage=folder))
    right = {text: robot.ask(text).text for text in QUESTIONS}
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(t.shape, generator=generator) * scale
               for name, t in robot.engine.bank.export().items()}
    config = peft_config(robot.engine.bank, 'tiny')

    def poison(journal: Journal) -> None:
        saved = robot.engine._store.save('', journal.next_version(''), tensors, config)
        journal.publish(VersionRecord('', 1, 0, path=saved.path, sha256=saved.sha256))

    robot.engine._journal.submit(poison).result(10)
    robot.engine.close()
    return Robot(Engine(settings, storage=folder)), right


def taken_back(robot: Robot) -> list[AdapterVersion]:
    """Return what was said of versions that were taken back."""
    return [e for e in robot.events if isinstance(e, AdapterVersion) and e.state is ROLLED_BACK]


def test_a_comparison_that_always_breaks_off_is_given_up() -> None:
    some = Outcomes(ENOUGH, ENOUGH)
    suspicion = SuspectedRegression('', 2, 1, some, some, (correction('k'),))
    compares = regression_check.RegressionCheck()
    compares.suspect(suspicion)
    tries = 0
    while compares.suspicion is not None:
        compares.begin(compares.suspicion)
        compares.broke_off(suspicion)
        tries += 1
        assert tries <= regression_check.MAX_TRIES
    assert tries == regression_check.MAX_TRIES


@pytest.mark.parametrize('waits', [True, False], ids=['each is learned', 'all at once'])
def test_a_bad_version_is_taken_back_by_itself(
        waits: bool, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Whether it is still live, or others have grown from it that know some corrections.

    Though the device fails while versions are compared.
    """
    failures: list[int] = []
    robot, right = with_version(settings, tmp_path, 0.6)
    load = Training.load

    def fails_once(self: Training, tensors: dict[str, torch.Tensor] | None) -> None:
        if running(robot).kind is JobKind.COMPARISON and not failures:
            failures.append(1)
            raise torch.OutOfMemoryError('injected')
        load(self, tensors)

    monkeypatch.setattr(Training, 'load', fails_once)
    asked = 0
    for text, corrected in right.items():
        if taken_back(robot):
            break
        wrong = robot.ask(text)
        robot.engine.correct(Correction(corrected, id=text, query_id=wrong.query_id))
        robot.until(lambda e, name=text: taken_back(robot) or (  # type: ignore[misc]
            isinstance(e, CorrectionStatus) and e.id == name
            and (e.state in DONE or not waits)))
        asked += 1
    if not taken_back(robot):
        robot.until(lambda e: isinstance(e, AdapterVersion) and e.state is ROLLED_BACK)
    assert failures
    if waits:
        assert ENOUGH <= asked <= 2 * ENOUGH
    # The one that brought it is the last of those that are taken back.
    last = taken_back(robot)[-1]
    assert last.version == 1
    assert 'answers got worse' in last.reason and 'of 12 before' in last.reason
    # What still waits would be learned from the base model now.
    robot.engine.update(settings.updated({'finetune.budget': 0.0}))
    answers = [robot.ask(text) for text in QUESTIONS]
    assert {text: a.text for text, a in zip(QUESTIONS, answers, strict=True)} == right
    assert {a.adapter_version for a in answers} == {0}
    robot.engine.close()


def test_what_was_suspected_of_a_version_taken_back_is_forgotten(
        settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal may say so only when somebody has taken back more than that already."""
    monkeypatch.setattr(regression_check, 'to_blame', lambda leads: True)
    robot, _ = with_version(settings, tmp_path, 0.02)
    engine = robot.engine
    last = robot.correct(Correction('A robot.', id='k', prompt='Who are you?'))
    assert last.adapter_version == 2
    rolled_back = engine.rollback('', 0)
    while not rolled_back.done():
        engine.step()
    record = engine._journal.submit(lambda j: j.correction('k')).result(10)
    some = Outcomes(ENOUGH, ENOUGH)
    engine.learner.suspect(SuspectedRegression('', 2, 1, some, some, (record,) * ENOUGH))
    last = robot.correct(Correction('In the hall.', id='l', prompt='Where are you?'))
    # From the base model: version 1 was not returned to.
    assert last.state is CorrectionState.LEARNED
    versions = engine.versions('').result(10)
    assert [(v.version, v.parent) for v in versions][-1] == (3, 0)
    engine.close()


@pytest.mark.parametrize('case', ['taught', 'switched off'])
def test_a_version_that_is_not_to_blame_stays(
        case: str, settings: Settings, tmp_path: Path) -> None:
    """Everything is corrected all at once, but the version before knew none of it either."""
    if case == 'switched off':
        settings = settings.updated({'gate.auto_rollback': False})
    robot, right = with_version(settings, tmp_path, 0.02 if case == 'taught' else 0.3)
    # Learned at once, each of them would have a version of its own.
    robot.engine.update(settings.updated({'finetune.budget': 0.0}))
    for i, text in enumerate(QUESTIONS):
        wrong = robot.ask(text)
        robot.engine.correct(Correction(
            f'It is number {i}.' if case == 'taught' else right[text], query_id=wrong.query_id,
            id=text))
        robot.until(lambda e, name=text: isinstance(e, CorrectionStatus) and e.id == name)  # type: ignore[misc]
    suspicion = robot.engine._journal.submit(lambda j: suspected(j, '')).result(10)
    assert suspicion is not None and suspicion.better == 0
    robot.engine.update(settings)
    # Versions are compared before anything is learned.
    robot.until(lambda e: isinstance(e, CorrectionStatus)
                and e.state is CorrectionState.TRAINING)
    robot.events += robot.engine.step().events
    assert bool(robot.engine.learner.status().compared) == (case == 'taught')
    assert not taken_back(robot) and robot.engine.live_version('') == 1
    robot.engine.close()
