# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Accepting a correction: resolve the answer that it corrects, and write it to the journal."""

from __future__ import annotations

from dataclasses import dataclass
import time

from mace_ros.api.events import Correction, InvalidCorrection
from mace_ros.api.settings import Settings
from mace_ros.model.chat import ChatTokenizer
from mace_ros.store.journal import AnswerRecord, CorrectionRecord, Journal
from mace_ros.store.retention import make_room


@dataclass(frozen=True)
class Accepted:
    """
    A correction that is in the journal; ``new`` is False if its id was known before.

    ``superseded`` are the ids of the older corrections of the same question.
    """

    record: CorrectionRecord
    new: bool
    arrived: float
    superseded: tuple[str, ...] = ()


def accept(correction: Correction, journal: Journal, *, chat: ChatTokenizer, settings: Settings,
           longest: int, arrived: float) -> Accepted:
    """
    Write a checked correction to the journal, unless its id is known; in the journal's thread.

    ``longest`` limits the tokens of a prompt with its answer; ``arrived`` is on the engine's
    clock. Raises :class:`InvalidCorrection`.
    """
    known = journal.correction(correction.id)
    if known is not None:
        return Accepted(known, False, arrived)
    record = _resolved(correction, journal, chat, settings, longest)
    journal.accept(record)
    superseded = journal.supersede(record)
    make_room(journal, settings.storage.max_corrections)
    return Accepted(record, True, arrived, superseded)


def _resolved(correction: Correction, journal: Journal, chat: ChatTokenizer, settings: Settings,
              longest: int) -> CorrectionRecord:
    """Return the record of a correction; raises :class:`InvalidCorrection`."""
    answer = None
    if correction.query_id:
        answer = journal.answer(correction.query_id)
        if answer is None:
            raise InvalidCorrection(
                f'query_id: no answer to {correction.query_id!r} is on record')
    elif correction.conversation_id:
        answer = journal.last_answer(correction.conversation_id)
        if answer is None:
            raise InvalidCorrection(
                f'conversation_id: no answer in {correction.conversation_id!r} is on record')
    if answer is None:
        system = settings.generation.system
        messages = (([{'role': 'system', 'content': system}] if system else [])
                    + [{'role': 'user', 'content': correction.prompt}])
        answer = AnswerRecord('', tuple(chat.prompt(messages)), tuple(messages), '', ())
    rejected = correction.rejected or answer.text
    if rejected.strip() == correction.corrected.strip():
        raise InvalidCorrection('corrected: equal to the rejected answer')
    longest = min(settings.finetune.max_sample_tokens, longest)
    tokens, of_rejected = (len(answer.prompt_ids) + len(chat.answer(text))
                           for text in (correction.corrected, rejected))
    if tokens > longest:
        raise InvalidCorrection(
            f'{tokens} tokens with its prompt; {longest} at most (finetune.max_sample_tokens)')
    if of_rejected > longest:
        rejected = ''       # optional: the corrected text can be learned without it
    return CorrectionRecord(
        id=correction.id, prompt_ids=answer.prompt_ids, messages=answer.messages,
        corrected=correction.corrected, rejected=rejected, query_id=answer.query_id,
        conversation_id=answer.conversation_id, profile=correction.profile or answer.profile,
        weight=correction.weight, source=correction.source, received=time.time())
