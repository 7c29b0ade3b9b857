# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001 (characters of several scripts look alike)
"""The words of a question in many languages, and the question that a conversation ends with."""

from __future__ import annotations

import pytest

from mace_ros.learning.question import is_follow_up, MAX_CHARACTERS, questions, sentences
from mace_ros.learning.question_words import Kind, NOTHING


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
    assert [list(sentence.words) for sentence in sentences(text)] == words


def test_of_a_long_text_the_end_is_read() -> None:
    """A question that comes long before the end is not what the text asks for."""
    filler = 'filler ' * MAX_CHARACTERS
    found = sentences(f'First question? {filler}. Last question?')
    assert list(found[-1].words) == ['last', 'question']
    assert not any('first' in sentence.words for sentence in found)


@pytest.mark.parametrize('text', [
    'Ada, where are the cups?', 'Hey Ada, where are the cups?', 'Hallo Ada, wo sind die Tassen?'])
def test_an_address_is_a_sentence_of_its_own(text: str) -> None:
    """The name of the robot is not what the question is about."""
    address, question = sentences(text)
    assert 'ada' in address.words and 'ada' not in question.words
    assert question.kind is Kind.WHERE


@pytest.mark.parametrize(('text', 'kind'), [
    ('Where are the cups?', Kind.WHERE), ('cups, where', Kind.WHERE),
    ('Do you know where the cups are?', Kind.WHERE), ('Wo sind die Tassen?', Kind.WHERE),
    ('Où sont les tasses ?', Kind.WHERE), ('杯子在哪里？', Kind.WHERE),
    ('コップはどこですか', Kind.WHERE), ('Где чашки?', Kind.WHERE),
    ('In which room are the cups?', Kind.WHERE),
    ('At what time do you open?', Kind.WHEN), ('Why?', Kind.WHY),
    ('By whom was it built', Kind.WHO), ('What is your name?', Kind.WHAT),
    ('Please tell me your name.', Kind.WHAT), ('Could you tell me your name?', Kind.WHAT),
    ('Are the cups clean?', Kind.WHETHER), ('The cups?', Kind.ANY), ('Wash the cups.', NOTHING),
    ('Anna, who works in', NOTHING), ('I know where the cups are.', NOTHING),
    ('Lave les tasses.', NOTHING)])
def test_what_a_sentence_asks_for(text: str, kind: Kind) -> None:
    [sentence] = sentences(text)
    assert sentence.kind == kind


def test_names_are_recognised_by_capitals_and_digits() -> None:
    """The first word of a sentence has a capital letter anyway."""
    [sentence] = sentences('May I ask where Reedy Glacier in room 3B of the École is?')
    names = [word for word, named in sentence.words.items() if named]
    assert names == ['reedy', 'glacier', '3b', 'ecole']


@pytest.mark.parametrize(('text', 'named'), [
    ('Ada Lovelace was born in', True), ('Battle of Hastings was fought in', True),
    ('Battle is the name of', False), ('Does Ann work here?', False), ('Paris', False)])
def test_a_first_word_is_a_name_if_a_name_follows(text: str, named: bool) -> None:
    [sentence] = sentences(text)
    assert next(iter(sentence.words.values())) is named


@pytest.mark.parametrize('text', [
    'And on Sundays?', 'Why?', 'What about Sundays?', 'Und am Sonntag?', 'Et le dimanche ?',
    '那星期天呢？', 'А в воскресенье?', 'On Sundays?', 'why', 'and Tom?', 'But where is it?',
    'and on Sundays?', 'Ready?'])
def test_short_continuations_and_bare_question_words_are_follow_ups(text: str) -> None:
    assert is_follow_up(text)


@pytest.mark.parametrize('text', [
    'What is your name?', 'Who are you?', 'Where are the cups?', 'Wie heißt du?', '你叫什么名字？',
    'And what is the name of the person who built the charging station?', 'Thank you.', 'Danke!',
    '谢谢', 'Follow me.', 'Please stop.', 'Then go to the kitchen.', 'And now come here.',
    'Tell me.', 'Do it.', 'Komm mit.', 'And where is the kitchen?'])
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
