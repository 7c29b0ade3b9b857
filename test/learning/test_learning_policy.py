# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The policies of learning that need no device: priority, samples, drift and duty cycle."""

from __future__ import annotations

from dataclasses import replace
import math
import random

from hypothesis import given, strategies
import pytest

from mace_ros.api.settings import Settings
from mace_ros.finetune.sample import Sample
from mace_ros.learning.anchor_replay import AnchorReplay
from mace_ros.learning.anchors import ANCHORS
from mace_ros.learning.drift import Drift, DriftState, MAX_PENDING, surprise
from mace_ros.learning.duty_cycle import DutyCycle, LULL_S
from mace_ros.learning.paraphrases import paraphrases, TRAINED
from mace_ros.learning.priority import gain, priority, resemble, ScoredCorrection
from mace_ros.learning.question import words
from mace_ros.learning.samples import interleaved, rotate, weighted
from mace_ros.learning.training_set import TrainingSet, TrainingSetBuilder

# -- priority ----------------------------------------------------------------------------

USUAL = ScoredCorrection(loss=2.0, margin=-1.0, weight=1.0, age_s=10.0, resembling=1, seconds=0.5)


@pytest.mark.parametrize('better', [
    {'loss': 3.0}, {'margin': -2.0}, {'weight': 2.0}, {'age_s': 5.0}, {'resembling': 2},
    {'seconds': 0.4}])
def test_factors_that_raise_the_priority(better: dict[str, float]) -> None:
    assert priority(replace(USUAL, **better), 120.0) > priority(USUAL, 120.0)


def test_a_correction_that_is_right_by_far_has_almost_no_gain() -> None:
    known = replace(USUAL, loss=0.0, margin=30.0)
    assert gain(known, 120.0) < 1e-9
    assert gain(replace(known, age_s=0.0, resembling=1000), 120.0) < 1e-3


@given(strategies.floats(-1e6, 1e6), strategies.floats(-1e6, 1e6), strategies.integers(0, 1000))
def test_gain_is_finite_and_never_negative(loss: float, margin: float, count: int) -> None:
    value = gain(replace(USUAL, loss=loss, margin=margin, resembling=count), 120.0)
    assert math.isfinite(value) and value >= 0.0


@pytest.mark.parametrize(('one', 'other', 'expected'), [
    ('Where are the cups?', 'where are the red cups', True),
    ('Where are the cups?', 'Who built you?', False),
    ('Où est le café ?', 'Ou est le grand cafe', True),
    ('你叫什么名字', '你的名字叫什么', True),
    ('你叫什么名字', '今天天气怎么样', False),
    ('充電ステーションはどこですか', '充電ステーションはどこにありますか', True),
    ('', '', False)])
def test_resembling_questions_share_half_of_their_words(
        one: str, other: str, expected: bool) -> None:
    """Also in scripts without spaces between words."""
    assert resemble(words(one), words(other)) is expected


# -- samples of a step ----------------------------------------------------------------------


def sample(prompt: list[int], answer: list[int]) -> Sample:
    return Sample((*prompt, *answer), (0.0,) * len(prompt) + (1.0,) * len(answer))


def builder() -> TrainingSetBuilder:
    """Return a builder that needs no tokenizer for these tests."""
    return TrainingSetBuilder(None, AnchorReplay(None))     # type: ignore[arg-type]


@pytest.mark.parametrize('most', [0, 50, 130, 10**6])
def test_a_step_has_the_same_samples_for_any_size_of_parts(most: int) -> None:
    def some(kind: int, count: int) -> list[Sample]:
        return [sample([kind, i] * 5, [i] * 10) for i in range(count)]

    training_set = TrainingSet(
        some(1, 1), earlier=some(2, 3), paraphrases=some(3, 2), forgotten=some(4, 1),
        replayed=some(5, 9))
    finetune = Settings().finetune
    expected = [*some(1, 1), *some(2, 2), *some(3, 1), *some(4, 1),
                *(weighted(s, finetune.replay_weight)
                  for s in some(5, finetune.replay_samples - 2))]
    plan = builder().step(training_set, [], finetune, most=most)
    assert sorted((s for part in plan.parts for s in part), key=lambda s: s.tokens) == expected
    assert all(len(part) == 1 or sum(len(s.tokens) for s in part) <= most for part in plan.parts)
    assert plan.parts[0][:plan.must_be_right] == [
        *some(1, 1), *some(2, 2)][:plan.must_be_right]
    assert plan.must_be_right >= 1


def test_replayed_samples_have_the_weight_of_the_parameter() -> None:
    training_set = TrainingSet([sample([1, 1], [1, 2])], replayed=[sample([2, 2], [3])])
    finetune = Settings().updated(
        {'finetune.replay_weight': 5.0, 'finetune.replay_samples': 1}).finetune
    (part,) = builder().step(training_set, [], finetune, most=10**6).parts
    assert [s.weights for s in part] == [(0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 5.0)]


def test_all_answers_are_replayed_in_rotation_across_short_jobs() -> None:
    steps, finetune = builder(), Settings().finetune
    earlier, replayed = ([sample([kind, i] * 5, [i] * 10) for i in range(20)] for kind in (2, 5))
    seen: list[Sample] = []
    for _ in range(10):
        training_set = TrainingSet(
            [sample([1, 1], [1])], earlier=earlier, replayed=replayed)
        (part,) = steps.step(training_set, [], finetune, most=10**6).parts
        seen += part
    assert {*earlier, *(weighted(s, finetune.replay_weight) for s in replayed)} <= {*seen}


# -- drift -------------------------------------------------------------------------------


def outcomes(drift: Drift, wrong: float, count: int, seed: int) -> None:
    rng = random.Random(seed)
    for i in range(count):
        drift.answered(f'{count} {i}')
        if rng.random() < wrong:
            drift.corrected(f'{count} {i}')
            drift.outcome(0.9)


@pytest.mark.parametrize('seed', range(5))
def test_a_shift_is_detected_and_ends(seed: int) -> None:
    drift = Drift()
    assert drift.state is DriftState.UNKNOWN and drift.budget(0.1, 0.8) == 0.8
    outcomes(drift, 0.05, 100, seed)
    assert drift.state is DriftState.CALM
    assert drift.budget(0.1, 0.8) < 0.3
    assert drift.budget(0.1, 0.8, backlog=True) == 0.8
    outcomes(drift, 0.9, 25, seed)
    assert drift.state is DriftState.DRIFTING
    assert drift.budget(0.1, 0.8) == 0.8
    outcomes(drift, 0.02, 200, seed)
    assert drift.state is DriftState.CALM
    assert drift.budget(0.1, 0.8) < 0.3


@pytest.mark.parametrize('seed', range(5))
def test_a_smaller_shift_is_detected_later(seed: int) -> None:
    drift = Drift()
    outcomes(drift, 0.3, 100, seed)
    assert drift.state is DriftState.CALM
    outcomes(drift, 0.7, 150, seed + 100)
    assert drift.state is DriftState.DRIFTING


def test_getting_better_is_no_drift() -> None:
    drift = Drift()
    outcomes(drift, 0.9, 60, 1)
    assert drift.state is DriftState.CALM
    for _ in range(100):
        drift.outcome(0.0)
        assert drift.state is DriftState.CALM


def test_the_budget_stays_within_its_bounds() -> None:
    drift = Drift()
    for value in (0.0, 1.0, -3.0, 7.0, 0.5) * 20:
        drift.outcome(value)
        assert 0.2 <= drift.budget(0.2, 0.7) <= 0.7
    assert drift.budget(0.5, 0.1) == 0.1    # never above finetune.budget
    assert drift.budget(0.2, 0.0) == 0.0    # frozen stays frozen


@pytest.mark.parametrize('level', [0.0, 0.5, 1.0])
def test_in_calm_the_budget_grows_with_the_surprise(level: float) -> None:
    drift = Drift()
    for _ in range(20):
        drift.outcome(level)
    assert drift.state is DriftState.CALM
    assert drift.budget(0.2, 0.8) == pytest.approx(0.2 + 0.6 * level)


def test_an_answer_that_is_corrected_has_one_outcome() -> None:
    drift = Drift()
    for i in range(100):
        drift.answered(str(i))
        drift.corrected(str(i))
        drift.outcome(0.8)
    assert drift.level == pytest.approx(0.8)
    for i in range(MAX_PENDING):
        drift.answered(f'good {i}')
    assert drift.level == pytest.approx(0.8)
    drift.answered('another one')
    assert drift.level < 0.8
    drift.corrected('good 0')   # too late: the answer counted as right already


def test_surprise_is_a_share() -> None:
    assert surprise(0.0) == 0.0 and surprise(0.1) == 0.0
    assert surprise(-100.0) == pytest.approx(1.0)
    assert surprise(math.log(0.25)) == pytest.approx(0.75)


def test_after_a_job_learning_rests_until_it_took_its_share_of_time() -> None:
    resting = DutyCycle()
    assert resting.until(0.0) == -math.inf      # no job has run yet
    resting.begun(100.0, 0.0)
    resting.spent(4.0)
    resting.spent(6.0)
    assert resting.until(0.25) == 100.0 - LULL_S + 40.0
    assert resting.until(1.0) <= 100.0 + 10.0   # the rest would have ended: none
    assert resting.until(0.0) == math.inf


def test_a_lull_before_a_job_shortens_the_rest_after_it() -> None:
    resting = DutyCycle()
    resting.begun(100.0, 0.5)
    resting.spent(15.0)
    through = resting.until(0.5)
    assert through == 100.0 - LULL_S + 30.0
    resting.begun(through + 5.0, 0.5)       # all of this time was idle
    resting.spent(1.0)
    assert resting.until(0.5) == through + 2.0
    resting.begun(1000.0, 0.5)              # only a part of a long lull counts
    resting.spent(1.0)
    assert resting.until(0.5) == 1000.0 - LULL_S + 2.0


def test_a_job_that_could_not_wait_leaves_no_debt() -> None:
    resting = DutyCycle()
    resting.begun(100.0, 0.5)
    resting.spent(50.0)
    resting.begun(160.0, 0.0)
    resting.spent(1.0)
    assert resting.until(0.5) == 162.0


# -- samples -----------------------------------------------------------------------------


def test_a_paraphrase_changes_the_last_question_only() -> None:
    messages = ({'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'A?'},
                {'role': 'assistant', 'content': 'B.'}, {'role': 'user', 'content': 'C?'})
    changed = paraphrases(messages, TRAINED[1:])
    assert len(changed) == len(TRAINED) - 1
    for each in changed:
        assert each[:3] == list(messages[:3]) and 'C?' in each[3]['content'] != 'C?'
    assert paraphrases(({'role': 'system', 'content': 'x'},), TRAINED) == []


@pytest.mark.parametrize(('question', 'words'), [
    ('Where is the fire extinguisher?', 'fire extinguisher'), ('What is it?', 'What is it'),
    ('Wo ist der Ausgang?', 'Wo ist der Ausgang'), (' ', '')])
def test_the_keywords_of_a_question_are_trained_as_well(question: str, words: str) -> None:
    [[asked]] = paraphrases(({'role': 'user', 'content': question},), TRAINED[:1])
    assert asked['content'] == f'{words}?'


def test_rotation_covers_all_samples() -> None:
    assert [rotate('abc', 2, i) for i in range(3)] == [['a', 'b'], ['c', 'a'], ['b', 'c']]
    assert rotate('', 2, 0) == []
    mixed = interleaved('abcdef', 'xy')
    assert sorted(mixed) == sorted('abcdefxy') and 'x' in mixed[:3] and 'y' in mixed[3:]
    assert interleaved('', 'xy') == ['x', 'y']


def test_no_anchor_is_asked_twice() -> None:
    assert len(set(ANCHORS)) == len(ANCHORS)
