# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001 (characters of several scripts look alike)
"""
Words that questions are asked with, and what they ask for.

Latin, Greek and Cyrillic letters have no accents here. Of other languages, nothing is known: then
only the words that two questions have in common count.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import IntFlag


class Kind(IntFlag):
    """What a sentence asks for. ``ANY`` is a question whose kind is not known: "The cups?"."""

    ANY = 1
    WHAT = 2        # or which; also a request to tell something
    WHERE = 4
    WHEN = 8
    WHO = 16
    WHY = 32
    HOW = 64        # also how many, how long
    WHETHER = 128   # yes or no


UNSPACED = '\u3040'      # from here on, scripts have no spaces, and question words any place
NOTHING = Kind(0)   # a statement or a command
SPECIFIC = Kind.WHERE | Kind.WHEN | Kind.WHO | Kind.WHY | Kind.HOW


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# English, German, Dutch, French, Spanish, Portuguese, Italian, Polish, Russian, Chinese, Japanese.
_QUESTION_WORDS = {
    Kind.WHAT: (
        'what which welche welcher welches welchem welchen wat welk que quoi quel quelle quels '
        'quelles cual cuales qual quais che cosa quale quali co ktory ktora что какои какая какое '
        'какие 什么 何'),
    Kind.WHERE: (
        'where wo wohin woher waar ou donde adonde onde dove gdzie где куда откуда 哪里 哪儿 どこ'),
    Kind.WHEN: 'when wann wanneer quand cuando quando kiedy когда いつ',
    Kind.WHO: (
        'who whom whose wer wen wem wessen wie qui quien quienes quem chi kto кто кому чеи 谁 誰'),
    Kind.WHY: 'why warum weshalb waarom pourquoi perche dlaczego почему 为什么 なぜ',
    Kind.HOW: (
        'how wie hoe comment combien como cuanto cuantos cuanta cuantas quanto quanti quante jak '
        'ile как сколько 怎么 多少 几'),
}
# A question word may be the second word after one of these: "In which year".
_BEFORE = _words(
    'in on at by from to for of with since until under about and but so or then und oder aber '
    'auf an aus bei fur mit nach seit um von zu a de en dans par pour avec et con por y di da '
    'в с на к и а')
# Nouns up to two words after "what" or "which" that ask for a place or a time.
_NOUNS = {
    Kind.WHERE: 'place location city town country room street building floor area region address',
    Kind.WHEN: 'time day date year month hour century',
}
# "Tell me": a sentence that begins with both words, "please" apart, asks for something.
_TELL = _words('tell give say show name sag nenne gib zeg dis donne dime di dimmi diga')
_ME = _words('me us mir uns mij moi nous')
# A sentence that begins so asks for yes or no if it has no question word.
AUXILIARIES = _words(
    'is are were am do does did has have had can could will would shall should may might must '
    'ist sind war hat haben kann est sont es esta son estan hay sono ha puoi czy')
# Words that stand for something named before: a sentence with one is read with the one before it.
PRONOUNS = _words(
    'it its they them their he him his she her hers this that these those there '
    'er sie es ihn ihm ihr ihnen dort il elle ils elles lui leur esto eso')
# Words that are more frequent in what is said to a robot than in the training text of a
# tokenizer: they tell nothing about the subject.
_FRAME = _words(
    'whos was an a the of to in for on at please know say i you we can could would will should '
    'do does did be is are was were am has have had hi hello hey thanks thank tell me give '
    'answer brief briefly now '
    'ist sind kannst bitte danke hallo der die das dem den weisst du ich dir mir sag '
    'est sont ce dis moi merci bonjour tu je les la le es son por dime esta gracias hola sono '
    'dimmi diga これ です すか は に で す か 么 哪 什 在 的 吗')
_BY_WORD: dict[str, Kind] = {}
for _kind, _text in _QUESTION_WORDS.items():
    for _word in _words(_text):
        _BY_WORD[_word] = _BY_WORD.get(_word, NOTHING) | _kind
_BY_NOUN = {noun: kind for kind, nouns in _NOUNS.items() for noun in nouns.split()}
QUESTION_WORDS = frozenset(_BY_WORD)
ASKING = QUESTION_WORDS | AUXILIARIES | _FRAME


def kind_of(words: Collection[str], *, marked: bool) -> Kind:
    """
    Return what a sentence with these words asks for; ``marked`` tells of a question mark.

    Without one, a question word within the sentence belongs to a statement: "Anna, who works in".
    """
    place = list(words)
    first = [word for word in place[:3] if word != 'please'][:2]
    requests = first[:1] == ['dime'] or (
        len(first) == 2 and first[0] in _TELL and first[1] in _ME)
    auxiliary = bool(first) and first[0] in AUXILIARIES
    kind = NOTHING
    for number, word in enumerate(place):
        found = _BY_WORD.get(word, NOTHING)
        if found and (marked or requests or auxiliary or _may_ask(place, number)):
            kind |= found
            for noun in place[number + 1:number + 3] if found is Kind.WHAT else ():
                kind |= _BY_NOUN.get(noun, NOTHING)
    if kind:
        return kind & SPECIFIC or kind
    if requests or (auxiliary and _TELL.intersection(words) and _ME.intersection(words)):
        return Kind.WHAT
    if auxiliary:
        return Kind.WHETHER
    return Kind.ANY if marked else NOTHING


def _may_ask(words: Sequence[str], number: int) -> bool:
    """Return whether a question word asks something where it stands, without a question mark."""
    return (number in (0, len(words) - 1) or words[number] >= UNSPACED
            or (number == 1 and words[0] in _BEFORE))
