# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The scope of an adapter version: which questions it may answer.

A version has learned corrections. A question is in its scope if it resembles one of their
questions; every other question is answered as if nothing had been learned. The decision needs no
device: it compares words, of which rare ones count most, since they name the subject.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from math import log

import numpy as np
from numpy.typing import NDArray

from mace_ros.learning.question import questions, Sentence, sentences
from mace_ros.learning.question_words import ASKING, Kind, NOTHING
from mace_ros.store.records import CorrectionRecord

# Chosen by measurement; docs/evidence/learning.md has the figures.
# The weight of a word is this power of its information, so that a subject outweighs the words
# around it.
POWER = 1.5
# Power of the share of the query that the corrected question has: 0 would ignore it.
FOCUS = 0.35
# The same for the names of the query alone: another name is another subject. The share is at least
# the second number, since in German every noun looks like a name.
NAMES, MIN_NAMES = 0.4, 0.1
# A question that asks for something else ("When?" is not "Where?"), or a command, counts this much;
# one with "what" or "which", which may ask for the same, counts more.
OTHER, MAYBE = 0.4, 0.75
# The last sentences of a query that are read.
MAX_SENTENCES = 4
# A word that looks like a name counts this many times as much as another one.
NAME_FACTOR = 2.5
# Frequency of the words that questions are asked with.
ASKING_FREQUENCY = 0.4
# Added to the number of corrections when a word's frequency among them is computed.
PRIOR_TEXTS = 50
# Two words are forms of one if they differ in at most one letter at the end, or in up to three
# more that one of them has (with a shorter stem, in one more). They count less than equal words,
# and names still less: they often differ in their endings only.
MIN_STEM, MAX_ENDING, MAX_SUFFIX, FORM_SHARE, NAME_FORM = 4, 1, 3, 0.8, 0.5
# From the first similarity on, two questions are the same one in other words, if all words in which
# they differ are at least as frequent as the second number.
SAME_QUESTION, COMMON = 0.72, 1 / 250
# Similarities that differ by less than TIE are equal.
TIE = 1e-6


@dataclass(frozen=True)
class Match:
    """The learned correction that a question resembles most; ``similarity`` is 0 to 1."""

    correction_id: str
    similarity: float
    learned_in: int = 0


@dataclass(frozen=True)
class Entry:
    """
    A learned correction: its question as compared texts, and its scope ('' is the default).

    ``learned_in`` is the version that has learned it; 0 if the base model is right already.
    ``replaces`` is the correction of the same question in other words that is wrong now.
    """

    correction_id: str
    prompt_ids: tuple[int, ...]
    texts: tuple[str, ...]
    scope: str = ''
    learned_in: int = 0
    replaces: str = ''


def entry(record: CorrectionRecord) -> Entry:
    """Return the entry of a correction; a follow-up is indexed with the questions before it."""
    asked = questions(record.messages)
    return Entry(record.id, record.prompt_ids, tuple(asked[-1:]), record.scope,
                 record.adapter_version, record.replaces)


class Scope:
    """
    The corrections that the versions of a profile have learned, as an inverted index of words.

    A correction replaces an earlier one of the same question. With 1,000 corrections,
    :meth:`match` takes about a tenth of a millisecond.
    """

    def __init__(self, frequency: Callable[[str], float]) -> None:
        """``frequency`` returns the share of texts that have a word, above 0."""
        self._frequency = frequency
        self._entries: dict[tuple[int, ...], Entry] = {}
        self._index = _Index(frequency)

    def __len__(self) -> int:
        """Return the number of corrections."""
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        """Iterate over the corrections, the oldest first."""
        return iter(self._entries.values())

    def add(self, new: Entry) -> None:
        """Add a correction instead of those that it replaces."""
        self.discard_replaced(new)
        self._entries[new.prompt_ids] = new
        self._index.add(new)

    def discard_replaced(self, new: Entry) -> None:
        """Forget the correction of the same prompt, and that of the same question."""
        self.discard(new.prompt_ids)
        if new.replaces:
            for known in [k for k in self if k.correction_id == new.replaces]:
                self.discard(known.prompt_ids)

    def discard(self, prompt_ids: tuple[int, ...]) -> None:
        """Forget the correction of a prompt, if there is one."""
        known = self._entries.pop(prompt_ids, None)
        if known is None:
            return
        self._index.discard(known)
        if self._index.discarded > len(self._entries):
            self._index = _Index(self._frequency)
            for kept in self:
                self._index.add(kept)

    def get(self, prompt_ids: tuple[int, ...]) -> Entry | None:
        """Return the correction of a prompt."""
        return self._entries.get(prompt_ids)

    def match(self, text: str) -> Match | None:
        """Return the correction that a question resembles most; None if no word is shared."""
        return self._index.match(text)

    def same_question(self, record: CorrectionRecord) -> str:
        """
        Return the id of the correction of the same question in another prompt, '' if there is none.

        "Which colour does the gate have?" asks the same as "What colour is the gate?", but "What
        colour is the garden gate?" does not.
        """
        for text in entry(record).texts:
            found = self._index.match(text)
            if found is not None and self.is_of_same_question(text, found):
                known = self._known(found)
                if known.prompt_ids != record.prompt_ids:
                    return known.correction_id
        return ''

    def is_of_same_question(self, text: str, found: Match) -> bool:
        """Return whether a match is the correction of a text's question in these or other words."""
        return found.similarity >= SAME_QUESTION and any(
            self._asks_the_same(text, other) for other in self._known(found).texts)

    def _known(self, found: Match) -> Entry:
        return next(k for k in self if k.correction_id == found.correction_id)

    def _asks_the_same(self, text: str, other: str) -> bool:
        first, second = self._deciding(text), self._deciding(other)
        return _has(first, second) and _has(second, first)

    def _deciding(self, text: str) -> set[str]:
        """Return the words of a text that decide what is asked."""
        found = [sentence.words for sentence in sentences(text)]
        if len(found[0]) == 1:      # "Hello!" makes no difference; "Be brief." does
            found = found[1:] or found
        # With a space before it, a word is not taken for the end of a longer one.
        return {word for words in found for word in words
                if word not in ASKING and self._frequency(f' {word}') < COMMON}

    def similarities(self, records: Iterable[CorrectionRecord]) -> dict[str, float]:
        """Return how much each learned correction resembles the nearest of other corrections."""
        result: dict[str, float] = {}
        for record in records:
            for text in entry(record).texts:
                for correction_id, similarity in self._index.similarities(text):
                    result[correction_id] = max(similarity, result.get(correction_id, 0.0))
        return result


class _Index:
    """The words of texts, and for each word the texts that have it."""

    def __init__(self, frequency: Callable[[str], float]) -> None:
        self._frequency = frequency
        self._entries: list[Entry] = []         # of each text
        self._numbers: dict[str, int] = {}      # of each word
        self._sorted: list[str] = []            # the words, for common beginnings
        self._postings: list[array[int]] = []   # of each word, the texts that have it
        self._counts = array('d')               # of each word, how many these are
        self._factors: list[array[float]] = []  # how much more the word counts in each of them
        self._kinds = array('q')                # what each text asks for
        self._background = array('d')           # frequency of each word in general
        # Each word of each text: number, text and factor.
        self._words, self._texts, self._flat_factors = array('q'), array('q'), array('d')
        self._weights: NDArray[np.float64] | None = None     # of each word; None: to be computed
        self._totals: NDArray[np.float64] = np.zeros(0)      # weight of each text's words
        self._discarded: set[int] = set()       # texts

    def add(self, new: Entry) -> None:
        """Add the texts of a correction."""
        for text in new.texts:
            number = len(self._entries)
            self._entries.append(new)
            found_sentences = sentences(text)
            self._kinds.append(_kind(found_sentences))
            for word, named in _merged(found_sentences).items():
                found, factor = self._number(word), NAME_FACTOR if named else 1.0
                self._postings[found].append(number)
                self._counts[found] += 1
                self._factors[found].append(factor)
                self._words.append(found)
                self._texts.append(number)
                self._flat_factors.append(factor)
        self._weights = None

    def discard(self, known: Entry) -> None:
        """Exclude the texts of a correction from matches; they stay in the index."""
        self._discarded.update(n for n, each in enumerate(self._entries) if each is known)
        self._weights = None

    @property
    def discarded(self) -> int:
        """Number of texts that are excluded from matches."""
        return len(self._discarded)

    def _number(self, word: str) -> int:
        number = self._numbers.get(word)
        if number is None:
            number = self._numbers[word] = len(self._numbers)
            self._sorted.insert(bisect_left(self._sorted, word), word)
            self._postings.append(array('q'))
            self._factors.append(array('d'))
            self._counts.append(0)
            self._background.append(self._general(word))
        return number

    def match(self, text: str) -> Match | None:
        """See :meth:`Scope.match`."""
        if not self._entries:
            return None
        similarity = self._compare(text)
        best = float(similarity.max())
        if best <= 0.0:
            return None
        newest = int(np.flatnonzero(similarity >= best - TIE)[-1])
        found = self._entries[newest]
        return Match(found.correction_id, best, found.learned_in)

    def similarities(self, text: str) -> Iterator[tuple[str, float]]:
        """Yield the correction of each text that has a common word, and their similarity."""
        if self._entries:
            similarity = self._compare(text)
            for number in np.flatnonzero(similarity):
                yield self._entries[number].correction_id, float(similarity[number])

    def _compare(self, text: str) -> NDArray[np.float64]:
        """
        Return the similarity to each text: that of the query's sentence that fits it best.

        The sentences are read from the last to the first. Words of later sentences that a text
        lacks count against an earlier sentence. A sentence with a pronoun may take the words that a
        text needs from the sentence before it. A follow-up is not compared by itself.
        """
        weights, texts = self._current_weights(), len(self._entries)
        best, covered, after = np.zeros(texts), np.zeros(texts), np.zeros(texts)
        seen: set[str] = set()
        later: NDArray[np.float64] | None = None
        read = sentences(text)[-MAX_SENTENCES:]
        for place in reversed(range(len(read))):
            sentence = read[place]
            own = self._common(sentence, weights, covered, seen)
            if sentence.follows and place:
                continue
            part = np.minimum(covered / self._totals, 1.0)
            asked = own.focus() * self._agreement(sentence.kind)
            np.maximum(best, part * asked * (own.total / (own.total + after)), out=best)
            if later is not None:
                np.maximum(best, part * later, out=best)
            later = asked * (own.total / (own.total + after)) if sentence.refers_back else None
            after += np.maximum(own.total - own.weight, 0.0)
        return best

    def _common(self, sentence: Sentence, weights: NDArray[np.float64],
                covered: NDArray[np.float64], seen: set[str]) -> _Common:
        """
        Return what a sentence has in common with each text.

        Adds the weight of each text's words that it has to ``covered``, but for those ``seen``.
        """
        own = _Common(np.zeros(len(covered)), np.zeros(len(covered)))
        for word, named in sentence.words.items():
            weight = self._weight(word, weights) * (NAME_FACTOR if named else 1.0)
            own.total += weight
            own.all_names += weight * named
            for number, share in self._forms(word, named):
                having = np.frombuffer(self._postings[number], dtype=np.int64)
                own.weight[having] += share * weight
                if named:
                    own.names[having] += share * weight
                if word not in seen:
                    covered[having] += (share * weights[number]
                                        * np.frombuffer(self._factors[number]))
        seen.update(sentence.words)
        return own

    def _agreement(self, kind: Kind) -> NDArray[np.float64]:
        """Return how well each text asks for the same as a sentence of a kind."""
        return _agreement(kind)[np.frombuffer(self._kinds, dtype=np.int64)]

    def _current_weights(self) -> NDArray[np.float64]:
        if self._weights is None:
            others = (np.frombuffer(self._counts) - 1.0) / (len(self._entries) + PRIOR_TEXTS)
            frequency = np.frombuffer(self._background) + others
            self._weights = -np.log(np.minimum(frequency, 0.9))
            self._weights **= POWER
            self._totals = np.bincount(
                np.frombuffer(self._texts, dtype=np.int64),
                weights=(self._weights[np.frombuffer(self._words, dtype=np.int64)]
                         * np.frombuffer(self._flat_factors)),
                minlength=len(self._entries)).astype(np.float64)
            self._totals[list(self._discarded)] = np.inf
        return self._weights

    def _weight(self, word: str, weights: NDArray[np.float64]) -> float:
        number = self._numbers.get(word)
        if number is not None:
            return float(weights[number])
        return float(-log(min(self._general(word), 0.9))) ** POWER

    def _general(self, word: str) -> float:
        return ASKING_FREQUENCY if word in ASKING else self._frequency(word)

    def _forms(self, word: str, named: bool) -> list[tuple[int, float]]:
        """Return the known word, or those with the same stem, each with its share in common."""
        number = self._numbers.get(word)
        if number is not None:
            return [(number, 1.0)]
        if any(map(str.isdigit, word)):
            return []
        place, forms = bisect_left(self._sorted, word), []
        for other in self._sorted[max(place - 1, 0):place + 1]:     # its neighbours
            if other[:MIN_STEM - 1] == word[:MIN_STEM - 1] and _are_forms(word, other):
                forms.append((self._numbers[other], NAME_FORM if named else FORM_SHARE))
        return forms[:1]


@dataclass
class _Common:
    """Weight of the words that a sentence and each text have in common; of the names among them."""

    weight: NDArray[np.float64]
    names: NDArray[np.float64]
    total: float = 0.0          # of all words of the sentence
    all_names: float = 0.0

    def focus(self) -> NDArray[np.float64]:
        """Return how much of the sentence each text has."""
        share: NDArray[np.float64] = np.minimum(self.weight / self.total, 1.0) ** FOCUS
        if self.all_names:
            share *= np.clip(self.names / self.all_names, MIN_NAMES, 1.0) ** NAMES
        return share


def _kind(read: Sequence[Sentence]) -> Kind:
    """Return what a learned question asks for."""
    return next((s.kind for s in reversed(read) if s.kind and not s.follows), read[-1].kind)


@lru_cache(maxsize=len(Kind) ** 2)
def _agreement(asked: Kind) -> NDArray[np.float64]:
    """Return how well a kind of question agrees with each kind of learned ones."""
    return np.array([_agree(asked, Kind(learned)) for learned in range(int(~NOTHING) + 1)])


def _agree(asked: Kind, learned: Kind) -> float:
    if asked == learned or asked & learned or Kind.ANY in (asked, learned):
        return 1.0
    if asked and not Kind.WHETHER & (asked | learned) and (
            not learned or Kind.WHAT in asked | learned):
        return MAYBE
    return OTHER


def _are_forms(word: str, other: str) -> bool:
    """Return whether two words are forms of one: "cup" and "cups"."""
    stem = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1],
                                    zip(word, other, strict=False)))
    rests = len(word) - stem, len(other) - stem
    suffix = MAX_SUFFIX if stem >= MIN_STEM else 1
    return stem >= MIN_STEM - 1 and max(rests) <= (MAX_ENDING if min(rests) else suffix)


def _has(known: set[str], asked: set[str]) -> bool:
    """Return whether one set of words has all of the other, or forms of them."""
    return all(word in known or any(_are_forms(word, other) for other in known)
               for word in asked)


def _merged(parts: Sequence[Sentence]) -> dict[str, bool]:
    words: dict[str, bool] = {}
    for sentence in parts:
        for word, named in sentence.words.items():
            words[word] = words.get(word, False) or named
    return words
