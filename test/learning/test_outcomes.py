# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A version whose answers get worse is rolled back automatically, and no other version."""

from __future__ import annotations

from pathlib import Path
import random

import pytest
from support.records import answer, correction
from support.robot import DONE, Robot, running
import torch

from mace_ros.api.events import (
    AdapterVersion,
    Correction,
    CorrectionState,
    CorrectionStatus,
    VersionState,
)
from mace_ros.api.settings import Settings
from mace_ros.engine.builder import build_engine
from mace_ros.learning import regression_check
from mace_ros.learning.job import JobKind
from mace_ros.learning.outcomes import (
    FALSE_ALARM_PROBABILITY,
    got_worse,
    MAX_ANSWERS,
    MIN_ANSWERS,
    older_is_better,
    Outcomes,
    p_value,
    suspected_regression,
    SuspectedRegression,
)
from mace_ros.learning.regression_check import MAX_COMPARISON_TRIES, RegressionCheck
from mace_ros.learning.rollback import roll_back
from mace_ros.learning.training import Training
from mace_ros.store.adapter_store import AdapterStore
from mace_ros.store.journal import Journal
from mace_ros.store.layout import JOURNAL
from mace_ros.store.records import VersionRecord
from mace_ros.store.version_info import peft_config

ROLLED_BACK = VersionState.ROLLED_BACK


# Statistics

def alarm(rng: random.Random, before: float, since: float, *, answers: int = 50,
          ) -> int | None:
    """Return after how many answers a change of the correction rate is detected."""
    known = Outcomes(answers, sum(rng.random() < before for _ in range(answers)))
    corrected = 0
    for n in range(1, MAX_ANSWERS + 1):
        corrected += rng.random() < since
        if got_worse(Outcomes(n, corrected), known):
            return n
    return None


def test_the_p_value_is_that_of_fishers_exact_test() -> None:
    assert p_value(Outcomes(5, 5), Outcomes(5, 0)) == pytest.approx(1 / 252)
    assert p_value(Outcomes(9, 7), Outcomes(20, 1)) == pytest.approx(729 / 4292145)
    assert p_value(Outcomes(9, 0), Outcomes(20, 1)) == 1.0


@pytest.mark.parametrize('rate', [0.02, 0.2, 0.5, 0.8, 0.98])
def test_a_steady_rate_raises_no_more_false_alarms_than_promised(rate: float) -> None:
    """Of 300 versions, each tested after every answer."""
    alarms = [alarm(random.Random(f'{rate} {i}'), rate, rate) for i in range(300)]
    assert sum(a is not None for a in alarms) <= FALSE_ALARM_PROBABILITY * len(alarms)


@pytest.mark.parametrize(('before', 'since', 'within'), [
    (0.02, 1.0, 5), (0.1, 0.9, 15), (0.3, 0.9, 40)])
def test_a_broken_version_is_detected_soon(before: float, since: float, within: int) -> None:
    """In 19 of 20 cases within the given number of answers."""
    alarms = [alarm(random.Random(f'{before} {i}'), before, since) for i in range(100)]
    assert sum(a is not None and a <= within for a in alarms) >= 95


def test_few_answers_on_either_side_raise_no_alarm() -> None:
    assert not got_worse(Outcomes(MIN_ANSWERS - 1, MIN_ANSWERS - 1), Outcomes(90, 0))
    assert not got_worse(Outcomes(90, 90), Outcomes(MIN_ANSWERS - 1, 0))


def test_the_older_version_must_be_clearly_better() -> None:
    """Neither a small lead nor being ahead on half of the texts is enough."""
    assert older_is_better([2.0] * MIN_ANSWERS) and older_is_better([2.0] * 9 + [-1.0, -1.0])
    assert not older_is_better([0.05] * 30) and not older_is_better([2.0, -2.0] * 10)
    assert not older_is_better([2.0] * (MIN_ANSWERS - 1))


# In the journal

def serve(journal: Journal, version: int, count: int, corrected: int = 0, *, profile: str = '',
          lineage: str | None = None, question: str = '') -> None:
    """Record answers of a version, the first ones corrected."""
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
    live = journal.newest(profile)
    parent = live.version if live else 0
    journal.publish(VersionRecord(profile, version, parent, continues=parent,
                                  path=f'v{version}', sha256='ab'))


def test_the_version_that_brought_the_regression_is_found(journal: Journal) -> None:
    """Also when newer versions have it as parent; versions rolled back don't count."""
    serve(journal, 0, 10)
    publish(journal, 1)
    serve(journal, 1, 20, 1)
    assert suspected_regression(journal, '') is None
    for version in (2, 3, 4):
        publish(journal, version)
        serve(journal, version, 3, 2)
    found = suspected_regression(journal, '')
    assert found is not None
    assert (found.version, found.suspect, found.continues) == (4, 2, 1)
    assert found.reason == 'answers got worse: 6 of 8 corrected, 1 of 30 before'
    assert len(found.corrections) == 6
    roll_back(journal, '', found.suspect, found.reason, withdraw=True)
    assert journal.live_lineage('').newest == 1
    assert suspected_regression(journal, '') is None
    publish(journal, 5)
    serve(journal, 5, 4, 4)
    assert suspected_regression(journal, '') is None


def test_a_question_counts_once_however_often_it_is_corrected(journal: Journal) -> None:
    serve(journal, 0, 30)
    publish(journal, 1)
    serve(journal, 1, 20, 20, question='Again?')
    assert suspected_regression(journal, '') is None


def test_a_reused_query_id_does_not_inherit_corrections(journal: Journal) -> None:
    serve(journal, 0, 10)
    publish(journal, 1)
    serve(journal, 1, 20, 20)
    assert suspected_regression(journal, '') is not None
    for again in journal.answers()[10:]:
        journal.record_answer(again)
    assert suspected_regression(journal, '') is None


def test_a_version_that_has_served_long_is_not_suspected(journal: Journal) -> None:
    serve(journal, 0, 30)
    publish(journal, 1)
    serve(journal, 1, MAX_ANSWERS)
    serve(journal, 1, 40, 40)
    assert suspected_regression(journal, '') is None


def test_a_profiles_first_version_is_compared_with_the_robots(journal: Journal) -> None:
    """With the robot's answers to this profile, not to others."""
    publish(journal, 1)
    serve(journal, 1, 20, 20, profile='bob', lineage='')
    serve(journal, 1, 20, 0, profile='ann', lineage='')
    publish(journal, 1, 'ann')
    serve(journal, 1, 8, 8, profile='ann')
    found = suspected_regression(journal, 'ann')
    assert found is not None
    assert (found.profile, found.version, found.suspect) == ('ann', 1, 1)
    assert str(found.before) == '0 of 20'
    assert suspected_regression(journal, '') is None


# In the engine

QUESTIONS = [f'Question {word}?' for word in (
    'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten', 'eleven',
    'twelve')]


@pytest.fixture(scope='module')
def settings(settings: Settings) -> Settings:
    """Return settings with which a version answers questions that it was not taught, too."""
    return settings.updated({'generation.max_tokens': 8, 'adapter.scope': 'everywhere'})


def with_version(settings: Settings, folder: Path, scale: float) -> tuple[Robot, dict[str, str]]:
    """
    Return a robot whose version 1 has random weights, and the base model's answers.

    With a ``scale`` of 0.02 the version differs from the base model, but is not worse.
    """
    robot = Robot(build_engine(settings, storage=folder))
    right = {text: robot.ask(text).text for text in QUESTIONS}
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(t.shape, generator=generator) * scale
               for name, t in robot.engine.lora.export().items()}
    config = peft_config(robot.engine.lora, 'tiny')
    robot.engine.close()
    saved = AdapterStore(folder).save('', 1, tensors, config)
    with Journal(folder / JOURNAL) as journal:
        journal.publish(VersionRecord(
            '', 1, 0, path=saved.path, sha256=saved.sha256, everywhere=True))
    return Robot(build_engine(settings, storage=folder)), right


def rolled_back(robot: Robot) -> list[AdapterVersion]:
    """Return the events of versions that were rolled back."""
    return [e for e in robot.events if isinstance(e, AdapterVersion) and e.state is ROLLED_BACK]


def test_a_comparison_that_always_fails_is_given_up() -> None:
    some = Outcomes(MIN_ANSWERS, MIN_ANSWERS)
    suspicion = SuspectedRegression('', 2, 1, 1, some, some, (correction('k'),))
    compares = RegressionCheck()
    compares.suspect(suspicion)
    tries = 0
    while compares.suspicion is not None:
        compares.begin(compares.suspicion)
        compares.requeue(suspicion)
        tries += 1
        assert tries <= MAX_COMPARISON_TRIES
    assert tries == MAX_COMPARISON_TRIES


@pytest.mark.parametrize(('waits', 'scope'), [(True, ''), (False, ''), (True, 'similar')])
def test_a_bad_version_is_rolled_back_automatically(
        waits: bool, scope: str, settings: Settings, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Whether it is live, or newer versions have it as parent and know some corrections.

    With a scope of their own, the corrections are learned by adapters that do not continue it. The
    device fails once while versions are compared.
    """
    failures: list[int] = []
    robot, right = with_version(settings, tmp_path, 0.6)
    load = Training.load

    def fails_once(self: Training, tensors: dict[str, torch.Tensor] | None,
                   **options: bool) -> None:
        if running(robot).kind is JobKind.COMPARISON and not failures:
            failures.append(1)
            raise torch.OutOfMemoryError('injected')
        load(self, tensors, **options)

    monkeypatch.setattr(Training, 'load', fails_once)
    asked = 0
    for text, corrected in right.items():
        if rolled_back(robot):
            break
        wrong = robot.ask(text)
        robot.engine.correct(
            Correction(corrected, id=text, query_id=wrong.query_id, scope=scope))
        robot.until(lambda e, name=text: rolled_back(robot) or (  # type: ignore[misc]
            isinstance(e, CorrectionStatus) and e.id == name
            and (e.state in DONE or not waits)))
        asked += 1
    if not rolled_back(robot):
        robot.until(lambda e: isinstance(e, AdapterVersion) and e.state is ROLLED_BACK)
    assert failures
    if waits:
        assert MIN_ANSWERS <= asked <= 2 * MIN_ANSWERS
    # Versions are rolled back newest first: the last one brought the regression.
    last = rolled_back(robot)[-1]
    assert last.version == 1
    assert 'answers got worse' in last.reason and 'of 12 before' in last.reason
    # Pending corrections would be learned from the base model now.
    robot.engine.update(settings.updated({'finetune.budget': 0.0}))
    answers = [robot.ask(text) for text in QUESTIONS]
    assert 1 not in {a.adapter_version for a in answers}
    if not scope:       # nothing is learned
        assert {text: a.text for text, a in zip(QUESTIONS, answers, strict=True)} == right
        assert {a.adapter_version for a in answers} == {0}
    robot.engine.close()


def test_a_suspected_regression_of_a_rolled_back_version_is_dropped(
        settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search in the journal may end only after a rollback by hand."""
    monkeypatch.setattr(regression_check, 'older_is_better', lambda leads: True)
    robot, _ = with_version(settings, tmp_path, 0.02)
    engine = robot.engine
    last = robot.correct(Correction('A robot.', id='k', prompt='Who are you?'))
    assert last.adapter_version == 2
    done = engine.rollback('', 0)
    while not done.done():
        engine.step()
    with Journal(tmp_path / JOURNAL) as journal:
        record = journal.correction('k')
    assert record is not None
    some = Outcomes(MIN_ANSWERS, MIN_ANSWERS)
    engine.learner.suspect(SuspectedRegression('', 2, 2, 1, some, some, (record,) * MIN_ANSWERS))
    last = robot.correct(Correction('In the hall.', id='l', prompt='Where are you?'))
    # It was trained from the base model: version 1 did not become live again.
    assert last.state is CorrectionState.LEARNED
    versions = engine.versions('').result(60)
    assert [(v.version, v.parent) for v in versions][-1] == (3, 0)
    engine.close()


@pytest.mark.parametrize('case', ['taught', 'switched off'])
def test_a_version_that_is_not_worse_stays(
        case: str, settings: Settings, tmp_path: Path) -> None:
    """People begin to teach something new, or automatic rollback is switched off."""
    if case == 'switched off':
        settings = settings.updated({'gate.auto_rollback': False})
    robot, right = with_version(settings, tmp_path, 0.02 if case == 'taught' else 0.3)
    # With a budget, each correction would be learned in a version of its own.
    robot.engine.update(settings.updated({'finetune.budget': 0.0}))
    for i, text in enumerate(QUESTIONS):
        wrong = robot.ask(text)
        robot.engine.correct(Correction(
            f'It is number {i}.' if case == 'taught' else right[text], query_id=wrong.query_id,
            id=text))
        robot.until(lambda e, name=text: isinstance(e, CorrectionStatus) and e.id == name)  # type: ignore[misc]
    with Journal(tmp_path / JOURNAL) as journal:
        suspicion = suspected_regression(journal, '')
    assert suspicion is not None and suspicion.suspect == 1
    robot.engine.update(settings)
    # Versions are compared before anything is learned.
    robot.until(lambda e: isinstance(e, CorrectionStatus)
                and e.state is CorrectionState.TRAINING)
    robot.events += robot.engine.step().events
    assert bool(robot.engine.learner.status().compared) == (case == 'taught')
    assert not rolled_back(robot) and robot.engine.live_version('') == 1
    robot.engine.close()
