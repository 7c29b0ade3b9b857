# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The answers in the journal: for corrections, for replay, and to compare adapter versions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
import json
import os
import sqlite3

from mace_ros.store.journal_file import JournalFile
from mace_ros.store.records import AnswerOutcome, AnswerRecord, as_json, question_key
from mace_ros.store.rows import PENDING_SQL, record_fields

MAX_ANSWERS = 10000
# Several sets of anchors: a chat template that contains the date makes new prompts every day.
MAX_BASE_ANSWERS = 500


class AnswerTable(JournalFile):
    """
    The tables ``answers`` and ``base_answers``.

    The newest ``max_answers`` answers are kept, and older ones that a pending correction
    refers to.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_answers: int = MAX_ANSWERS) -> None:
        """Open the journal at ``path``, creating it and its folder if necessary."""
        super().__init__(path)
        self._max_answers = max_answers

    def record_answer(self, answer: AnswerRecord, *, given_now: bool = True) -> None:
        """
        Record an answer, replacing one of the same query id, and delete surplus old ones.

        With ``given_now``, earlier corrections of that query id are detached: they corrected
        another answer.
        """
        with self.transaction():
            if given_now:
                self.execute("UPDATE corrections SET query_id = '' WHERE query_id = ?",
                             answer.query_id)
            # REPLACE assigns a new row number: a reused id becomes the newest answer.
            number = self.insert(
                'INSERT OR REPLACE', 'answers',
                query_id=answer.query_id, conversation_id=answer.conversation_id,
                profile=answer.profile, prompt_ids=as_json(answer.prompt_ids),
                messages=as_json(answer.messages), text=answer.text,
                output_ids=as_json(answer.output_ids), lineage=answer.lineage,
                adapter_version=answer.adapter_version,
                matched_correction_id=answer.matched_correction_id,
                out_of_scope=answer.out_of_scope, similarity=answer.similarity,
                no_learn=answer.no_learn, time=answer.time,
                tools=as_json(answer.tools), calls_tool=answer.calls_tool,
                question=question_key(answer.messages, answer.prompt_ids))
            self.execute(
                'DELETE FROM answers WHERE number <= ? AND query_id NOT IN ('
                f'SELECT query_id FROM corrections WHERE state IN {PENDING_SQL})',
                number - self._max_answers)

    def answer(self, query_id: str) -> AnswerRecord | None:
        """Return the answer to a query, None if it is not on record."""
        row = self.one('SELECT * FROM answers WHERE query_id = ?', query_id)
        return None if row is None else _answer(row)

    def last_answer(self, conversation_id: str) -> AnswerRecord | None:
        """Return the newest answer of a conversation; the empty id is no conversation."""
        row = self.one(
            "SELECT * FROM answers WHERE conversation_id = ? AND conversation_id <> '' "
            'ORDER BY number DESC LIMIT 1', conversation_id)
        return None if row is None else _answer(row)

    def answers(self, profile: str | None = None) -> tuple[AnswerRecord, ...]:
        """Return the answers of a profile, or of all profiles, oldest first."""
        return tuple(map(_answer, self.rows(
            'SELECT * FROM answers WHERE profile = coalesce(?, profile) ORDER BY number', profile)))

    def forget_answers(self, query_ids: Collection[str]) -> set[str]:
        """Delete answers; return the ids of those that were on record."""
        among = 'query_id IN (SELECT value FROM json_each(?))'
        with self.transaction():
            found = self.rows(f'SELECT query_id FROM answers WHERE {among}',
                              as_json(list(query_ids)))
            self.execute(f'DELETE FROM answers WHERE {among}', as_json(list(query_ids)))
        return {row['query_id'] for row in found}

    def replay_candidates(
        self, profile: str, limit: int, *, calls_tool: bool = False,
    ) -> tuple[AnswerRecord, ...]:
        """
        Return up to ``limit`` answers of a profile that seem to be right.

        Newest first, one per question. Excluded are answers with ``no_learn``, and those to a
        question that was ever corrected in this profile: a wrong answer is often given several
        times but corrected once. With ``calls_tool``, only answers that call a tool are returned.
        """
        return tuple(map(_answer, self.rows(
            'SELECT * FROM answers WHERE number IN ('
            'SELECT max(number) FROM answers AS a WHERE profile = ? AND no_learn = 0 '
            'AND calls_tool >= ? '
            'AND NOT EXISTS (SELECT 1 FROM corrections AS c WHERE c.query_id = a.query_id) '
            'AND NOT EXISTS (SELECT 1 FROM corrections AS c '
            'WHERE c.profile = a.profile AND c.question = a.question) '
            'GROUP BY question ORDER BY 1 DESC LIMIT ?) ORDER BY number DESC',
            profile, calls_tool, max(limit, 0))))

    def answer_outcomes(self, profile: str, limit: int) -> tuple[AnswerOutcome, ...]:
        """
        Return whether each of the newest ``limit`` answers was corrected, oldest first.

        These are the answers of the profile's own versions, and those that the robot's
        version gave to this profile. Answers with ``no_learn`` are excluded, and so are those to
        questions outside the scope of the profile's version: they say nothing about it.
        """
        rows = self.rows(
            'SELECT query_id, question, lineage, adapter_version, EXISTS ('
            'SELECT 1 FROM corrections AS c WHERE c.query_id = a.query_id) AS corrected '
            "FROM answers AS a WHERE no_learn = 0 AND (lineage = ?1 OR (lineage = '' "
            'AND profile = ?1)) AND (out_of_scope = 0 OR (lineage = ?1 AND adapter_version > 0)) '
            'ORDER BY number DESC LIMIT ?2', profile, limit)
        return tuple(
            AnswerOutcome(row['query_id'], row['question'], row['lineage'],
                          row['adapter_version'], bool(row['corrected']))
            for row in reversed(rows))

    def record_base_answer(
            self, model: str, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Record an answer of this base model; delete surplus old ones and other models'."""
        with self.transaction():
            number = self.insert(
                'INSERT OR REPLACE', 'base_answers', prompt_ids=as_json(prompt_ids),
                output_ids=as_json(output_ids), model=model)
            self.execute('DELETE FROM base_answers WHERE model <> ? OR rowid <= ?',
                         model, number - MAX_BASE_ANSWERS)

    def base_answers(self, model: str) -> dict[tuple[int, ...], list[int]]:
        """Return the output ids of this base model by the prompt ids."""
        return {tuple(json.loads(row['prompt_ids'])): json.loads(row['output_ids'])
                for row in self.rows('SELECT * FROM base_answers WHERE model = ?', model)}


def _answer(row: sqlite3.Row) -> AnswerRecord:
    values = record_fields(row)
    return AnswerRecord(**values | {
        name: bool(values[name]) for name in ('no_learn', 'out_of_scope', 'calls_tool')})
