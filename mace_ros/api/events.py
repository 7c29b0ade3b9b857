# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Inputs and events of the engine as plain frozen data.

The node, tests and benchmarks use the engine through these classes. The field names are those of
the ``.msg`` files; ``None`` stands for the node's default. Names that end in ``_ms`` are
milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
import math
from typing import TypeAlias


class FinishReason(IntEnum):
    """Why an answer ended, with the values of ``Response.msg``."""

    STOP = 0
    LENGTH = 1
    CANCELLED = 2
    REJECTED = 3
    ERROR = 4


class ErrorCode(IntEnum):
    """Why a query failed, with the values of ``Response.msg``."""

    NONE = 0
    EMPTY_TEXT = 1
    INVALID_ID = 2
    DUPLICATE_ID = 3
    INVALID_PARAMETER = 4
    PROMPT_TOO_LONG = 5
    OVERLOADED = 6
    SLO_UNREACHABLE = 7
    NOT_SERVING = 8
    INTERNAL = 9


class ResponseFormat(IntEnum):
    """The format of an answer, with the values of ``Query.msg``."""

    FREE = 0
    JSON = 1
    JSON_SCHEMA = 2
    REGEX = 3
    GRAMMAR = 4


class CorrectionState(IntEnum):
    """State of a correction, with the values of ``CorrectionStatus.msg``."""

    ACCEPTED = 0
    TRAINING = 1
    LEARNED = 2
    SUPERSEDED = 3
    REJECTED = 4
    FAILED = 5
    PROPOSED = 6
    RECORDED = 7


class VersionState(IntEnum):
    """State of a trained version, with the values of ``AdapterVersion.msg``."""

    PUBLISHED = 0
    REJECTED = 1
    ROLLED_BACK = 2


class InvalidQuery(ValueError):
    """A query is invalid; it becomes a Response with REJECTED."""

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class InvalidCorrection(ValueError):
    """A correction is refused; it becomes a CorrectionStatus with REJECTED."""


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool; ``arguments`` is a JSON object as text; see ``ToolCall.msg``."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Tool:
    """A tool that the model may call; see ``Tool.msg``."""

    name: str
    description: str = ''
    parameters: str = ''


@dataclass(frozen=True)
class ChatMessage:
    """A message of a conversation that the client keeps; see ``ChatMessage.msg``."""

    role: str
    content: str = ''
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ''


@dataclass(frozen=True)
class Query:
    """A query; see ``Query.msg``."""

    text: str = ''
    id: str = ''
    conversation_id: str = ''
    profile: str = ''
    system: str = ''
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None
    priority: int = 0
    reset_conversation: bool = False
    no_learn: bool = False
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias_tokens: tuple[int, ...] = ()
    logit_bias_values: tuple[float, ...] = ()
    logprobs: int = 0
    n: int = 1
    response_format: int = ResponseFormat.FREE
    response_schema: str = ''
    messages: tuple[ChatMessage, ...] = ()
    tools: tuple[Tool, ...] = ()
    tool_choice: str = ''
    raw_prompt: bool = False
    # Identifies the sender where the id is ambiguous; copied to the events, not in messages.
    origin: str = ''


@dataclass(frozen=True)
class Correction:
    """
    The right answer to a query; see ``Correction.msg``.

    Without ``corrected``, a ``hint`` says how to answer; without both it is a thumbs-down.
    """

    corrected: str
    id: str = ''
    query_id: str = ''
    conversation_id: str = ''
    prompt: str = ''
    rejected: str = ''
    profile: str = ''
    weight: float = 1.0
    source: str = ''
    scope: str = ''
    hint: str = ''


@dataclass(frozen=True)
class Cancel:
    """Ends a query early; see ``Cancel.msg``."""

    query_id: str


@dataclass(frozen=True)
class Logprob:
    """The log-probability of one token; see ``Logprob.msg``."""

    token_id: int
    token: str
    token_bytes: bytes
    logprob: float


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position of an answer; see ``TokenLogprobs.msg``."""

    sampled: Logprob
    top: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class Choice:
    """One of several answers to the same query; see ``Choice.msg``."""

    index: int
    text: str
    finish_reason: FinishReason
    output_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class ResponseChunk:
    """A piece of an answer, of whole characters; ``last`` ends the stream of its query."""

    query_id: str
    index: int
    text: str
    last: bool
    origin: str = ''
    choice: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Response:
    """The result of a query; see ``Response.msg``. Unknown times are NaN."""

    query_id: str
    conversation_id: str
    text: str
    finish_reason: FinishReason
    error_code: ErrorCode = ErrorCode.NONE
    error: str = ''
    adapter_version: int = 0
    adapter_profile: str = ''
    matched_correction_id: str = ''
    similarity: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    queue_ms: float = math.nan
    ttft_ms: float = math.nan
    tpot_ms: float = math.nan
    e2e_ms: float = math.nan
    slo_met: bool = False
    origin: str = ''
    logprobs: tuple[TokenLogprobs, ...] = ()
    choices: tuple[Choice, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class CorrectionStatus:
    """A new state of a correction; see ``CorrectionStatus.msg``."""

    id: str
    state: CorrectionState
    reason: str = ''
    adapter_version: int = 0
    corrected: str = ''


@dataclass(frozen=True)
class AdapterVersion:
    """A published, rejected or rolled-back version of an adapter; see ``AdapterVersion.msg``."""

    profile: str
    version: int
    parent: int
    state: VersionState
    reason: str = ''
    correction_ids: tuple[str, ...] = ()
    score_before: float = math.nan
    score_after: float = math.nan
    train_tokens: int = 0
    train_seconds: float = 0.0
    path: str = ''
    sha256: str = ''


Input: TypeAlias = Query | Correction | Cancel
Event: TypeAlias = ResponseChunk | Response | CorrectionStatus | AdapterVersion
