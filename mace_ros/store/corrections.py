# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The corrections in the journal, from ACCEPTED to their final state."""

from __future__ import annotations

from collections.abc import Collection, Iterable
import sqlite3
from typing import NamedTuple

from mace_ros.api.events import CorrectionState, InvalidCorrection
from mace_ros.api.wording import counted
from mace_ros.store.journal_file import JournalFile
from mace_ros.store.records import as_json, CorrectionRecord, question_key, wording_keys
from mace_ros.store.rows import PENDING_SQL, record_fields

# States of a correction without a text to learn.
UNLEARNABLE = (CorrectionState.PROPOSED, CorrectionState.RECORDED)

# The given corrections with those that they have superseded, one after the other.
_WITH_SUPERSEDED = """
    WITH RECURSIVE found AS (
        SELECT * FROM corrections WHERE id IN (SELECT value FROM json_each(?))
        UNION
        SELECT older.* FROM corrections AS older JOIN found AS newer
        ON older.profile = newer.profile AND older.state = ? AND older.number < newer.number
        AND (older.id = newer.replaces
             OR (older.question = newer.question AND older.prompt_ids = newer.prompt_ids)))
    SELECT * FROM found ORDER BY number"""
# The given correction with those that superseded it, one after the other, except for some ids.
_WITH_NEWER = """
    WITH RECURSIVE found AS (
        SELECT * FROM corrections WHERE id = ?
        UNION
        SELECT newer.* FROM corrections AS newer JOIN found AS older
        ON newer.profile = older.profile AND newer.number > older.number
        AND newer.id NOT IN (SELECT value FROM json_each(?))
        AND (newer.replaces = older.id
             OR (newer.question = older.question AND newer.prompt_ids = older.prompt_ids)))
    SELECT id FROM found"""

# Corrections of the prompt that :func:`_prompt_key` describes.
_SAME_PROMPT = 'profile = ? AND question = ? AND prompt_ids = ?'
_PENDING_OR_LEARNED = f'(state IN {PENDING_SQL} OR state = {int(CorrectionState.LEARNED)})'


class CorrectionLink(NamedTuple):
    """
    The fields of a :class:`CorrectionRecord` that decide which one of several is LEARNED.

    They are read much faster. ``prompt`` is the text of ``prompt_ids`` in the journal.
    """

    id: str
    prompt: str
    replaces: str
    state: CorrectionState
    reason: str
    adapter_version: int


class Deleted(NamedTuple):
    """
    Deleted corrections, oldest first, and the questions that no version may answer any more.

    These are pairs of a profile and the key of a wording, as in :func:`.wording_key`.
    """

    records: tuple[CorrectionRecord, ...] = ()
    questions: tuple[tuple[str, str], ...] = ()


class CorrectionTable(JournalFile):
    """The table ``corrections``."""

    def accept(self, record: CorrectionRecord) -> bool:
        """Add a correction; return False, changing nothing, if its id is on record."""
        with self.transaction():
            if self.correction(record.id) is not None:
                return False
            self.insert(
                'INSERT', 'corrections',
                id=record.id, query_id=record.query_id, conversation_id=record.conversation_id,
                profile=record.profile, prompt_ids=as_json(record.prompt_ids),
                messages=as_json(record.messages), rejected=record.rejected,
                corrected=record.corrected, weight=record.weight, source=record.source,
                received=record.received, state=int(record.state), reason=record.reason,
                adapter_version=record.adapter_version, scope=record.scope, hint=record.hint,
                tools=as_json(record.tools), replaces=record.replaces,
                question=question_key(record.messages, record.prompt_ids))
            self.execute('INSERT INTO profiles (profile) VALUES (?) ON CONFLICT DO NOTHING',
                         record.profile)
        return True

    def propose(self, correction_id: str, corrected: str, rejected: str) -> None:
        """Write the answer that a hint has led to, and the wrong one; it is not confirmed yet."""
        with self.transaction():
            self.execute(
                'UPDATE corrections SET corrected = ?, rejected = ? WHERE id = ?',
                corrected, rejected, correction_id)

    def confirm(self, record: CorrectionRecord) -> None:
        """Make a PROPOSED correction one to be learned, with the texts of ``record``."""
        with self.transaction():
            self.propose(record.id, record.corrected, record.rejected)
            self.set_correction(record.id, record.state)

    def unanswered_hints(self) -> tuple[CorrectionRecord, ...]:
        """Return the hints whose answer is not known yet, oldest first."""
        return self._select("state = ? AND corrected = ''", int(CorrectionState.PROPOSED))

    def supersede(self, newer: CorrectionRecord) -> tuple[str, ...]:
        """
        Mark earlier corrections of the same prompt and profile as SUPERSEDED.

        So is the one that ``newer`` replaces, whose question has other words; that is noted. A
        pending correction passes on what it replaces. Returns the ids of those that were pending
        or learned, oldest first.
        """
        with self.transaction():
            pending = self.one(
                f"SELECT replaces FROM corrections WHERE {_SAME_PROMPT} AND replaces != '' "
                f'AND state IN {PENDING_SQL} AND id != ? ORDER BY number DESC',
                *_prompt_key(newer), newer.id)
            ids = tuple(row['id'] for row in self.rows(
                f'SELECT id FROM corrections WHERE (({_SAME_PROMPT}) OR id = ?) '
                f'AND {_PENDING_OR_LEARNED} AND number < '
                '(SELECT number FROM corrections WHERE id = ?) ORDER BY number',
                *_prompt_key(newer), newer.replaces, newer.id))
            replaces = (newer.replaces if newer.replaces in ids
                        else '' if pending is None else pending['replaces'])
            if replaces:
                self.execute(
                    'UPDATE corrections SET replaces = ? WHERE id = ?', replaces, newer.id)
            self.execute(
                'UPDATE corrections SET state = ?, reason = ? '
                'WHERE id IN (SELECT value FROM json_each(?))',
                int(CorrectionState.SUPERSEDED), f'by correction {newer.id}', as_json(ids))
        return ids

    def newer_than(self, other: CorrectionRecord) -> str:
        """
        Return the id of a pending or learned correction of the same prompt received later.

        '' if there is none. ``other`` comes from another journal, so the wall clocks of both
        robots are all there is to compare.
        """
        row = self.one(
            f'SELECT id FROM corrections WHERE {_SAME_PROMPT} AND {_PENDING_OR_LEARNED} '
            'AND received > ? ORDER BY number DESC', *_prompt_key(other), other.received)
        return '' if row is None else str(row['id'])

    def correction(self, correction_id: str) -> CorrectionRecord | None:
        """Return a correction by its id."""
        row = self.one('SELECT * FROM corrections WHERE id = ?', correction_id)
        return None if row is None else _correction(row)

    def set_correction(
        self, correction_id: str, state: CorrectionState, reason: str = '',
        adapter_version: int = 0, *, if_pending: bool = False,
    ) -> bool:
        """
        Set the state of a correction; return False if its id is not on record.

        With ``if_pending``, a correction that is not pending is left alone, and False returned.
        """
        condition = f'AND state IN {PENDING_SQL}' if if_pending else ''
        with self.transaction():
            cursor = self.execute(
                'UPDATE corrections SET state = ?, reason = ?, adapter_version = ? '
                f'WHERE id = ? {condition}',
                int(state), reason, adapter_version, correction_id)
        return cursor.rowcount == 1

    def mark_learned(self, ids: Collection[str], version: int) -> tuple[str, ...]:
        """Make those of these corrections that are pending LEARNED; return their ids."""
        with self.transaction():
            learned = tuple(row['id'] for row in self.rows(
                f'SELECT id FROM corrections WHERE state IN {PENDING_SQL} '
                'AND id IN (SELECT value FROM json_each(?)) ORDER BY number', as_json(list(ids))))
            for correction_id in learned:
                self.set_correction(
                    correction_id, CorrectionState.LEARNED, adapter_version=version)
        return learned

    def corrections(self, profile: str | None = None) -> tuple[CorrectionRecord, ...]:
        """Return the corrections of a profile, or of all profiles, oldest first."""
        return self._select('profile = coalesce(?, profile)', profile)

    def pending(self, profile: str | None = None) -> tuple[CorrectionRecord, ...]:
        """Return the corrections still to be learned, oldest first."""
        return self._select(f'state IN {PENDING_SQL} AND profile = coalesce(?, profile)', profile)

    def learned(self, profile: str) -> tuple[CorrectionRecord, ...]:
        """Return the corrections that are live in the profile's version, oldest first."""
        return self._select('state = ? AND profile = ?', int(CorrectionState.LEARNED), profile)

    def replaced_later(self, profile: str) -> tuple[CorrectionRecord, ...]:
        """Return the trained corrections that a pending one is to replace, oldest first."""
        return self._select(
            'profile = ? AND state = ? AND adapter_version > 0 AND EXISTS ('
            'SELECT 1 FROM corrections AS p WHERE p.profile = corrections.profile '
            'AND (p.replaces = corrections.id OR (p.question = corrections.question '
            'AND p.prompt_ids = corrections.prompt_ids)) '
            f'AND p.state IN {PENDING_SQL})', profile, int(CorrectionState.SUPERSEDED))

    def trained(self, profile: str) -> tuple[CorrectionRecord, ...]:
        """Return the corrections that some version was trained on, live or not, oldest first."""
        return self._select(
            f'profile = ? AND adapter_version > 0 AND state NOT IN {PENDING_SQL}', profile)

    def trained_links(self, profile: str) -> list[CorrectionLink]:
        """Return what decides about the states of :meth:`trained` corrections, oldest first."""
        states = {int(state): state for state in CorrectionState}
        return [CorrectionLink(i, prompt, replaces, states[state], reason, version)
                for i, prompt, replaces, state, reason, version in self.rows(
                    'SELECT id, prompt_ids, replaces, state, reason, adapter_version '
                    'FROM corrections WHERE profile = ? AND adapter_version > 0 '
                    f'AND state NOT IN {PENDING_SQL} ORDER BY number', profile)]

    def corrections_of(self, query_ids: Collection[str]) -> tuple[CorrectionRecord, ...]:
        """Return the corrections of the answers to these queries, oldest first."""
        return self._select(
            'query_id IN (SELECT value FROM json_each(?))', as_json(list(query_ids)))

    def corrections_by_id(self, ids: Collection[str]) -> tuple[CorrectionRecord, ...]:
        """Return those of these corrections that are on record, oldest first."""
        return self._select('id IN (SELECT value FROM json_each(?))', as_json(list(ids)))

    def limit_corrections(self, max_corrections: int) -> Deleted:
        """
        Delete the oldest finished corrections above ``max_corrections``.

        Those in no live version go first, then the learned ones. Raises
        :class:`InvalidCorrection` if too many are pending, or are hints without an answer yet:
        these are never deleted.
        """
        row = self.one('SELECT count(*) FROM corrections')
        surplus = (row[0] if row is not None else 0) - max_corrections
        if surplus <= 0:
            return Deleted()
        finished = tuple(row['id'] for row in self.rows(
            f'SELECT id FROM corrections WHERE state NOT IN {PENDING_SQL} '
            "AND NOT (state = ? AND corrected = '') ORDER BY state = ?, number LIMIT ?",
            int(CorrectionState.PROPOSED), int(CorrectionState.LEARNED), surplus))
        if len(finished) < surplus:
            raise InvalidCorrection(
                counted(max_corrections, 'correction waits', 'corrections wait')
                + ' already (storage.max_corrections)')
        deleted = self.forget_corrections(finished, keep_pending_answers=True)
        self.execute('DELETE FROM deleted_questions WHERE number NOT IN ('
                     'SELECT number FROM deleted_questions ORDER BY number DESC LIMIT ?)',
                     max_corrections)
        return deleted

    def forget_corrections(
            self, ids: Collection[str], *, keep_pending_answers: bool = False) -> Deleted:
        """
        Delete corrections, those that they have superseded, and all answers to their questions.

        The superseded ones go too, unless another correction has superseded them as well: a
        rollback would make them LEARNED again. So do the answers: without its correction, a wrong
        answer would be replayed as a right one. ``keep_pending_answers`` keeps answers that another
        pending correction refers to. What a version has learned it still knows, so a hash of the
        question is kept.
        """
        with self.transaction():
            deleted = self._to_delete(set(ids))
            self.exclude_questions(deleted.questions)
            deleted_ids = as_json([record.id for record in deleted.records])
            self.execute(
                'DELETE FROM answers WHERE number IN (SELECT a.number FROM answers AS a '
                'JOIN corrections AS c ON c.id IN (SELECT value FROM json_each(?1)) '
                'AND (a.query_id = c.query_id '
                'OR (a.profile = c.profile AND a.question = c.question))) '
                'AND NOT (?2 AND query_id IN (SELECT query_id FROM corrections '
                f'WHERE state IN {PENDING_SQL} AND id NOT IN (SELECT value FROM json_each(?1))))',
                deleted_ids, keep_pending_answers)
            self.execute(
                'DELETE FROM corrections WHERE id IN (SELECT value FROM json_each(?))', deleted_ids)
        return deleted

    def _to_delete(self, given: set[str]) -> Deleted:
        """Return what is to be deleted with the given corrections."""
        found = tuple(map(_correction, self.rows(
            _WITH_SUPERSEDED, as_json(list(given)), int(CorrectionState.SUPERSEDED))))
        found_ids = as_json([record.id for record in found])
        records = tuple(record for record in found
                        if record.id in given or not self._is_replaced(record, found_ids))
        # An import does not tell which of the superseded ones its versions have learned.
        trained = any(record.adapter_version for record in records)
        return Deleted(records, tuple(
            (record.profile, wording) for record in records
            if record.adapter_version or (trained and record.state is CorrectionState.SUPERSEDED)
            for wording in wording_keys(record.messages)))

    def deleted_questions(self, profile: str) -> set[str]:
        """Return the wordings of the questions whose corrections were deleted after training."""
        return {row['wording'] for row in self.rows(
            'SELECT wording FROM deleted_questions WHERE profile = ?', profile)}

    def exclude_questions(self, questions: Iterable[tuple[str, str]]) -> None:
        """Add pairs of a profile and a wording to the :meth:`deleted_questions`."""
        for profile, wording in questions:
            self.insert('INSERT OR REPLACE', 'deleted_questions',
                        profile=profile, wording=wording)

    def _is_replaced(self, record: CorrectionRecord, except_for: str) -> bool:
        """Return whether a pending or learned correction supersedes it, ``except_for`` some ids."""
        return self.one(
            f'SELECT 1 FROM corrections WHERE {_PENDING_OR_LEARNED} AND id IN ({_WITH_NEWER})',
            record.id, except_for) is not None

    def _select(self, where: str, *values: object) -> tuple[CorrectionRecord, ...]:
        return tuple(map(_correction, self.rows(
            f'SELECT * FROM corrections WHERE {where} ORDER BY number', *values)))


def _prompt_key(record: CorrectionRecord) -> tuple[str, str, str]:
    return (record.profile, question_key(record.messages, record.prompt_ids),
            as_json(record.prompt_ids))


def _correction(row: sqlite3.Row) -> CorrectionRecord:
    values = record_fields(row)
    return CorrectionRecord(**values | {'state': CorrectionState(values['state'])})
