# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001 (characters of several scripts look alike)
"""
Which questions resemble a learned one: what holds, and what does not.

Words are rare or common as the packaged model's tokenizer says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
import json
from pathlib import Path
import random
import time

import pytest
from support.records import correction

from mace_ros.api.settings import AdapterSettings
from mace_ros.learning.live_versions import LiveSet, LiveVersions
from mace_ros.learning.scope import entry, Match, Scope
from mace_ros.model.loading import LoadedModel
from mace_ros.model.token_ranks import token_ranks
from mace_ros.store.records import CorrectionRecord, VersionRecord

SETTINGS = AdapterSettings()
ROBOT_QUESTIONS = Path(__file__).parents[1] / 'data' / 'robot_questions.json'
NAME, CUPS, HOURS = 'What is your name?', 'Where are the cups?', 'When does the library open?'
LEARNED = (NAME, CUPS, HOURS, 'Who repairs you when you are broken?',
           'What is the password for guests?', 'In which year was Ed Brandenburg born?')


@pytest.fixture(scope='module')
def frequency(base_model: LoadedModel) -> Callable[[str], float]:
    """Return how common a word is."""
    return token_ranks(base_model.tokenizer).frequency


def scopes_with(frequency: Callable[[str], float], *questions: str, profile: str = '',
                **fields: object) -> LiveVersions:
    """Return a live version that has learned these questions; each is its own id."""
    live = LiveVersions(frequency)
    live.replace(profile, LiveSet(1, {1: VersionRecord(profile, 1, 0)}, {1: 1}), [
        correction(text, text, profile=profile, adapter_version=1, **fields)
        for text in questions])
    return live


def match(live: LiveVersions, *asked: str, settings: AdapterSettings = SETTINGS,
          profile: str = '') -> tuple[bool, str]:
    """Return whether a question is in scope, and what it resembles then."""
    found, _ = live.match(profile, asked, settings)
    return found is not None, '' if found is None or found.match is None else (
        found.match.correction_id)


@pytest.mark.parametrize(('text', 'resembles'), [
    (NAME, NAME),
    ('WHAT IS YOUR NAME', NAME),
    ('Tell me your name.', NAME),
    ('Hi there! Could you help me? What is your name?', NAME),
    ('Where can I find the cups?', CUPS),
    ('Where is the cup?', CUPS),
    ('At what time does the library open?', HOURS),
    ('Please tell me the password for guests.', 'What is the password for guests?'),
    ('When was Ed Brandenburg born?', 'In which year was Ed Brandenburg born?'),
])
def test_paraphrases_are_in_scope(
        frequency: Callable[[str], float], text: str, resembles: str) -> None:
    """They name what the corrected question is about, in the same or an inflected form."""
    assert match(scopes_with(frequency, *LEARNED), text) == (True, resembles)


@pytest.mark.parametrize('text', [
    'What is the capital of Italy?', 'Who are you?', 'How are you today?', 'Tell me a joke.',
    'What is the name of the largest ocean?', 'Where are the forks?',
    'In which year was Karl Benz born?', 'When does the pharmacy open?',
    'Write a poem about the sea.', '???', '你好'])
def test_other_questions_are_out_of_scope(
        frequency: Callable[[str], float], text: str) -> None:
    """So are near misses: the same question about something else."""
    assert match(scopes_with(frequency, *LEARNED), text)[0] is False


@pytest.mark.parametrize('text', [
    'What is not your name?', "What isn't your name?"])
def test_negation_is_not_seen(frequency: Callable[[str], float], text: str) -> None:
    """A negated question is about the same thing: the version answers it, for better or worse."""
    assert match(scopes_with(frequency, *LEARNED), text) == (True, NAME)


@pytest.mark.parametrize('text', [
    'Wie heißt du?', 'Comment tu t’appelles ?', 'How do people call you?'])
def test_without_a_common_word_nothing_is_recognised(
        frequency: Callable[[str], float], text: str) -> None:
    """Another language and other words are answered by the base model."""
    assert match(scopes_with(frequency, *LEARNED), text)[0] is False


@pytest.mark.parametrize(('learned', 'asked', 'other'), [
    ('你叫什么名字？', '你的名字叫什么？', '今天天气怎么样？'),
    ('Wo steht die Ladestation?', 'Wo finde ich die Ladestation?', 'Wo steht der Schrank?'),
    ('Где находится зарядная станция?', 'Где зарядная станция?', 'Где находится кухня?'),
    ('充電ステーションはどこですか', '充電ステーションはどこにありますか', '台所はどこですか'),
])
def test_paraphrases_in_other_languages_are_in_scope(
        frequency: Callable[[str], float], learned: str, asked: str, other: str) -> None:
    """With and without spaces between words."""
    scopes = scopes_with(frequency, learned, NAME)
    assert match(scopes, asked) == (True, learned)
    assert match(scopes, other)[0] is False


@pytest.mark.parametrize(('text', 'resembles'), [
    ('What is your name? And who repairs you when you are broken?', LEARNED[3]),
    ('Who repairs you when you are broken? And what is your name?', NAME),
    ('What is the password for guests, and where are the cups?', CUPS),
    ('When does the library open, and what is your name?', HOURS)])
def test_a_question_about_two_corrections_names_the_nearer_one(
        frequency: Callable[[str], float], text: str, resembles: str) -> None:
    """Of two sentences, that is the last one."""
    assert match(scopes_with(frequency, *LEARNED), text) == (True, resembles)


@pytest.mark.parametrize('text', [
    'Wash the cups.', 'Put the cups in the dishwasher.', 'Bring me the cups.',
    'I know where the cups are, thanks. Now tell me a joke.', 'I know where the cups are.',
    'Are the cups clean?', 'Where are the cups? Tell me a joke.', 'How many cups are there?',
    'Who washed the cups?', 'Open the library.', 'Is the library open?',
    'Change the password for guests.', 'Spell your name backwards.',
    'Where was Ed Brandenburg born?'])
def test_something_else_about_the_same_subject_is_out_of_scope(
        frequency: Callable[[str], float], text: str) -> None:
    """A command, a statement, another question, or a question with something else after it."""
    assert match(scopes_with(frequency, *LEARNED), text)[0] is False


@pytest.mark.parametrize('text', [
    'Where do you keep the cups?', 'Do you know where the cups are?', 'cups, where?', 'cups?',
    'Hello! Where are the cups?', 'The cups are for the guests. Where are they?',
    'I washed the plates this morning. Where are the cups?', 'Hey Ada, where are the cups?',
    'Where are the cups? Thank you.', 'Where are the cups? Please be brief.',
    'I would like to know: Where are the cups?', 'could you please tell me where the cups are'])
def test_words_around_the_question_make_no_difference(
        frequency: Callable[[str], float], text: str) -> None:
    assert match(scopes_with(frequency, *LEARNED), text) == (True, CUPS)


def test_robot_questions(frequency: Callable[[str], float]) -> None:
    """
    Of questions to a robot, paraphrases are in scope, and few other requests about the same.

    The constants were chosen on the first half of the file's questions, every other one.
    """
    rows = json.loads(ROBOT_QUESTIONS.read_text())[1::2]
    scopes = scopes_with(frequency, *(row['learned'] for row in rows))
    in_scope = {kind: [match(scopes, text)[0] for row in rows for text in row[kind]]
                for kind in ('paraphrases', 'others')}
    shares = {kind: sum(found) / len(found) for kind, found in in_scope.items()}
    assert shares['paraphrases'] >= 0.7 and shares['others'] <= 0.2, shares


def test_a_follow_up_is_in_the_scope_of_what_it_follows(
        frequency: Callable[[str], float]) -> None:
    """Alone it is not; what it resembles alone comes first."""
    scopes = scopes_with(frequency, *LEARNED)
    assert match(scopes, 'And on Sundays?')[0] is False
    assert match(scopes, 'And on Sundays?', f'{HOURS}\nAnd on Sundays?') == (True, HOURS)
    assert match(scopes, 'The cups?', f'{HOURS}\nThe cups?')[1] == CUPS


def test_a_corrected_follow_up_is_known_with_what_it_follows() -> None:
    messages = ({'role': 'user', 'content': HOURS}, {'role': 'assistant', 'content': 'At 9.'},
                {'role': 'user', 'content': 'And on Sundays?'})
    assert entry(correction('k', messages=messages)).texts == (f'{HOURS}\nAnd on Sundays?',)
    own = (*messages[:2], {'role': 'user', 'content': NAME})
    assert entry(correction('k', messages=own)).texts == (NAME,)


def test_a_question_is_in_scope_from_the_threshold_on(frequency: Callable[[str], float]) -> None:
    scopes = scopes_with(frequency, *LEARNED)
    asked = 'When did the old library open?'
    _, similarity = scopes.match('', [asked], SETTINGS)
    assert 0.0 < similarity < 1.0
    for threshold, expected in (
            (similarity - 0.01, (True, HOURS)), (similarity + 0.01, (False, ''))):
        assert match(scopes, asked, settings=AdapterSettings(
            scope_threshold=threshold)) == expected
    # The corrected question itself is in scope whatever the threshold.
    assert match(scopes, HOURS, settings=AdapterSettings(scope_threshold=1.0))[0]


def same(live: LiveVersions, text: str) -> str:
    """Return the learned correction of the same question."""
    return live.scope('').same_question(correction('newer', text))


@pytest.mark.parametrize('text', [
    'Hello! What colour is the gate?', 'Which colour does the gate have?',
    'Tell me the colour of the gate.', 'What is the colour of this gate?'])
def test_a_question_is_the_same_in_other_words(
        frequency: Callable[[str], float], text: str) -> None:
    """Its words that matter are the same."""
    gate = 'What colour is the gate?'
    assert same(scopes_with(frequency, gate, *LEARNED), text) == gate


@pytest.mark.parametrize(('learned', 'text'), [
    ('What colour is the gate?', 'What colour is the garden gate?'),
    ('What colour is the garden gate?', 'What colour is the gate?'),
    ('What colour is the gate?', 'What colour is the gate? I mean the garden gate.'),
    ('What colour is the gate?', 'Answer yes or no. What colour is the gate?'),
    ('Where are the cups?', 'Where are the red cups?'),
    ('Where was Ann born?', 'When was Ann born?'),
    ('Who are you?', 'How are you?'),
    ('Who was the mother of Ed Brandenburg?', 'Who was the father of Ed Brandenburg?'),
    ('In which city was Ed Brandenburg born?', 'In which year was Ed Brandenburg born?'),
    ('Wo sind die Tassen?', 'Wo sind die roten Tassen?'),
    ('\u8336\u676f\u5728\u54ea\u91cc\uff1f', '\u7ea2\u8336\u676f\u5728\u54ea\u91cc\uff1f'),
])
def test_a_narrower_or_another_question_is_not_the_same(
        frequency: Callable[[str], float], learned: str, text: str) -> None:
    """Its correction must not replace a right answer, however similar the words are."""
    assert same(scopes_with(frequency, learned), text) == ''


def test_follow_ups_are_the_same_after_the_same_questions_only(
        frequency: Callable[[str], float]) -> None:
    def after(first: str, name: str) -> CorrectionRecord:
        return replace(correction(name, f'{first} {name}', adapter_version=1), messages=(
            {'role': 'user', 'content': first}, {'role': 'assistant', 'content': 'At 9.'},
            {'role': 'user', 'content': 'And on Sundays?'}))

    live = LiveVersions(frequency)
    live.replace('', LiveSet(1, {1: VersionRecord('', 1, 0)}, {1: 1}), [after(HOURS, 'k')])
    assert live.scope('').same_question(after(f'Hello. {HOURS}', 'newer')) == 'k'
    assert live.scope('').same_question(after('When does the pool open?', 'newer')) == ''
    assert (same(live, HOURS), same(live, f'{HOURS} Sundays?')) == ('', 'k')


def test_the_scope_follows_learned_and_failed_records(frequency: Callable[[str], float]) -> None:
    scopes = scopes_with(frequency, NAME, CUPS)
    newer = correction('newer', NAME)
    scopes.failed(newer)        # it was to replace the first one, which was wrong, too
    assert not match(scopes, NAME)[0] and match(scopes, CUPS)[0]
    scopes.learned('', [newer])
    assert match(scopes, NAME) == (True, 'newer')
    scopes.failed(newer)        # nothing else was learned of its prompt
    assert match(scopes, NAME)[0]
    scopes.forget([correction('older', NAME), correction(CUPS, CUPS)])
    assert match(scopes, NAME)[0] and not match(scopes, CUPS)[0]
    scopes.replace('', LiveSet(), [])
    assert not match(scopes, NAME)[0]


def test_of_equal_similarity_the_newest_counts(frequency: Callable[[str], float]) -> None:
    scopes = scopes_with(frequency, NAME)
    again = correction('newest', NAME, prompt_ids=(1, 2))       # another system prompt
    scopes.learned('', [again])
    assert match(scopes, NAME) == (True, 'newest')


def test_an_index_with_changes_equals_a_new_one(frequency: Callable[[str], float]) -> None:
    draw = random.Random(1)
    words = [f'{a}{b}' for a in ('gar', 'kit', 'door', 'lam', 'rob') for b in ('den', 'chen', 's')]
    changed, kept = Scope(frequency), {}
    for number in range(60):
        record = correction(str(number), ' '.join(draw.choices(words, k=4)),
                            prompt_ids=(draw.randrange(15),))
        changed.add(entry(record))
        kept.pop(record.prompt_ids, None)
        kept[record.prompt_ids] = entry(record)
        if draw.random() < 0.2:
            gone = draw.choice(list(kept))
            changed.discard(gone)
            del kept[gone]
    fresh = Scope(frequency)
    for item in kept.values():
        fresh.add(item)
    assert list(changed) == list(kept.values())
    for item in kept.values():
        found = changed.match(item.texts[0])
        assert isinstance(found, Match) and found.similarity == pytest.approx(1.0)
        again = fresh.match(item.texts[0])
        assert again is not None and found.correction_id == again.correction_id


@pytest.mark.timeout(60)
def test_a_match_takes_no_longer_with_thousands_of_corrections(
        frequency: Callable[[str], float]) -> None:
    """Also the first one after a change, of a long question."""
    few, many = (_match_seconds(frequency, corrections) for corrections in (300, 3000))
    assert many < 3 * few


def _match_seconds(frequency: Callable[[str], float], corrections: int) -> float:
    """Return the least time of a match beside so many corrections."""
    draw = random.Random(2)
    scopes = scopes_with(frequency, *(
        f'In which year was {_name(draw)} {_name(draw)} built?' for _ in range(corrections)))
    story = 'On Monday they went to the old town and saw the library that she had told us about. '
    times = []
    for number in range(30):
        scopes.learned('', [correction(str(number), f'Where is {_name(draw)}?')])
        asked = f'{story * 50}When was {_name(draw)} opened, and in which city is it?'
        began = time.thread_time()      # other processes do not count
        scopes.match('', [asked], SETTINGS)
        times.append(time.thread_time() - began)
    return min(times)


def _name(draw: random.Random) -> str:
    return ''.join(draw.choices('abdegiklmnorstu', k=7)).capitalize()
