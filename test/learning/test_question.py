# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001 (characters of several scripts look alike)
"""The words of a question in many languages, and the question that a conversation ends with."""

from __future__ import annotations

import pytest

from mace_ros.learning.question import is_follow_up, MAX_CHARACTERS, questions, sentences


@pytest.mark.parametrize(('text', 'words'), [
    ("What's your name?", [['what', 's', 'your', 'name']]),
    ('Wait. Who are you?', [['wait'], ['who', 'are', 'you']]),
    ('Où est le café ?', [['ou', 'est', 'le', 'cafe']]),
    ('WO IST DIE STRASSE', [['wo', 'ist', 'die', 'strasse']]),
    ('Wo ist die Straße', [['wo', 'ist', 'die', 'strasse']]),
    ('你叫什么', [['你', '叫', '什', '么', '你叫', '叫什', '什么']]),
    ('Ｗｈｏ？', [['who']]),
    ('हिन्दी क्या है।', [['हिन्दी', 'क्या', 'है']]),
    ('3号室 is locked', [['3', '号', '室', '号室', 'is', 'locked']]),
    ('한국어 질문', [['한국어', '질문']]),
    ('???', [['???']]),
])
def test_a_text_is_cut_into_sentences_and_words(text: str, words: list[list[str]]) -> None:
    """Case, accents, width and punctuation make no difference; marks of other scripts do."""
    assert [list(sentence) for sentence in sentences(text)] == words


def test_of_a_long_text_the_beginning_and_the_end_are_looked_at() -> None:
    """A question may come before or after what it is about."""
    filler = 'filler ' * MAX_CHARACTERS
    found = sentences(f'First question? {filler} middle {filler}. Last question?')
    assert [list(found[i]) for i in (0, -1)] == [['first', 'question'], ['last', 'question']]
    assert not any('middle' in sentence for sentence in found)


def test_names_are_recognised_by_capitals_and_digits() -> None:
    """The first word of a sentence has a capital letter anyway."""
    [words] = sentences('Where is Reedy Glacier in room 3B of the École?')
    assert [word for word, named in words.items() if named] == ['reedy', 'glacier', '3b', 'ecole']


@pytest.mark.parametrize(('text', 'named'), [
    ('Ada Lovelace was born in', True), ('Battle of Hastings was fought in', True),
    ('Battle is the name of', False), ('Does Ann work here?', False), ('Paris', False)])
def test_a_first_word_is_a_name_if_a_name_follows(text: str, named: bool) -> None:
    [words] = sentences(text)
    assert next(iter(words.values())) is named


@pytest.mark.parametrize('text', [
    'And on Sundays?', 'Why?', 'What about Sundays?', 'Und am Sonntag?', 'Et le dimanche ?',
    '那星期天呢？', 'А в воскресенье?', 'On Sundays?', 'why', 'and Tom'])
def test_short_continuations_and_bare_question_words_are_follow_ups(text: str) -> None:
    assert is_follow_up(text)


@pytest.mark.parametrize('text', [
    'What is your name?', 'Who are you?', 'Where are the cups?', 'Wie heißt du?', '你叫什么名字？',
    'And what is the name of the person who built the charging station?', 'Thank you.', 'Danke!',
    '谢谢'])
def test_questions_that_speak_for_themselves(text: str) -> None:
    assert not is_follow_up(text)


def conversation(*turns: str) -> tuple[dict[str, str], ...]:
    """Return the messages of a conversation whose last turn is the user's."""
    messages = [{'role': 'system', 'content': 'Be brief.'}]
    for turn in turns:
        messages += [{'role': 'user', 'content': turn}, {'role': 'assistant', 'content': 'Yes.'}]
    return tuple(messages[:-1])


def test_a_follow_up_is_read_alone_and_with_what_it_follows() -> None:
    """Neither the answers in between nor the system prompt belong to it."""
    hours, sundays, lunch = 'When do you open?', 'And on Sundays?', 'And at noon?'
    assert questions(conversation(hours)) == [hours]
    assert questions(conversation('Hello there, you!', hours)) == [hours]
    assert questions(conversation(hours, sundays)) == [sundays, f'{hours}\n{sundays}']
    assert questions(conversation(hours, sundays, lunch)) == [
        lunch, f'{hours}\n{sundays}\n{lunch}']
    assert questions(conversation(sundays)) == [sundays]
    assert questions(()) == []
