# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The words of a question, in any language, and which question a conversation ends with.

Scripts without spaces between words (Chinese, Japanese, Thai and others) are cut into characters
and pairs of them. Case, accents and punctuation make no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import re
import unicodedata

from mace_ros.learning.question_words import (
    ASKING,
    AUXILIARIES,
    Kind,
    kind_of,
    NOTHING,
    PRONOUNS,
    QUESTION_WORDS,
)
from mace_ros.store.records import MAX_TURNS, Messages

# Of a longer text, the end of this many characters is read.
MAX_CHARACTERS = 400
# A question of more words needs no context; nor does one of more than two that begins otherwise.
FOLLOW_UP_WORDS = 6
QUESTION_MARKS = ('?', '\uff1f', '\u061f')
# Words that a question begins with if it carries on from the one before it: "and on Sundays?".
FOLLOW_UP_BEGINNINGS = frozenset({
    'and', 'but', 'or', 'also', 'then',                     # English
    'und', 'aber', 'oder', 'auch', 'maar', 'ook',           # German, Dutch
    'et', 'mais', 'ou', 'aussi', 'y', 'pero', 'tambien',    # French, Spanish
    'anche', 'poi', 'mas', 'tambem', 'och', 'og',           # Italian, Portuguese, Nordic
    'ale', '\u0430', '\u0438', '\u043d\u043e',               # Polish, Russian
    've', 'ama', '\u0648', '\u0914\u0930'})                 # Turkish, Arabic, Hindi
_ABOUT = ('what about', 'how about', 'was ist mit', 'et pour', 'que tal', 'e per')

# A full stop within a number or a name ends no sentence.
_SENTENCE_ENDS = re.compile(r'((?:[!?;\n\u0964\u061f\u06d4\u3002]|\.(?=\s|$))+)')
# "Hey Ada, where are the cups?"
_ADDRESS = re.compile(r'^\s*((?:\w+\s+)?[^\W\d_]\w*\s*,)((?:\s+\w+){3}.*)', re.DOTALL)
# Thai, Lao, Burmese, Khmer, kana and Han; in any plane.
_UNSPACED = re.compile(
    '[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff'
    '\U00020000-\U0003ffff]+')


class _Characters(dict[int, int | str | None]):
    """A translation table: letters, digits and their marks stay, all others separate words."""

    def __missing__(self, code: int) -> int | str | None:
        kept = unicodedata.category(chr(code))[0] in 'LNM'
        # The accents of Latin, Greek and Cyrillic letters; the marks of other scripts are letters.
        value: int | str | None = None if 0x300 <= code < 0x370 else code if kept else ' '
        self[code] = value
        return value


_CHARACTERS = _Characters()


@dataclass(frozen=True)
class Sentence:
    """
    The words of a sentence in their order, and what it asks for.

    Of each word, ``words`` tells whether it looks like a name: it has a digit or a capital letter,
    but not only because it is the first one. ``follows`` tells that it needs what comes before.
    """

    words: dict[str, bool]
    kind: Kind = NOTHING
    follows: bool = False

    @property
    def refers_back(self) -> bool:
        """Whether a word stands for something named before."""
        return not PRONOUNS.isdisjoint(self.words)


def sentences(text: str) -> list[Sentence]:
    """Return the sentences of a text; there is at least one, with at least one word."""
    text = text[-MAX_CHARACTERS:]
    if not text.isascii():
        text = unicodedata.normalize('NFKD', text)
    parts, found = [*_SENTENCE_ENDS.split(text), ''], []
    for part, end in zip(parts[::2], parts[1::2], strict=True):
        address = _ADDRESS.match(part) if end and end[0] in QUESTION_MARKS else None
        if address and address[1].split()[-1][0].isupper():
            found.append(Sentence(_words(address[1])))
            part = address[2]
        if words := _words(part):
            marked = not set(QUESTION_MARKS).isdisjoint(end)
            found.append(Sentence(
                words, kind_of(words, marked=marked), _continues(list(words), marked=marked)))
    return found or [Sentence({text.strip(): False})]


def words(text: str) -> set[str]:
    """Return the words of all sentences of a text; none if it is empty."""
    return {word for sentence in sentences(text) for word in sentence.words if word}


def _words(text: str) -> dict[str, bool]:
    words = text.translate(_CHARACTERS).split()
    found: dict[str, bool] = {}
    for place, word in enumerate(words):
        capital = word[0].isupper() and word != 'I' and (place > 0 or _begins_with_name(words))
        named = capital or any(map(str.isdigit, word))
        for part in (word.lower(),) if word.isascii() else _parts(
                unicodedata.normalize('NFC', word.casefold())):
            found[part] = found.get(part, False) or named
    return found


def _begins_with_name(words: Sequence[str]) -> bool:
    """Return whether the first word begins a longer name: "Ada Lovelace", "Battle of Hastings"."""
    rest = words[2:] if words[1:2] == ['of'] else words[1:]
    return bool(rest) and rest[0][0].isupper() and words[0].lower() not in ASKING


def _parts(word: str) -> list[str]:
    """Return a word as it is, and text without spaces as characters and pairs of them."""
    parts, end = [], 0
    for run in _UNSPACED.finditer(word):
        if run.start() > end:
            parts.append(word[end:run.start()])
        characters, end = run[0], run.end()
        parts += [*characters, *(characters[i:i + 2] for i in range(len(characters) - 1))]
    return [*parts, word[end:]] if end < len(word) else parts


def is_follow_up(text: str) -> bool:
    """
    Return whether a question needs the one before it: "and on Sundays?", "Why?".

    It is a question of up to two words, or one of up to six that begins like a continuation and
    is not complete, as "And where is the kitchen?" is. Commands and statements are no follow-ups.
    """
    return _continues([word for sentence in sentences(text) for word in sentence.words],
                      marked=text.rstrip().endswith(QUESTION_MARKS))


def _continues(words: Sequence[str], *, marked: bool) -> bool:
    asking = not QUESTION_WORDS.isdisjoint(words)
    if not asking and not marked:
        return False
    unspaced = [word for word in words if _UNSPACED.match(word)]
    characters = sum(len(word) == 1 for word in unspaced)
    count = len(words) - len(unspaced) + characters // 2    # a word has about two of them
    if count <= 2:
        return True
    about = ' '.join(words).startswith(_ABOUT)
    complete = asking and not AUXILIARIES.isdisjoint(words) and PRONOUNS.isdisjoint(words)
    return count <= FOLLOW_UP_WORDS and (
        about or (words[0] in FOLLOW_UP_BEGINNINGS and not complete))


def questions(messages: Messages) -> list[str]:
    """
    Return the texts by which a conversation's last question is compared, the shortest first.

    The first is the last user turn alone. If that follows up an earlier one, the second is both
    together, with all the turns between them.
    """
    asked = [message['content'] for message in messages if message['role'] == 'user']
    if not asked:
        return []
    first = len(asked) - 1
    while first and len(asked) - first < MAX_TURNS and is_follow_up(asked[first]):
        first -= 1
    alone = asked[-1]
    return [alone] if first == len(asked) - 1 else [alone, '\n'.join(asked[first:])]
