# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A live version and its scope change together: whatever is learned, taken back or deleted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.robot import NO_END, Robot, robot_with

from mace_ros.api.events import (
    AdapterVersion,
    Correction,
    CorrectionState,
    CorrectionStatus,
    Query,
    Response,
    VersionState,
)
from mace_ros.api.settings import EVERYWHERE, Settings
from mace_ros.cli import journal_admin
from mace_ros.learning import backoff, learning_job
from mace_ros.learning.disk import Disk
from mace_ros.learning.job_inputs import supersede
from mace_ros.learning.task import Pause, Task
from mace_ros.store.journal import Journal
from mace_ros.store.layout import JOURNAL, WEIGHTS
from mace_ros.store.records import CorrectionRecord

NAME, PARAPHRASE, COLOUR = 'What is your name?', 'Tell me your name.', 'Which colour is the door?'
GATE, GARDEN_GATE = 'What colour is the gate?', 'What colour is the garden gate?'
OTHERS = ('Tell me about the sea.', 'How many days are in a week?', 'Sing a song, please.')


def learn(robot: Robot, text: str, about: str, name: str, **fields: object) -> None:
    """Correct the answer to a question; wait until it is learned."""
    state = robot.correct(Correction(text, id=name, prompt=about, **fields))  # type: ignore[arg-type]
    assert state.state is CorrectionState.LEARNED, state.reason


def told(response: Response) -> tuple[str, int, str]:
    """Return the answer and its explanation."""
    return response.text, response.adapter_version, response.matched_correction_id


def base_answers(robot: Robot, *texts: str) -> dict[str, str]:
    """Return the base model's answers."""
    responses = {text: robot.ask(text) for text in texts}
    assert {r.adapter_version for r in responses.values()} == {0}
    return {text: response.text for text, response in responses.items()}


def roll_back(robot: Robot, version: int, profile: str = '') -> None:
    """Make a version live."""
    done = robot.engine.rollback(profile, version)
    while not done.done():
        robot.events += robot.engine.step().events
    done.result()


def test_other_questions_are_answered_as_before(robot: Robot) -> None:
    """Byte by byte, while paraphrases reach the version that learned."""
    before = base_answers(robot, *OTHERS)
    learn(robot, 'Rover.', NAME, 'k')
    assert base_answers(robot, *OTHERS) == before
    assert told(robot.ask(NAME)) == ('Rover.', 1, 'k')
    answer = robot.ask(PARAPHRASE)
    assert (answer.adapter_version, answer.matched_correction_id) == (1, 'k')
    assert robot.engine.settings.adapter.scope_threshold <= answer.similarity <= 1.0


def test_a_profile_follows_the_robot_outside_its_own_scope(robot: Robot) -> None:
    """Also in what the robot has learned since the profile got a version of its own."""
    before = base_answers(robot, *OTHERS)
    learn(robot, 'Bella.', NAME, 'ann', profile='ann')
    learn(robot, 'Green.', COLOUR, 'robot')
    assert told(robot.ask(NAME, profile='ann')) == ('Bella.', 1, 'ann')
    assert told(robot.ask(COLOUR, profile='ann')) == ('Green.', 1, 'robot')
    assert [robot.ask(text, profile='ann').adapter_profile for text in (NAME, COLOUR)] == [
        'ann', '']
    assert {text: robot.ask(text, profile='ann').text for text in OTHERS} == before
    assert robot.ask(NAME).adapter_version == 0


def test_scopes_are_restored(settings: Settings, tmp_path: Path) -> None:
    with robot_with(settings, tmp_path) as robot:
        before = base_answers(robot, *OTHERS)
        learn(robot, 'Rover.', NAME, 'k')
    with robot_with(settings, tmp_path) as robot:
        robot.engine.start()
        assert base_answers(robot, *OTHERS) == before
        assert told(robot.ask(NAME)) == ('Rover.', 1, 'k')


@pytest.mark.parametrize('learns', [False, True])
def test_a_damaged_version_is_found_at_its_first_use(
        settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learns: bool) -> None:
    """The base model answers in its place, and what it had learned can be learned again."""
    monkeypatch.setattr(backoff, 'LONGEST_S', 0.05)
    with robot_with(settings, tmp_path) as robot:
        before = base_answers(robot, NAME)
        learn(robot, 'Rover.', NAME, 'name')
        learn(robot, 'Green.', COLOUR, 'colour')
    [weights] = tmp_path.glob(f'adapters/*/v000001/{WEIGHTS}')
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with robot_with(settings, tmp_path) as robot:
        robot.engine.start()
        assert told(robot.ask(COLOUR)) == ('Green.', 2, 'colour')
        if learns:
            learn(robot, 'Bella.', NAME, 'newer')
            assert told(robot.ask(NAME)) == ('Bella.', 3, 'newer')
        else:
            assert base_answers(robot, NAME) == before
        [damaged] = [e for e in robot.events if isinstance(e, AdapterVersion)
                     and e.state is VersionState.REJECTED]
        assert damaged.version == 1 and 'SHA-256' in damaged.reason and damaged.path


def test_rollback_takes_the_scope_back_and_returns_it(robot: Robot) -> None:
    before = base_answers(robot, NAME, COLOUR)
    learn(robot, 'Rover.', NAME, 'name')
    learn(robot, 'Green.', COLOUR, 'colour')
    roll_back(robot, 1)
    assert told(robot.ask(NAME)) == ('Rover.', 1, 'name')
    assert base_answers(robot, COLOUR) == {COLOUR: before[COLOUR]}
    roll_back(robot, 0)
    assert base_answers(robot, NAME, COLOUR) == before
    roll_back(robot, 2)
    assert told(robot.ask(COLOUR)) == ('Green.', 2, 'colour')
    assert told(robot.ask(NAME)) == ('Rover.', 1, 'name')


def test_a_rollback_to_the_base_model_can_be_undone(settings: Settings, tmp_path: Path) -> None:
    """Also of more versions than are kept for a rollback, and without a deleted correction."""
    with robot_with(settings, tmp_path, storage__max_versions=2) as robot:
        before = base_answers(robot, NAME)
        learn(robot, 'Rover.', NAME, 'name')
        for number, text in enumerate(OTHERS):
            learn(robot, 'Green.', text, f'other{number}')
        roll_back(robot, 0)
    with Journal(tmp_path / JOURNAL) as journal:
        journal.forget_corrections(['name'])
    for _ in range(2):      # the first start deletes the files of version 1
        with robot_with(settings, tmp_path, storage__max_versions=2) as robot:
            roll_back(robot, 4)
            assert [told(robot.ask(text)) for text in OTHERS] == [
                ('Green.', version, f'other{version - 2}') for version in (2, 3, 4)]
            assert base_answers(robot, NAME) == before
            assert VersionState.REJECTED not in [
                e.state for e in robot.engine.start() if isinstance(e, AdapterVersion)]
    assert not list(tmp_path.glob('adapters/*/v000001'))


def test_an_imported_version_answers_what_it_has_learned(
        settings: Settings, tmp_path: Path) -> None:
    """Under another number, with the same words, and without learning; not what it has not."""
    here, there, file = tmp_path / 'here', tmp_path / 'there', str(tmp_path / 'export.jsonl')
    with robot_with(settings, here) as robot:
        before = base_answers(robot, *OTHERS)
        learn(robot, 'Rover.', NAME, 'name')
        learn(robot, 'Green.', COLOUR, 'colour')
        learn(robot, 'Bella.', NAME, 'newer')      # continues version 1
        learn(robot, 'Red.', COLOUR, 'ann', profile='ann')
        paraphrased = robot.ask(PARAPHRASE).text
    with robot_with(settings, there) as robot:
        learn(robot, 'It is wide.', OTHERS[0], 'own')
        roll_back(robot, 0)
    for folder, command in ((here, ['export', '--weights']), (there, ['import'])):
        given = journal_admin.parser().parse_args(['--folder', str(folder), *command, file])
        given.run(given)
    with robot_with(settings, there) as robot:
        restored = [e for e in robot.engine.start() if isinstance(e, AdapterVersion)]
        assert [(e.profile, e.version) for e in restored] == [('', 4), ('ann', 1)]
        assert told(robot.ask(NAME)) == ('Bella.', 4, 'newer')
        assert told(robot.ask(PARAPHRASE)) == (paraphrased, 4, 'newer')
        assert told(robot.ask(COLOUR)) == ('Green.', 3, 'colour')
        assert told(robot.ask(COLOUR, profile='ann')) == ('Red.', 1, 'ann')
        assert base_answers(robot, *OTHERS) == before
        assert not any(isinstance(e, AdapterVersion) for e in robot.events)
        roll_back(robot, 3)
        assert told(robot.ask(COLOUR)) == ('Green.', 3, 'colour')
        roll_back(robot, 0)
        assert base_answers(robot, *OTHERS) == before
        assert robot.ask(COLOUR).adapter_version == 0


@pytest.mark.parametrize('restarts', [False, True])
def test_a_superseded_correction_answers_until_the_newer_one_is_learned(
        settings: Settings, tmp_path: Path, restarts: bool) -> None:
    """Otherwise a question that is corrected again would get the base model's answer meanwhile."""
    with robot_with(settings, tmp_path) as robot:
        learn(robot, 'Rover.', NAME, 'older')
        if not restarts:
            robot.engine.update(settings.updated({'finetune.budget': 0.0}))
            newer(robot)
            assert told(robot.ask(NAME)) == ('Rover.', 1, 'older')
            robot.engine.update(settings)
            until_learned(robot)
            assert told(robot.ask(NAME)) == ('Bella.', 2, 'newer')
            return
        robot.engine.update(settings.updated({'finetune.budget': 0.0}))
        newer(robot)
    with robot_with(settings, tmp_path, finetune__budget=0.0) as robot:
        assert told(robot.ask(NAME)) == ('Rover.', 1, 'older')
        robot.engine.update(settings)
        until_learned(robot)
        assert told(robot.ask(NAME)) == ('Bella.', 2, 'newer')


def newer(robot: Robot) -> None:
    robot.engine.correct(Correction('Bella.', id='newer', prompt=NAME))
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == 'older')


def until_learned(robot: Robot) -> None:
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == 'newer'
                and e.state is CorrectionState.LEARNED)


def test_a_correction_sent_again_is_in_scope_all_the_time(robot: Robot) -> None:
    """The live version answers it right already; the newer id explains the answer then."""
    learn(robot, 'Rover.', NAME, 'first')
    robot.engine.correct(Correction('Rover.', id='again', prompt=NAME))
    while not any(isinstance(e, CorrectionStatus) and e.id == 'again'
                  and e.state is CorrectionState.LEARNED for e in robot.events):
        assert robot.ask(NAME, no_learn=True).text == 'Rover.'
        robot.events += robot.engine.step().events      # such short answers leave no time to learn
    assert told(robot.ask(NAME)) == ('Rover.', 1, 'again')


def test_a_failed_correction_takes_what_it_was_to_replace_out_of_scope(robot: Robot) -> None:
    before = base_answers(robot, NAME)
    learn(robot, 'Rover.', NAME, 'older')
    robot.engine.update(robot.engine.settings.updated({'finetune.max_steps': 1}))
    state = robot.correct(Correction('Quite another name, which takes many steps.', id='newer',
                                     prompt=NAME))
    assert state.state is CorrectionState.FAILED
    assert base_answers(robot, NAME) == before


def test_a_deleted_correction_is_out_of_scope(settings: Settings, tmp_path: Path) -> None:
    """Without training: its question gets the base model's answer, byte by byte."""
    with robot_with(settings, tmp_path) as robot:
        before = base_answers(robot, NAME, PARAPHRASE)
        learn(robot, 'Rover.', NAME, 'name')
        learn(robot, 'Green.', COLOUR, 'colour')
    with Journal(tmp_path / JOURNAL) as journal:
        journal.forget_corrections(['name'])
    with robot_with(settings, tmp_path) as robot:
        assert base_answers(robot, NAME, PARAPHRASE) == before
        assert told(robot.ask(COLOUR)) == ('Green.', 2, 'colour')


def test_a_correction_that_has_to_make_room_is_out_of_scope_at_once(
        settings: Settings, tmp_path: Path) -> None:
    with robot_with(settings, tmp_path, storage__max_corrections=1) as robot:
        before = base_answers(robot, NAME)
        learn(robot, 'Rover.', NAME, 'name')
        learn(robot, 'Green.', COLOUR, 'colour')
        assert base_answers(robot, NAME) == before
        assert told(robot.ask(COLOUR)) == ('Green.', 2, 'colour')


@pytest.mark.parametrize('restarts', [False, True])
def test_a_neighbour_does_not_give_a_deleted_answer(
        settings: Settings, tmp_path: Path, restarts: bool) -> None:
    """A version that has learned both answers only the one that is kept, until taught again."""
    most = 10 if restarts else 2
    with robot_with(settings, tmp_path, storage__max_corrections=most) as robot:
        before = base_answers(robot, GATE)
        learn(robot, 'Blue.', GATE, 'gate')
        assert robot.ask(GARDEN_GATE).matched_correction_id == 'gate'
        learn(robot, 'Green.', GARDEN_GATE, 'garden')
        assert told(robot.ask(GATE))[1:] == (2, 'gate')
        if not restarts:        # it has to make room
            learn(robot, 'Rover.', NAME, 'name')
            assert base_answers(robot, GATE) == before
            assert told(robot.ask(GARDEN_GATE)) == ('Green.', 2, 'garden')
            roll_back(robot, 2)
            assert base_answers(robot, GATE) == before
    if not restarts:
        return
    with Journal(tmp_path / JOURNAL) as journal:
        journal.forget_corrections(['gate'])
    with robot_with(settings, tmp_path) as robot:
        assert base_answers(robot, GATE, f'  {GATE.upper()}')[GATE] == before[GATE]
        assert robot.ask(GATE).similarity >= robot.engine.settings.adapter.scope_threshold
        assert told(robot.ask(GARDEN_GATE)) == ('Green.', 2, 'garden')
        learn(robot, 'Red.', GATE, 'again')
        assert told(robot.ask(GATE)) == ('Red.', 3, 'again')
    with robot_with(settings, tmp_path) as robot:
        assert told(robot.ask(GATE)) == ('Red.', 3, 'again')


def test_a_correction_that_is_repeated_while_it_takes_the_place_of_another_is_learned(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    learn(robot, 'Blue.', GATE, 'older')
    again = Correction('Red.', id='again', prompt='Which colour does the gate have?')

    def repeated(disk: Disk, newer: CorrectionRecord) -> Task[bool]:
        robot.engine.correct(again)
        while not any(isinstance(e, CorrectionStatus) and e.id == 'again' for e in robot.events):
            yield Pause.NEXT_POLL
        return (yield from supersede(disk, newer))

    monkeypatch.setattr(learning_job, 'supersede', repeated)
    robot.engine.correct(replace(again, id='first'))
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == 'again'
                and e.state is CorrectionState.LEARNED)
    assert told(robot.ask(GATE))[1:] == (2, 'again')


def test_a_rollback_brings_back_no_answer_that_a_deleted_one_replaced(
        settings: Settings, tmp_path: Path) -> None:
    with robot_with(settings, tmp_path) as robot:
        before = base_answers(robot, NAME)
        learn(robot, 'Rover.', NAME, 'older')
        learn(robot, 'Bella.', NAME, 'newer')
        learn(robot, 'Green.', COLOUR, 'colour')
    with Journal(tmp_path / JOURNAL) as journal:
        journal.forget_corrections(['newer'])
    with robot_with(settings, tmp_path) as robot:
        roll_back(robot, 2)
        assert base_answers(robot, NAME) == before


def test_a_question_that_was_asked_in_other_words_stays_in_scope(
        settings: Settings, tmp_path: Path) -> None:
    """Also once the correction in the other words is deleted, to make room."""
    with robot_with(settings, tmp_path, storage__max_corrections=2) as robot:
        learn(robot, 'Blue.', GATE, 'older')
        learn(robot, 'Red.', 'Which colour does the gate have?', 'newer')
        assert robot.ask(GATE).matched_correction_id == 'newer'
        learn(robot, 'Rover.', NAME, 'name')
        assert robot.ask(GATE).matched_correction_id == 'newer'


def test_a_deleted_answer_does_not_come_back_with_a_rollback(
        settings: Settings, tmp_path: Path) -> None:
    """Neither from the scope nor from the version that answers every question."""
    everywhere = {'adapter__scope': EVERYWHERE}
    with robot_with(settings, tmp_path, **everywhere) as robot:
        before = base_answers(robot, GATE)
        learn(robot, 'Blue.', GATE, 'older')
        learn(robot, 'Red.', GATE, 'newer')
    with Journal(tmp_path / JOURNAL) as journal:
        journal.forget_corrections(['older'])
    with robot_with(settings, tmp_path, **everywhere) as robot:
        assert told(robot.ask(GATE)) == ('Red.', 2, 'newer')
        roll_back(robot, 1)
        assert base_answers(robot, GATE) == before


def test_scope_and_threshold_are_live_parameters(robot: Robot) -> None:
    learn(robot, 'Rover.', NAME, 'k')
    plain = robot.engine.settings

    def versions(**values: object) -> list[int]:
        robot.engine.update(plain.updated({
            f'adapter.{name}': value for name, value in values.items()}))  # type: ignore[misc]
        return [robot.ask(text).adapter_version for text in (NAME, PARAPHRASE, OTHERS[0])]

    assert versions() == [1, 1, 0]
    assert versions(scope=EVERYWHERE) == [1, 1, 0]      # it was not trained for other questions
    assert versions(scope_threshold=1.0) == [1, 0, 0]
    assert versions(scope_threshold=0.0) == [1, 1, 0]    # without a common word, still not
    robot.engine.update(plain.updated({'adapter.scope': EVERYWHERE}))
    learn(robot, 'Arr!', 'Talk like a pirate.', 'style')
    assert versions(scope=EVERYWHERE) == [1, 1, 2]
    assert versions() == [1, 1, 0]


def test_a_correction_of_style_is_for_every_question(robot: Robot) -> None:
    learn(robot, 'Arr!', 'Talk like a pirate.', 'style', scope=EVERYWHERE)
    answer = robot.ask(OTHERS[0])
    assert (answer.adapter_version, answer.matched_correction_id) == (1, '')


def test_a_style_is_learned_apart_from_what_was_learned_before_and_after(
        settings: Settings, tmp_path: Path) -> None:
    """Facts stay with their own versions, also after a restart; a style continues a style."""
    with robot_with(settings, tmp_path) as robot:
        learn(robot, 'Rover.', NAME, 'name')
        learn(robot, 'Arr!', 'Talk like a pirate.', 'style', scope=EVERYWHERE)
        learn(robot, 'Green.', COLOUR, 'colour')
        assert robot.ask(OTHERS[0]).adapter_version == 2
        learn(robot, 'Ahoy!', 'Greet like a pirate.', 'greeting', scope=EVERYWHERE)
        versions = robot.engine.versions('').result(60)
    with robot_with(settings, tmp_path) as robot:
        robot.engine.start()
        assert told(robot.ask(NAME)) == ('Rover.', 1, 'name')
        assert told(robot.ask(COLOUR)) == ('Green.', 3, 'colour')
        assert told(robot.ask('Talk like a pirate.')) == ('Arr!', 4, 'style')
        assert robot.ask(OTHERS[0]).adapter_version == 4
    assert [v.parent for v in versions] == [0, 1, 2, 3]
    with Journal(tmp_path / JOURNAL) as journal:
        assert [(v.continues, v.everywhere) for v in journal.versions('')] == [
            (0, False), (0, True), (0, False), (2, True)]


def test_a_correction_may_keep_to_its_question_whatever_the_parameter_says(
        settings: Settings, tmp_path: Path) -> None:
    with robot_with(settings, tmp_path, adapter__scope=EVERYWHERE) as robot:
        learn(robot, 'Arr!', 'Talk like a pirate.', 'style')
        learn(robot, 'Rover.', NAME, 'name', scope='similar')
        assert told(robot.ask(NAME)) == ('Rover.', 2, 'name')
        assert robot.ask(OTHERS[0]).adapter_version == 1
    with robot_with(settings, tmp_path) as robot:      # which a version with a scope can't continue
        learn(robot, 'Aye!', 'Talk like a pirate, please.', 'newer')
        assert robot.ask('Talk like a pirate, please.').adapter_version == 3
    with Journal(tmp_path / JOURNAL) as journal:
        assert [v.continues for v in journal.versions('')] == [0, 0, 0]


def test_what_the_robots_version_answers_right_stays_right_for_a_profile(
        settings: Settings, tmp_path: Path) -> None:
    """A profile without a version of its own must not be served the base model then."""
    with robot_with(settings, tmp_path, adapter__scope=EVERYWHERE) as robot:
        learn(robot, 'Rover.', NAME, 'of all')
        assert robot.ask(NAME, profile='ann').text == 'Rover.'
        learn(robot, 'Rover.', NAME, 'of ann', profile='ann')
        assert robot.ask(NAME, profile='ann').text == 'Rover.'
    with robot_with(settings, tmp_path, adapter__scope=EVERYWHERE) as robot:
        robot.engine.start()
        assert robot.ask(NAME, profile='ann').text == 'Rover.'
        roll_back(robot, 0)
        assert told(robot.ask(NAME, profile='ann')) == ('Rover.', 1, 'of ann')


def test_an_unknown_scope_is_refused(robot: Robot) -> None:
    state = robot.correct(Correction('Rover.', id='k', prompt=NAME, scope='nearby'))
    assert state.state is CorrectionState.REJECTED
    assert state.reason == "scope: 'nearby' is not one of similar, everywhere, or empty"


@pytest.mark.parametrize('first', ['A question before.', NAME])
def test_a_follow_up_is_answered_by_the_version_that_answered_before(
        robot: Robot, first: str) -> None:
    learn(robot, 'Rover.', NAME, 'k')
    said = [robot.ask(text, conversation_id='c') for text in (first, 'And the cat?', OTHERS[0])]
    in_scope = first == NAME
    assert [r.adapter_version for r in said] == [in_scope, in_scope, 0]
    assert said[1].matched_correction_id == ('k' if in_scope else '')


def test_a_correction_amid_a_conversation_is_known_by_its_own_question(robot: Robot) -> None:
    for text in ('Hello there, robot.', NAME):
        robot.ask(text, conversation_id='c', id=f'c {text}')
    state = robot.correct(Correction('Rover.', id='k', query_id=f'c {NAME}'))
    assert state.state is CorrectionState.LEARNED
    assert robot.ask(NAME).matched_correction_id == 'k'
    assert robot.ask('Hello there, robot.').adapter_version == 0


def test_answers_on_record_say_what_they_drew_on(
        settings: Settings, tmp_path: Path) -> None:
    """Those outside a version's scope do not count for or against it."""
    with robot_with(settings, tmp_path) as robot:
        robot.ask(OTHERS[0], id='before')
        learn(robot, 'Rover.', NAME, 'k')
        robot.ask(NAME, id='in scope')
        robot.ask(OTHERS[1], id='out of scope')
        robot.ask(NAME, id='of ann', profile='ann')
    with Journal(tmp_path / JOURNAL) as journal:
        record = {a.query_id: (a.matched_correction_id, a.out_of_scope)
                  for a in journal.answers()}
        counted = [(o.query_id, o.version) for o in journal.answer_outcomes('', 10)]
    assert record == {'before': ('', False), 'in scope': ('k', False),
                      'out of scope': ('', True), 'of ann': ('k', False)}
    assert counted == [('before', 0), ('in scope', 1), ('of ann', 1)]


def test_a_query_on_its_way_keeps_its_version(robot: Robot) -> None:
    """The decision is made once, when it arrives."""
    learn(robot, 'Rover. ' * 4, NAME, 'k')
    robot.engine.submit(Query(NAME, id='q', max_tokens=12, **NO_END))
    robot.events += robot.engine.step().events
    roll_back(robot, 0)
    response = robot.answer('q')
    assert (response.adapter_version, response.matched_correction_id) == (1, 'k')
    assert robot.ask(NAME).adapter_version == 0
