# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Which version answers: the profile's, the robot's, or the base model."""

from __future__ import annotations

import pytest
from support.records import correction

from mace_ros.api.settings import AdapterSettings, EVERYWHERE
from mace_ros.engine.router import Router
from mace_ros.learning.scope import Scopes
from mace_ros.memory.adapter_slots import AdapterSlots

SIMILAR_ONLY = AdapterSettings()
COLOUR, FOOD, BOTH = 'Favourite colour?', 'Favourite dessert?', 'Shoe size?'


class Bench:
    """A router over two versions: of the robot, and of the profile ann."""

    def __init__(self) -> None:
        self.slots = AdapterSlots(base_slot=0, first=1, count=3)
        self.scopes = Scopes(lambda word: 1e-3 if word in ('favourite', 'size') else 1e-5)
        self.router = Router(self.slots, self.scopes)

    def learn(self, profile: str, *questions: str) -> None:
        """Publish a version of a profile."""
        slot = self.slots.reserve()
        assert slot is not None
        self.slots.publish(profile, 1, slot)
        self.scopes.learned(profile, [
            correction(f'{profile}: {q}', q, profile=profile) for q in questions])

    def ask(self, profile: str, text: str,
            settings: AdapterSettings = SIMILAR_ONLY) -> tuple[str | None, str, bool]:
        """Return the profile whose version answers (None: the base model), and the explanation."""
        route = self.router.route(profile, ({'role': 'user', 'content': text},), settings)
        self.router.release(route.version)
        version = route.version
        return (version.profile if version.version else None, route.correction_id,
                route.out_of_scope)


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


def test_everywhere_the_profiles_version_answers_everything(bench: Bench) -> None:
    """As without scopes; what the question resembles is named all the same."""
    everywhere = AdapterSettings(scope=EVERYWHERE)
    assert bench.ask('ann', COLOUR, everywhere) == ('ann', '', False)
    assert bench.ask('ann', FOOD, everywhere) == ('ann', f'ann: {FOOD}', False)
    assert bench.ask('bob', FOOD, everywhere) == ('', '', False)
    assert Bench().ask('bob', FOOD, everywhere) == (None, '', False)


def test_the_nearest_correction_is_reported_out_of_scope_too(bench: Bench) -> None:
    """The similarity of a question that was just missed tells how to set the threshold."""
    messages = ({'role': 'user', 'content': 'Favourite song?'},)
    route = bench.router.route('ann', messages, SIMILAR_ONLY)
    assert (route.version.version, route.correction_id) == (0, '')
    assert 0.0 < route.similarity < SIMILAR_ONLY.scope_threshold


def test_what_the_robots_version_answers_right_already_stays_its_question(bench: Bench) -> None:
    """A profile without a version has learned corrections that needed no training."""
    bench.scopes.learned('bob', [correction('bob: known', 'Your weight?', profile='bob')])
    assert bench.ask('bob', 'Your weight?') == ('', 'bob: known', False)
    bench.slots.withdraw('')
    assert bench.ask('bob', 'Your weight?') == (None, '', False)


def test_a_route_keeps_its_version_in_the_slot(bench: Bench) -> None:
    free = bench.slots.free
    route = bench.router.route('', ({'role': 'user', 'content': COLOUR},), SIMILAR_ONLY)
    bench.slots.withdraw('')
    bench.scopes.replace('', [])
    assert bench.slots.free == free
    bench.router.release(route.version)
    assert bench.slots.free == free + 1
    base = bench.router.base()
    assert (base.version.version, base.version.slot) == (0, 0)
