# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What an answer must be, compiled when its query arrives."""

from __future__ import annotations

from mace_ros.api.events import ErrorCode, InvalidQuery, Query, ResponseFormat
from mace_ros.api.validation import check_response_format
from mace_ros.model.constraints import Constraint, ConstraintCompiler, InvalidFormat
from mace_ros.model.vocabulary import UnreadableVocabulary


def compile_format(query: Query, compiler: ConstraintCompiler) -> Constraint | InvalidQuery | None:
    """
    Return the constraint of a query, None if there is none, or why it is invalid.

    In the thread that the query arrives in, so that no iteration waits for it. The reason is
    returned, not raised, because a duplicate id is looked for first.
    """
    try:
        check_response_format(query)
        if query.logprobs:
            compiler.vocabulary.index()     # else the device's thread would make it
        if query.response_format == ResponseFormat.FREE:
            return None
        return compiler.compile(query.response_format, query.response_schema)
    except InvalidQuery as error:
        return error
    except UnreadableVocabulary as error:
        return InvalidQuery(ErrorCode.INVALID_PARAMETER, f'logprobs: {error}')
    except InvalidFormat as error:
        name = ResponseFormat(query.response_format).name
        return InvalidQuery(ErrorCode.INVALID_PARAMETER, f'response_schema: {name}: {error}')
