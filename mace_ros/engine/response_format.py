# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The format of an answer, compiled into a constraint when the query arrives."""

from __future__ import annotations

from mace_ros.api.chat_validation import check_prompt
from mace_ros.api.events import ErrorCode, InvalidQuery, Query, ResponseFormat
from mace_ros.api.validation import check_response_format
from mace_ros.model.chat import ChatTokenizer
from mace_ros.model.constraints import Constraint, ConstraintCompiler, InvalidFormat
from mace_ros.model.tool_grammar import call_grammar
from mace_ros.model.vocabulary import UnreadableVocabulary


def compile_format(query: Query, compiler: ConstraintCompiler,
                   chat: ChatTokenizer) -> Constraint | InvalidQuery | None:
    """
    Return the constraint of a query, None if there is none, or why it is invalid.

    ``tool_choice`` may demand a call of a tool, in the convention of the chat template.

    Runs in the thread in which the query arrives, so that no iteration waits for it. An error is
    returned, not raised, because admission checks for a duplicate id first.
    """
    try:
        check_response_format(query)
        if query.logprobs:
            compiler.vocabulary.index()     # built here, not on the device's thread
        if query.tool_choice not in ('', 'auto', 'none'):
            return _compile_call(query, compiler, chat)
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


def _compile_call(query: Query, compiler: ConstraintCompiler,
                  chat: ChatTokenizer) -> Constraint | None:
    """Return the constraint of an answer that calls a tool; raises :class:`InvalidQuery`."""
    check_prompt(query)
    if query.response_format != ResponseFormat.FREE:
        raise InvalidQuery(ErrorCode.INVALID_PARAMETER,
                           'response_format: tool_choice demands a call, which has its own format')
    if chat.tool_format is None:
        return None     # admission refuses the prompt
    chosen = [tool for tool in query.tools if query.tool_choice in ('required', tool.name)]
    try:
        return compiler.compile(
            ResponseFormat.GRAMMAR, call_grammar(chat.tool_format, chosen, chat.markers))
    except InvalidFormat as error:
        raise InvalidQuery(ErrorCode.INVALID_PARAMETER, f'tools: {error}') from error
