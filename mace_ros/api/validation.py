# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Validation of queries and corrections at the border of the engine."""

from __future__ import annotations

from dataclasses import replace
import math
import uuid

from mace_ros.api.chat_validation import check_prompt, text_problem
from mace_ros.api.events import (
    Correction,
    ErrorCode,
    InvalidCorrection,
    InvalidQuery,
    Query,
    ResponseFormat,
)
from mace_ros.api.settings import (
    MAX_REPETITION_PENALTY,
    MAX_TOP_K,
    MIN_REPETITION_PENALTY,
    SCOPES,
    Settings,
)

MAX_ID = 128            # characters of an id or profile
MAX_STOPS = 16
MAX_STOP = 256          # characters of a stop string
MAX_BIASES = 300        # tokens of logit_bias
MAX_BIAS = 100.0
MAX_PENALTY = 2.0       # of frequency_penalty and presence_penalty, also below 0
MAX_LOGPROBS = 20       # alternatives of a token
MAX_CHOICES = 16        # answers to a query
MAX_WEIGHT = 100.0
MAX_UNWRITTEN = 1000    # corrections and answers that wait for the disk

UNNAMED = 'query_id, conversation_id or prompt: one of them must name what is corrected'


def checked_query(query: Query, settings: Settings) -> Query:
    """Return the query with all defaults filled in; raise :class:`InvalidQuery`."""
    for name in ('id', 'conversation_id', 'profile'):
        problem = _id_problem(getattr(query, name))
        if problem:
            raise InvalidQuery(ErrorCode.INVALID_ID, f'{name}: {problem}')
    check_prompt(query)
    if len(query.stop) > MAX_STOPS:
        raise InvalidQuery(
            ErrorCode.INVALID_PARAMETER, f'stop: more than {MAX_STOPS} strings')
    if any(not s or len(s) > MAX_STOP for s in query.stop):
        raise InvalidQuery(
            ErrorCode.INVALID_PARAMETER, f'stop: each string needs 1 to {MAX_STOP} characters')
    generation, slo = settings.generation, settings.slo
    for name in ('frequency_penalty', 'presence_penalty'):
        _number(name, getattr(query, name), 0.0, -MAX_PENALTY, MAX_PENALTY)
    _number('logprobs', query.logprobs, 0, 0, MAX_LOGPROBS + 1)
    _number('n', query.n, 1, 1, MAX_CHOICES)
    return replace(
        query,
        max_tokens=int(_number('max_tokens', query.max_tokens, generation.max_tokens, 0, 2**31)),
        temperature=_number('temperature', query.temperature, generation.temperature, 0, 5),
        top_p=_number('top_p', query.top_p, generation.top_p, 0, 1),
        top_k=int(_number('top_k', query.top_k, generation.top_k, 0, MAX_TOP_K)),
        min_p=_number('min_p', query.min_p, generation.min_p, 0, 1),
        repetition_penalty=_number(
            'repetition_penalty', query.repetition_penalty, generation.repetition_penalty,
            MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
        seed=uuid.uuid4().int % 2**31 if query.seed is None else query.seed,
        ttft_slo_ms=_number('ttft_slo_ms', query.ttft_slo_ms, slo.ttft_ms, 0, math.inf),
        tpot_slo_ms=_number('tpot_slo_ms', query.tpot_slo_ms, slo.tpot_ms, 0, math.inf))


def check_logit_bias(query: Query, vocabulary: int) -> None:
    """Raise :class:`InvalidQuery` unless the biases are of different tokens of the vocabulary."""
    tokens, values = query.logit_bias_tokens, query.logit_bias_values
    problem = ''
    if len(tokens) != len(values):
        problem = f'{len(tokens)} tokens, and {len(values)} logit_bias_values'
    elif len(tokens) > MAX_BIASES:
        problem = f'more than {MAX_BIASES} tokens'
    elif len(set(tokens)) < len(tokens):
        problem = 'a token is in it twice'
    elif tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
        problem = f'each token must be between 0 and {vocabulary - 1}'
    if problem:
        raise InvalidQuery(ErrorCode.INVALID_PARAMETER, f'logit_bias_tokens: {problem}')
    for value in values:
        _number('logit_bias_values', value, 0.0, -MAX_BIAS, MAX_BIAS)


def check_response_format(query: Query) -> None:
    """Raise :class:`InvalidQuery` unless the format is known and its schema is of usable size."""
    kind, schema = query.response_format, query.response_schema
    _number('response_format', kind, 0, min(ResponseFormat), max(ResponseFormat))
    needed = kind not in (ResponseFormat.FREE, ResponseFormat.JSON)
    problem = text_problem(schema)
    if needed and not schema.strip():
        problem = f'empty, and response_format {ResponseFormat(kind).name} needs it'
    elif schema and not needed:
        problem = f'response_format {ResponseFormat(kind).name} has none'
    if problem:
        raise InvalidQuery(ErrorCode.INVALID_PARAMETER, f'response_schema: {problem}')


def checked_correction(correction: Correction) -> Correction:
    """
    Return the correction with an id; raise :class:`InvalidCorrection`.

    Texts of white space only are empty afterwards: such a correction is a thumbs-down.
    """
    for name in ('id', 'query_id', 'conversation_id', 'profile'):
        problem = _id_problem(getattr(correction, name))
        if problem:
            raise InvalidCorrection(f'{name}: {problem}')
    for name in ('corrected', 'hint', 'rejected', 'prompt', 'source'):
        problem = text_problem(getattr(correction, name))
        if problem:
            raise InvalidCorrection(f'{name}: {problem}')
    if not (correction.id or names_answer(correction)):
        raise InvalidCorrection(UNNAMED)
    if correction.scope not in ('', *SCOPES):
        raise InvalidCorrection(
            f'scope: {correction.scope!r} is not one of {", ".join(SCOPES)}, or empty')
    if not 0 < correction.weight <= MAX_WEIGHT:   # also refuses NaN
        raise InvalidCorrection(f'weight: {correction.weight} is not above 0 and at most '
                                f'{MAX_WEIGHT:g}')
    return replace(
        correction, id=correction.id or str(uuid.uuid4()),
        corrected=correction.corrected if correction.corrected.strip() else '',
        hint=correction.hint.strip())


def names_answer(correction: Correction) -> bool:
    """Return whether a correction names an answer, which one that confirms a hint need not."""
    return bool(correction.query_id or correction.conversation_id or correction.prompt.strip())


def _number(name: str, value: float | None, default: float, low: float, high: float) -> float:
    if value is None:
        return default
    if not math.isfinite(value) or not low <= value <= high:
        raise InvalidQuery(
            ErrorCode.INVALID_PARAMETER,
            f'{name}: {value} is not between {low:.10g} and {high:.10g}')
    return value


def _id_problem(text: str) -> str:
    if len(text) > MAX_ID:
        return f'longer than {MAX_ID} characters'
    if not text.isprintable():
        return 'contains characters that are not printable'
    return ''
