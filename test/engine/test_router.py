# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Which version answers: the profile's, the robot's, or the base model."""

from __future__ import annotations

import pytest
from support.records import correction

from mace_ros.api.settings import AdapterSettings, EVERYWHERE
from mace_ros.engine.router import Router
from mace_ros.learning.live_versions import LiveSet, LiveVersions
from mace_ros.memory.adapter_slots import BASE
from mace_ros.store.corrections import Deleted
from mace_ros.store.records import VersionRecord, wording_key

SIMILAR_ONLY = AdapterSettings()
COLOUR, FOOD, BOTH = 'Favourite colour?', 'Favourite dessert?', 'Shoe size?'
STYLE = 'Talk like a pirate.'


class Bench:
    """A router over two versions: of the robot, and of the profile ann."""

    def __init__(self) -> None:
        self.live = LiveVersions(lambda word: 1e-3 if word in ('favourite', 'size') else 1e-5)
        self.router = Router(self.live)

    def learn(self, profile: str, *questions: str, version: int = 1, continues: int = 0,
              everywhere: bool = False) -> None:
        """Publish a version of a profile."""
        self.live.publish(
            VersionRecord(profile, version, 0, continues=continues, everywhere=everywhere), [
                correction(f'{profile}: {q}', q, profile=profile, adapter_version=version)
                for q in questions])

    def ask(self, profile: str, text: str,
            settings: AdapterSettings = SIMILAR_ONLY) -> tuple[str | None, str, bool]:
        """Return the profile whose version answers (None: the base model), and the explanation."""
        route = self.router.route(profile, ({'role': 'user', 'content': text},), settings)
        version = route.version
        return (version.profile if version.version else None, route.correction_id,
                route.out_of_scope)

    def version(self, text: str, settings: AdapterSettings = SIMILAR_ONLY) -> int:
        """Return the robot's version that answers."""
        return self.router.route(
            '', ({'role': 'user', 'content': text},), settings).version.version


@pytest.fixture
def bench() -> Bench:
    """Return a router over what the robot and ann have learned; both know ``BOTH``."""
    made = Bench()
    made.learn('', COLOUR, BOTH)
    made.learn('ann', FOOD, BOTH)
    return made


@pytest.mark.parametrize(('profile', 'text', 'answers', 'passed'), [
    ('ann', FOOD, 'ann', False), ('ann', BOTH, 'ann', False), ('ann', COLOUR, '', True),
    ('ann', 'Who?', None, True), ('', COLOUR, '', False), ('', BOTH, '', False),
    ('', FOOD, None, True), ('bob', COLOUR, '', False), ('bob', FOOD, None, True)])
def test_the_profile_comes_before_the_robot_and_the_robot_before_the_base_model(
        bench: Bench, profile: str, text: str, answers: str | None, passed: bool) -> None:
    expected = f'{answers}: {text}' if answers is not None else ''
    assert bench.ask(profile, text) == (answers, expected, passed)


def test_scopes_come_before_versions_for_every_question(bench: Bench) -> None:
    """The profile's scope, the robot's, then the versions of both that answer everything."""
    everywhere = AdapterSettings(scope=EVERYWHERE)
    bench.learn('', STYLE, version=2, everywhere=True)
    assert bench.ask('ann', 'Who?', everywhere) == ('', '', True)
    assert bench.ask('bob', 'Who?', everywhere) == ('', '', False)
    bench.learn('ann', STYLE, version=2, everywhere=True)
    assert bench.ask('ann', FOOD, everywhere) == ('ann', f'ann: {FOOD}', False)
    assert bench.ask('ann', COLOUR, everywhere) == ('', f': {COLOUR}', True)
    assert bench.ask('ann', 'Who?', everywhere) == ('ann', '', False)
    assert bench.ask('ann', 'Who?') == (None, '', True)
    assert bench.ask('ann', STYLE) == ('ann', f'ann: {STYLE}', False)


def test_the_question_of_a_deleted_correction_is_not_answered_by_any_version(bench: Bench) -> None:
    """Not even by one for every question, which may have learned it."""
    everywhere = AdapterSettings(scope=EVERYWHERE)
    bench.learn('', STYLE, version=2, everywhere=True)
    deleted = correction('deleted', 'Shape of the moon?', adapter_version=2)
    bench.live.learned('', [deleted])
    bench.live.delete(Deleted((deleted,), (('', wording_key('Shape of the moon?')),)))
    assert bench.ask('bob', 'Shape of the moon?', everywhere) == (None, '', True)
    assert bench.ask('bob', 'Who?', everywhere) == ('', '', False)


def test_a_version_with_a_scope_never_answers_everything(bench: Bench) -> None:
    """It was trained without anything that protects the other answers."""
    assert bench.ask('ann', 'Who?', AdapterSettings(scope=EVERYWHERE)) == (None, '', True)


def test_newer_versions_with_a_scope_leave_the_other_questions_alone(bench: Bench) -> None:
    everywhere = AdapterSettings(scope=EVERYWHERE)
    bench.learn('', STYLE, version=2, everywhere=True)
    bench.learn('', 'Which bus goes home?', version=3)
    assert bench.version('Who?', everywhere) == 2


def test_the_nearest_correction_is_reported_out_of_scope_too(bench: Bench) -> None:
    """The similarity of a question that was just missed tells how to set the threshold."""
    messages = ({'role': 'user', 'content': 'Favourite song?'},)
    route = bench.router.route('ann', messages, SIMILAR_ONLY)
    assert (route.version.version, route.correction_id) == (0, '')
    assert 0.0 < route.similarity < SIMILAR_ONLY.scope_threshold


def test_what_the_base_model_answers_right_already_is_its_question(bench: Bench) -> None:
    """A correction that needed no training."""
    bench.live.learned('bob', [correction('bob: known', COLOUR, profile='bob')])
    assert bench.ask('bob', COLOUR) == (None, '', False)


def test_each_correction_is_answered_by_the_version_that_has_learned_it_last() -> None:
    bench = Bench()
    bench.learn('', COLOUR, version=1)
    bench.learn('', FOOD, version=2, continues=1)
    bench.learn('', BOTH, version=3)
    assert [bench.version(text) for text in (COLOUR, FOOD, BOTH)] == [2, 2, 3]
    bench.learn('', 'Which bus goes home?', version=4, continues=2)
    assert [bench.version(text) for text in (COLOUR, FOOD, BOTH)] == [4, 4, 3]
    assert bench.live.newest('') == 4
    bench.live.replace('', LiveSet(1, {1: VersionRecord('', 1, 0)}, {1: 1}), [
        correction(COLOUR, COLOUR, adapter_version=1)])
    assert [bench.version(text) for text in (COLOUR, FOOD)] == [1, 0]
    bench.live.replace('', LiveSet(), [])
    assert bench.router.route('', (), SIMILAR_ONLY).version == BASE
