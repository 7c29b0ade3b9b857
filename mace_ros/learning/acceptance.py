# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Acceptance of a correction into the journal: its prompt, and the corrections it supersedes."""

from __future__ import annotations

from dataclasses import dataclass
import time

from mace_ros.api.events import Correction, InvalidCorrection
from mace_ros.api.settings import Settings
from mace_ros.model.chat import ChatTokenizer
from mace_ros.store.journal import Journal
from mace_ros.store.records import AnswerRecord, CorrectionRecord


@dataclass(frozen=True)
class Accepted:
    """
    A correction that is in the journal; ``new`` is False if its id was on record before.

    ``arrived`` is its arrival in seconds on the engine's clock; ``superseded`` are the ids of
    the corrections that it replaces, and ``deleted`` are those that had to make room
    (``storage.max_corrections``).
    """

    record: CorrectionRecord
    new: bool
    arrived: float
    superseded: tuple[str, ...] = ()
    deleted: tuple[CorrectionRecord, ...] = ()


def accept(correction: Correction, journal: Journal, *, chat: ChatTokenizer, settings: Settings,
           longest: int, arrived: float) -> Accepted:
    """
    Write a checked correction to the journal unless its id is on record; in its thread.

    ``longest`` is the maximum number of tokens of a prompt with its answer. Raises
    :class:`InvalidCorrection`.
    """
    known = journal.correction(correction.id)
    if known is not None:
        return Accepted(known, False, arrived)
    record = _with_prompt(correction, journal, chat, settings, longest)
    journal.accept(record)
    superseded = journal.supersede(record)
    deleted = journal.limit_corrections(settings.storage.max_corrections)
    return Accepted(record, True, arrived, superseded, deleted)


def _with_prompt(correction: Correction, journal: Journal, chat: ChatTokenizer,
                 settings: Settings, longest: int) -> CorrectionRecord:
    """Return the record, with the prompt that is corrected; raise :class:`InvalidCorrection`."""
    answer = _corrected_answer(correction, journal)
    if answer is None:
        system = settings.generation.system
        messages = (([{'role': 'system', 'content': system}] if system else [])
                    + [{'role': 'user', 'content': correction.prompt}])
        answer = AnswerRecord('', tuple(chat.prompt(messages)), tuple(messages), '', ())
    rejected = correction.rejected or answer.text
    if rejected.strip() == correction.corrected.strip():
        raise InvalidCorrection('corrected: equal to the rejected answer')
    longest = min(settings.finetune.max_sample_tokens, longest)
    tokens, rejected_tokens = (len(answer.prompt_ids) + len(chat.answer(text))
                               for text in (correction.corrected, rejected))
    if tokens > longest:
        raise InvalidCorrection(
            f'{tokens} tokens with its prompt; {longest} at most (finetune.max_sample_tokens)')
    if rejected_tokens > longest:
        rejected = ''       # learning works without it
    return CorrectionRecord(
        id=correction.id, prompt_ids=answer.prompt_ids, messages=answer.messages,
        corrected=correction.corrected, rejected=rejected, query_id=answer.query_id,
        conversation_id=answer.conversation_id, profile=correction.profile or answer.profile,
        weight=correction.weight, source=correction.source, received=time.time(),
        scope=correction.scope, tools=answer.tools)


def _corrected_answer(correction: Correction, journal: Journal) -> AnswerRecord | None:
    """Return the answer that the correction names by an id, None if it gives a prompt."""
    if correction.query_id:
        answer = journal.answer(correction.query_id)
        if answer is None:
            raise InvalidCorrection(
                f'query_id: no answer to {correction.query_id!r} is on record')
        return answer
    if correction.conversation_id:
        answer = journal.last_answer(correction.conversation_id)
        if answer is None:
            raise InvalidCorrection(
                f'conversation_id: no answer in {correction.conversation_id!r} is on record')
        return answer
    return None
