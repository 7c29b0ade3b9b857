# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The rows of the journal as plain data: answers, corrections and adapter versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import hashlib
import json
import math
import re
from typing import Any, TypeAlias
import unicodedata

from mace_ros.api.events import CorrectionState, VersionState

Messages: TypeAlias = tuple[Mapping[str, Any], ...]
"""A prompt: ``role`` and ``content`` of each message; see :data:`mace_ros.model.chat.Message`."""

Tools: TypeAlias = tuple[Mapping[str, str], ...]
"""The tools of a prompt: ``name``, ``description`` and ``parameters`` (JSON schema as text)."""

# Maximum number of questions of a conversation that are read together.
MAX_TURNS = 4
# States of a correction that is still to be learned.
PENDING = (CorrectionState.ACCEPTED, CorrectionState.TRAINING)


@dataclass(frozen=True)
class AnswerRecord:
    """
    An answer that the node gave.

    ``lineage`` is the profile whose adapter version answered: the query's own profile, or ''
    where the robot's version served it. ``matched_correction_id`` is the learned correction whose
    scope the question was in, and ``similarity`` is that to the nearest one. ``out_of_scope`` tells
    that it was outside the scope of a version that was live: its own profile's, or the robot's.
    ``tools`` are those that the prompt offers, and ``calls_tool`` tells whether the answer calls
    one: ``text`` has the call as the model writes it. ``time`` is wall-clock seconds since the
    epoch.
    """

    query_id: str
    prompt_ids: tuple[int, ...]
    messages: Messages
    text: str
    output_ids: tuple[int, ...]
    conversation_id: str = ''
    profile: str = ''
    lineage: str = ''
    adapter_version: int = 0
    matched_correction_id: str = ''
    out_of_scope: bool = False
    similarity: float = 0.0
    no_learn: bool = False
    time: float = 0.0
    tools: Tools = ()
    calls_tool: bool = False


@dataclass(frozen=True)
class CorrectionRecord:
    """
    A correction with its exact prompt, so that it can be learned without the answer's record.

    ``received`` is wall-clock seconds since the epoch. ``adapter_version`` is set with
    LEARNED, and stays when the correction is superseded or its version rolled back later.
    ``scope`` is 'similar', 'everywhere', or '' for what the parameter ``adapter.scope`` says.
    A thumbs-down is RECORDED, and has neither ``corrected`` nor ``hint``. A hint is PROPOSED, with
    an empty ``corrected`` until the answer that follows it is known, and ACCEPTED once that is
    confirmed. ``replaces`` is the id of an earlier correction of the same question in other words.
    """

    id: str
    prompt_ids: tuple[int, ...]
    messages: Messages
    corrected: str
    rejected: str = ''
    query_id: str = ''
    conversation_id: str = ''
    profile: str = ''
    weight: float = 1.0
    source: str = ''
    received: float = 0.0
    state: CorrectionState = CorrectionState.ACCEPTED
    reason: str = ''
    adapter_version: int = 0
    scope: str = ''
    hint: str = ''
    tools: Tools = ()
    replaces: str = ''


@dataclass(frozen=True)
class VersionRecord:
    """
    A trained version of a profile's adapter; unknown scores are NaN.

    ``parent`` was the newest version before it. ``continues`` is the version whose weights its
    training began from, and whose place it takes; 0 if it began with a fresh adapter.
    ``everywhere`` tells that it was trained to answer every question: with samples that protect
    the other answers.
    ``path`` is relative to the storage folder, so that the folder can be moved; ``sha256`` is
    empty once the files are to be deleted. ``created`` is wall-clock seconds since the epoch.
    """

    profile: str
    version: int
    parent: int
    state: VersionState = VersionState.PUBLISHED
    reason: str = ''
    correction_ids: tuple[str, ...] = ()
    score_before: float = math.nan
    score_after: float = math.nan
    train_tokens: int = 0
    train_seconds: float = 0.0
    path: str = ''
    sha256: str = ''
    created: float = 0.0
    continues: int = 0
    everywhere: bool = False


@dataclass(frozen=True)
class AnswerOutcome:
    """Which version answered a question, and whether the answer was corrected."""

    query_id: str
    question: str           # key of the question, as of :func:`question_key`
    lineage: str
    version: int
    corrected: bool


def question_key(messages: Messages, prompt_ids: Sequence[int]) -> str:
    """Return a short key that is equal for prompts ending in the same user message."""
    asked = [message['content'] for message in messages if message['role'] == 'user']
    text = ' '.join(asked[-1].casefold().split()) if asked else as_json(prompt_ids)
    return _digest(text)


def wording_keys(messages: Messages) -> list[str]:
    """
    Return the :func:`wording_key` of the last user message, and of it with those before.

    A follow-up is asked together with up to three messages before it.
    """
    asked = [message['content'] for message in messages if message['role'] == 'user']
    return [wording_key('\n'.join(asked[-count:]))
            for count in range(1, min(len(asked), MAX_TURNS) + 1)]


def wording_key(text: str) -> str:
    """Return a short key that is equal for texts of the same words."""
    words = ' '.join(re.findall(r'\w+', unicodedata.normalize('NFKC', text).casefold())) or text
    return _digest(words)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()


def as_json(value: object) -> str:
    """Return the text in which the journal stores a list."""
    return json.dumps(value, separators=(',', ':'))
