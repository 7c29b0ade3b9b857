# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Constrained decoding: answers that are JSON of a schema, or match an expression or a grammar.

llguidance compiles a format, and computes the tokens that may come next as a bit mask.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
import threading
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits

from mace_ros.api.events import ResponseFormat
from mace_ros.model.vocabulary import UnreadableVocabulary, Vocabulary

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# At most one space where JSON allows white space, since a model may never stop writing it.
JSON_OPTIONS: JsonCompileOptions = {'whitespace_pattern': ' ?'}
# Limits of what a format costs: the lexer and the first mask in the thread that receives queries,
# and then a mask in each pass, for which the other requests wait. The worst case, a format that
# allows only one text of many thousand characters, takes some 50 ms and some 20 ms. Most masks
# take less than 0.1 ms; those of usual formats need less than a tenth of these limits.
LIMITS = LLParserLimits(
    max_grammar_size=100_000, initial_lexer_fuel=100_000, step_lexer_fuel=20_000,
    step_max_items=50_000, verbose_errors=False)
MAX_REASON = 500    # characters
KEPT = 32       # compiled formats, the latest ones; the next mask of one is found faster


class InvalidFormat(ValueError):
    """A schema, expression or grammar that can't be compiled; the message is the library's."""


class ConstraintBroken(RuntimeError):
    """A constraint cannot continue, for example because it has become too complex."""


class Constraint:
    """The tokens that may come next in one answer."""

    def __init__(self, matcher: LLMatcher, broken: Callable[[], object]) -> None:
        """``broken`` is called before :class:`ConstraintBroken` is raised."""
        self._matcher, self._broken = matcher, broken

    def copy(self) -> Constraint:
        """Return a constraint of another answer, in the same state."""
        return Constraint(self._matcher.deep_copy(), self._broken)

    def mask(self) -> bytes:
        """
        Return a bit for each token of the vocabulary, the lowest first: 1 if it may be next.

        Once the answer is complete, only the tokens that end an answer may be next.
        """
        mask: bytes = self._matcher.compute_bitmask()
        return mask

    def advance(self, token: int) -> None:
        """Append a token to the answer; raises :class:`ConstraintBroken`."""
        if not self._matcher.consume_token(token):
            self._broken()
            raise ConstraintBroken(_reason(self._matcher.get_error()))


class ConstraintCompiler:
    """Compiles formats for one vocabulary; from any thread."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._lock = threading.Lock()
        self._compiled: OrderedDict[tuple[int, str], LLMatcher] = OrderedDict()

    def prepare(self) -> None:
        """Index the vocabulary now, so that no query has to wait for it."""
        with suppress(UnreadableVocabulary):      # reported to the first query that needs it
            self.vocabulary.index()

    def compile(self, kind: int, schema: str) -> Constraint:
        """
        Return the constraint of a :class:`ResponseFormat` other than FREE.

        Raises :class:`InvalidFormat`.
        """
        with self._lock:
            matcher = self._compiled.get((kind, schema))
        if matcher is None:
            matcher = self._matcher(kind, schema)
        with self._lock:
            self._compiled[kind, schema] = matcher
            self._compiled.move_to_end((kind, schema))
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        # Copies share the library's state of the format, and so also its limits: after one breaks,
        # the format is compiled again.
        return Constraint(
            matcher.deep_copy(), broken=partial(self._forget, (kind, schema)))

    def _forget(self, compiled: tuple[int, str]) -> None:
        with self._lock:
            self._compiled.pop(compiled, None)

    def _matcher(self, kind: int, schema: str) -> LLMatcher:
        try:
            matcher = LLMatcher(self.vocabulary.index(), _grammar(kind, schema),
                                limits=LIMITS, log_level=0)
        except (ValueError, UnreadableVocabulary) as error:
            raise InvalidFormat(_reason(str(error))) from error
        trial = matcher
        if not matcher.is_error():
            # Compute the text that every answer begins with, of any length, which the first mask
            # would do otherwise. Whether it has reached a limit shows with the next token.
            certain = matcher.compute_ff_tokens()
            trial = matcher.deep_copy()
            trial.try_consume_tokens(certain[:1])
        if trial.is_error():
            raise InvalidFormat(_reason(trial.get_error()))
        return matcher


def _grammar(kind: int, schema: str) -> str:
    if kind == ResponseFormat.REGEX:
        return LLMatcher.grammar_from_regex(schema)
    if kind == ResponseFormat.GRAMMAR:
        return LLMatcher.grammar_from_lark(schema)
    return LLMatcher.grammar_from_json_schema(
        '{"type": "object"}' if kind == ResponseFormat.JSON else schema, JSON_OPTIONS)


def _reason(error: str) -> str:
    """Return the library's message as one line of bounded length."""
    return ' '.join(error.replace('<non-verbose/>', '').split())[:MAX_REASON] or 'unknown error'
