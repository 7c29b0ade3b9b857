# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The words of a question, in any language, and which question a conversation ends with.

Scripts without spaces between words (Chinese, Japanese, Thai and others) are cut into characters
and pairs of them. Case, accents and punctuation make no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
import re
from typing import TypeAlias
import unicodedata

from mace_ros.store.records import Messages

# A longer text is read as its first and its last half of this many characters.
MAX_CHARACTERS = 4000
# Maximum number of questions of a conversation that are read together.
MAX_TURNS = 4
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
# Question words. They are more frequent in questions than in the training text of a tokenizer.
_ASKING = (
    'what who whos whom whose which where when why how is are was were be do does did can could',
    'would will should tell me please know say give the a an of to in for',             # English
    'was wer wen wem wo wann warum welche welcher welches welchem wie ist sind kannst bitte sag',
    'mir der die das dem den wat waar wanneer waarom welke hoe zeg mij',        # German, Dutch
    'que qu quoi qui ou quand pourquoi quel quelle quels quelles comment combien est sont dis moi',
    'quien donde cuando cual cuales como cuanto por es son dime',               # French, Spanish
    'che cosa chi dove quando perche quale come quanto sono dimmi quem onde qual diga',
    '\u0447\u0442\u043e \u043a\u0442\u043e \u0433\u0434\u0435 \u043a\u043e\u0433\u0434\u0430',
    '\u043f\u043e\u0447\u0435\u043c\u0443 \u043a\u0430\u043a',                     # Russian
    '\u4ec0\u4e48 \u4ec0 \u4e48 \u54ea\u91cc \u54ea \u600e\u4e48 \u591a\u5c11',
    '\u3069\u3053 \u3067\u3059 \u3059\u304b \u306f \u306b \u3067 \u3059 \u304b')   # Japanese
ASKING = frozenset(word for line in _ASKING for word in line.split())
# Those that say what is asked for: "Where was Ann born?" is not "When was Ann born?".
_DECIDING = (
    'who whom whose where when why how wer wen wem wo wann warum wie wie waar wanneer waarom hoe',
    'qui ou quand pourquoi comment combien quien donde cuando como cuanto por',
    'chi dove quando perche come quanto quem onde',
    '\u043a\u0442\u043e \u0433\u0434\u0435 \u043a\u043e\u0433\u0434\u0430',
    '\u043f\u043e\u0447\u0435\u043c\u0443 \u043a\u0430\u043a',
    '\u54ea\u91cc \u54ea \u600e\u4e48 \u591a\u5c11 \u3069\u3053')
DECIDING = frozenset(word for line in _DECIDING for word in line.split())
_ABOUT = ('what about', 'how about', 'was ist mit', 'et pour', 'que tal', 'e per')

# The words of a sentence in their order, and whether each looks like a name: it has a capital
# letter, but not only because it is the first one, or a digit.
Sentence: TypeAlias = dict[str, bool]

_SENTENCE_ENDS = re.compile(r'[.!?;\n\u0964\u061f\u06d4\u3002]+')
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


def sentences(text: str) -> list[Sentence]:
    """Return the sentences of a text; there is at least one, with at least one word."""
    if len(text) > MAX_CHARACTERS:
        text = f'{text[:MAX_CHARACTERS // 2]} {text[-MAX_CHARACTERS // 2:]}'
    if not text.isascii():
        text = unicodedata.normalize('NFKD', text)
    split = [_words(part) for part in _SENTENCE_ENDS.split(text)]
    return [words for words in split if words] or [{text.strip(): False}]


def words(text: str) -> set[str]:
    """Return the words of all sentences of a text; none if it is empty."""
    return {word for sentence in sentences(text) for word in sentence if word}


def _words(text: str) -> Sentence:
    words = text.translate(_CHARACTERS).split()
    found: Sentence = {}
    for place, word in enumerate(words):
        capital = word[0].isupper() and (place > 0 or _begins_with_name(words))
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

    It is one of up to two words, or one of up to six that begins like a continuation. Two words
    that ask nothing are no follow-up: "Thank you."
    """
    words = [word for sentence in sentences(text) for word in sentence]
    unspaced = [word for word in words if _UNSPACED.match(word)]
    characters = sum(len(word) == 1 for word in unspaced)
    count = len(words) - len(unspaced) + characters // 2    # a word has about two of them
    asks = text.rstrip().endswith(QUESTION_MARKS) or not ASKING.isdisjoint(words)
    return (count <= 2 and asks) or (count <= FOLLOW_UP_WORDS and (
        words[0] in FOLLOW_UP_BEGINNINGS or ' '.join(words).startswith(_ABOUT)))


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
