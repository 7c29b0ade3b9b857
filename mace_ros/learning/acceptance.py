# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Acceptance of a correction into the journal: its prompt, and the corrections it supersedes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
import time

from mace_ros.api.events import (
    Correction,
    CorrectionState,
    CorrectionStatus,
    InvalidCorrection,
)
from mace_ros.api.settings import Settings
from mace_ros.api.validation import names_answer, UNNAMED
from mace_ros.model.chat import ChatTokenizer
from mace_ros.store.corrections import Deleted
from mace_ros.store.journal import Journal
from mace_ros.store.journal_file import low_space
from mace_ros.store.records import AnswerRecord, CorrectionRecord

USED_ID = 'id: used before, for another correction'


@dataclass(frozen=True)
class Accepted:
    """
    A correction that is in the journal; ``new`` is False if its state was on record before.

    ``arrived`` is its arrival in seconds on the engine's clock; ``superseded`` are the ids of
    the corrections that it replaces, and ``deleted`` are those that had to make room
    (``storage.max_corrections``). ``proposed`` tells that its text is the answer to its hint, not
    that of a message.
    """

    record: CorrectionRecord
    new: bool
    arrived: float
    superseded: tuple[str, ...] = ()
    deleted: Deleted = field(default_factory=Deleted)
    proposed: bool = False

    @property
    def to_learn(self) -> bool:
        """Whether it is a new correction with a text to learn."""
        return self.new and self.record.state is CorrectionState.ACCEPTED

    @property
    def status(self) -> CorrectionStatus:
        """Its state as an event; a hint is ACCEPTED until its answer is known."""
        record = self.record
        if record.state is not CorrectionState.PROPOSED:
            return CorrectionStatus(
                record.id, record.state, record.reason, record.adapter_version)
        if not record.corrected:
            return CorrectionStatus(record.id, CorrectionState.ACCEPTED)
        return CorrectionStatus(
            record.id, CorrectionState.PROPOSED, corrected=record.corrected)


def accept(correction: Correction, journal: Journal, *, chat: ChatTokenizer, settings: Settings,
           longest: int, arrived: float) -> Accepted:
    """
    Write a checked correction to the journal, in its thread, unless it is on record.

    A text for a hint that is on record confirms the hint. ``longest`` is the maximum number of
    tokens of a prompt with its answer. Raises :class:`InvalidCorrection`, also for an id that
    another correction has.
    """
    known = journal.correction(correction.id)
    if known is not None and not _is_on_record(correction, known):
        raise InvalidCorrection(USED_ID)
    if known is not None and known.state is CorrectionState.PROPOSED and correction.corrected:
        _check_space(journal, settings)
        return _confirm(known, correction.corrected, journal, chat, settings, longest, arrived)
    if known is not None:
        return Accepted(known, False, arrived)
    if not names_answer(correction):
        raise InvalidCorrection(f'id: no correction {correction.id!r} is on record; {UNNAMED}')
    if correction.corrected or correction.hint:
        _check_space(journal, settings)
    record = _with_prompt(correction, journal, chat, settings, longest)
    journal.accept(record)
    superseded = (journal.supersede(record) if record.state is CorrectionState.ACCEPTED else ())
    # It may have taken over what a pending correction replaces.
    record = journal.correction(record.id) or record
    deleted = journal.limit_corrections(settings.storage.max_corrections)
    return Accepted(record, True, arrived, superseded, deleted)


def _check_space(journal: Journal, settings: Settings) -> None:
    """Raise :class:`InvalidCorrection` if the disk has no space for another version."""
    problem = low_space(journal.path.parent, settings.storage.min_free_mb)
    if problem:
        raise InvalidCorrection(f'{problem}, then send the correction again')


def _is_on_record(correction: Correction, known: CorrectionRecord) -> bool:
    """Return whether a correction with the id of ``known`` repeats or confirms that one."""
    confirms = known.state is CorrectionState.PROPOSED
    # A conversation has other answers by now, and what is empty does not contradict.
    return ((correction.query_id in ('', known.query_id) or bool(correction.conversation_id))
            and (confirms or correction.corrected in ('', known.corrected))
            and correction.hint in ('', known.hint))


def take_hint_answer(record: CorrectionRecord, text: str, problem: str, journal: Journal, *,
                     chat: ChatTokenizer, settings: Settings, longest: int,
                     arrived: float) -> Accepted:
    """
    Write the answer that a hint has led to; in the journal's thread.

    The correction fails if there is a ``problem`` or the answer is of no use. It is left alone if
    it was confirmed with another text, or deleted, meanwhile.
    """
    known = journal.correction(record.id)
    if known is None or known.state is not CorrectionState.PROPOSED or known.corrected:
        return Accepted(known or record, False, arrived)
    try:
        if problem:
            raise InvalidCorrection(problem)
        if settings.correction.accept_hints:
            return replace(
                _confirm(known, text, journal, chat, settings, longest, arrived), proposed=True)
        proposal = _checked_texts(known, text, chat, settings, longest)
    except InvalidCorrection as error:
        failed = replace(known, state=CorrectionState.FAILED, reason=f'hint: {error}')
        journal.set_correction(failed.id, failed.state, failed.reason)
        return Accepted(failed, False, arrived)
    journal.propose(proposal.id, proposal.corrected, proposal.rejected)
    return Accepted(proposal, False, arrived, proposed=True)


def _confirm(known: CorrectionRecord, text: str, journal: Journal, chat: ChatTokenizer,
             settings: Settings, longest: int, arrived: float) -> Accepted:
    """Make a hint's correction one to be learned; raise :class:`InvalidCorrection`."""
    record = replace(_checked_texts(known, text, chat, settings, longest),
                     state=CorrectionState.ACCEPTED)
    journal.confirm(record)
    superseded = journal.supersede(record)
    return Accepted(journal.correction(record.id) or record, True, arrived, superseded)


def _with_prompt(correction: Correction, journal: Journal, chat: ChatTokenizer,
                 settings: Settings, longest: int) -> CorrectionRecord:
    """Return the record, with the prompt that is corrected; raise :class:`InvalidCorrection`."""
    answer = _corrected_answer(correction, journal)
    if answer is None:
        system = settings.generation.system
        messages = (([{'role': 'system', 'content': system}] if system else [])
                    + [{'role': 'user', 'content': correction.prompt}])
        answer = AnswerRecord('', tuple(chat.prompt(messages)), tuple(messages), '', ())
    record = CorrectionRecord(
        id=correction.id, prompt_ids=answer.prompt_ids, messages=answer.messages,
        corrected='', rejected=correction.rejected or answer.text, query_id=answer.query_id,
        conversation_id=answer.conversation_id, profile=correction.profile or answer.profile,
        weight=correction.weight, source=correction.source, received=time.time(),
        scope=correction.scope, hint=correction.hint, tools=answer.tools)
    if correction.corrected:
        return _checked_texts(record, correction.corrected, chat, settings, longest)
    return replace(record, state=(
        CorrectionState.PROPOSED if correction.hint else CorrectionState.RECORDED))


def _checked_texts(record: CorrectionRecord, corrected: str, chat: ChatTokenizer,
                   settings: Settings, longest: int) -> CorrectionRecord:
    """Return the record with a corrected text that can be learned, or raise."""
    rejected = record.rejected
    if rejected.strip() == corrected.strip():
        raise InvalidCorrection('corrected: equal to the rejected answer')
    longest = min(settings.finetune.max_sample_tokens, longest)
    tokens, rejected_tokens = (len(record.prompt_ids) + len(chat.answer(text))
                               for text in (corrected, rejected))
    if tokens > longest:
        raise InvalidCorrection(
            f'prompt and text have {tokens} tokens; the limit is {longest} '
            '(finetune.max_sample_tokens)')
    if rejected_tokens > longest:
        rejected = ''       # learning works without it
    return replace(record, corrected=corrected, rejected=rejected)


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
