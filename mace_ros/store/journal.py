# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The robot's durable memory of answers, corrections and adapter versions.

One SQLite file in WAL mode with ``synchronous=FULL``: what a method of :class:`Journal`
has written is on disk when it returns. ROS callbacks and the device thread must not wait
for that; they use :class:`mace_ros.store.journal_writer.JournalWriter`.

Order is that of insertion, never of time stamps: a robot without a battery-backed clock
may start in 1970 and jump.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
import hashlib
import json
import math
import os
import sqlite3
from typing import Any, TypeAlias

from mace_ros.api.events import CorrectionState, VersionState
from mace_ros.store.journal_file import JournalFile
from mace_ros.store.lineage import Lineage

Messages: TypeAlias = tuple[Mapping[str, str], ...]
"""A prompt as the chat template takes it: each mapping has ``role`` and ``content``."""

MAX_ANSWERS = 10000
# Some sets of them: chat templates that tell the date make other prompts each day.
MAX_BASE_ANSWERS = 500

PENDING = (CorrectionState.ACCEPTED, CorrectionState.TRAINING)
# Constants of ours, so they can stand in the SQL text.
PENDING_SQL = f'({", ".join(str(int(state)) for state in PENDING)})'
# What is pending or learned of the prompt that :func:`_prompt_of` describes.
_OF_SAME_PROMPT = (f'profile = ? AND question = ? AND prompt_ids = ? AND (state IN {PENDING_SQL} '
                   f'OR state = {int(CorrectionState.LEARNED)})')


@dataclass(frozen=True)
class AnswerRecord:
    """An answer that was given; ``time`` is wall-clock seconds since the epoch."""

    query_id: str
    prompt_ids: tuple[int, ...]
    messages: Messages
    text: str
    output_ids: tuple[int, ...]
    conversation_id: str = ''
    profile: str = ''
    lineage: str = ''           # the profile whose version answered: this one, or the robot's
    adapter_version: int = 0
    no_learn: bool = False
    time: float = 0.0


@dataclass(frozen=True)
class CorrectionRecord:
    """
    A correction with the exact prompt it is about, so that it needs no other row.

    ``received`` is wall-clock seconds since the epoch; ``adapter_version`` is set with
    LEARNED, and stays when the correction is superseded or its version taken back later.
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


@dataclass(frozen=True)
class VersionRecord:
    """
    A trained version of a profile's adapter; unknown scores are NaN.

    ``path`` is relative to the storage folder, so that the folder can be moved;
    ``created`` is wall-clock seconds since the epoch.
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


class Journal(JournalFile):
    """
    The journal file at ``path``, opened or made; for one thread.

    At most ``max_answers`` answers are kept, plus older ones that a correction not yet
    learned refers to. Every method raises :class:`JournalError` if the disk fails; it has
    then changed nothing.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_answers: int = MAX_ANSWERS) -> None:
        """Open the journal, making the file and its folder if need be."""
        super().__init__(path)
        self._max_answers = max_answers

    def __enter__(self) -> Journal:
        """Return the journal itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the journal."""
        self.close()

    # Answers

    def record_answer(self, answer: AnswerRecord, *, given_now: bool = True) -> None:
        """
        Record an answer (again, if its query id was used before) and forget old ones.

        Whatever was corrected before one is ``given_now`` was another answer.
        """
        with self.transaction():
            if given_now:
                self.execute("UPDATE corrections SET query_id = '' WHERE query_id = ?",
                             answer.query_id)
            # REPLACE gives the row a new number: an id used again is the newest answer.
            number = self.insert(
                'INSERT OR REPLACE', 'answers',
                query_id=answer.query_id, conversation_id=answer.conversation_id,
                profile=answer.profile, prompt_ids=as_json(answer.prompt_ids),
                messages=as_json(answer.messages), text=answer.text,
                output_ids=as_json(answer.output_ids), lineage=answer.lineage,
                adapter_version=answer.adapter_version, no_learn=answer.no_learn, time=answer.time,
                question=_question(answer.messages, answer.prompt_ids))
            self.execute(
                'DELETE FROM answers WHERE number <= ? AND query_id NOT IN ('
                f'SELECT query_id FROM corrections WHERE state IN {PENDING_SQL})',
                number - self._max_answers)

    def answer(self, query_id: str) -> AnswerRecord | None:
        """Return the answer to that query, if it is still kept."""
        row = self.one('SELECT * FROM answers WHERE query_id = ?', query_id)
        return None if row is None else _answer(row)

    def last_answer(self, conversation_id: str) -> AnswerRecord | None:
        """Return the newest answer of that conversation; the empty id is no conversation."""
        row = self.one(
            "SELECT * FROM answers WHERE conversation_id = ? AND conversation_id <> '' "
            'ORDER BY number DESC LIMIT 1', conversation_id)
        return None if row is None else _answer(row)

    def answers(self, profile: str | None = None) -> tuple[AnswerRecord, ...]:
        """Return all answers that are kept, oldest first; None is all profiles."""
        return tuple(map(_answer, self.rows(
            'SELECT * FROM answers WHERE profile = coalesce(?, profile) ORDER BY number', profile)))

    def record_base_answer(
            self, model: str, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Record what this base model answers; forget old ones, and what another one did."""
        with self.transaction():
            number = self.insert(
                'INSERT OR REPLACE', 'base_answers', prompt_ids=as_json(prompt_ids),
                output_ids=as_json(output_ids), model=model)
            self.execute('DELETE FROM base_answers WHERE model <> ? OR rowid <= ?',
                         model, number - MAX_BASE_ANSWERS)

    def base_answers(self, model: str) -> dict[tuple[int, ...], list[int]]:
        """Return what this base model has answered, by the prompts' ids."""
        return {tuple(json.loads(row['prompt_ids'])): json.loads(row['output_ids'])
                for row in self.rows('SELECT * FROM base_answers WHERE model = ?', model)}

    def replay_candidates(
        self, profile: str, limit: int, exclude_query_ids: Collection[str] = (),
    ) -> tuple[AnswerRecord, ...]:
        """
        Return up to ``limit`` earlier answers of that profile which seem to be right.

        Newest first, one per question. Left out: answers with ``no_learn``, those in
        ``exclude_query_ids``, those that a correction refers to, and those to a question
        that was ever corrected in this profile, for a wrong answer is often given twice
        but corrected once.
        """
        return tuple(map(_answer, self.rows(
            'SELECT * FROM answers WHERE number IN ('
            'SELECT max(number) FROM answers AS a WHERE profile = ? AND no_learn = 0 '
            'AND query_id NOT IN (SELECT value FROM json_each(?)) '
            'AND NOT EXISTS (SELECT 1 FROM corrections AS c WHERE c.query_id = a.query_id) '
            'AND NOT EXISTS (SELECT 1 FROM corrections AS c '
            'WHERE c.profile = a.profile AND c.question = a.question) '
            'GROUP BY question ORDER BY 1 DESC LIMIT ?) ORDER BY number DESC',
            profile, as_json(list(exclude_query_ids)), max(limit, 0))))

    # Corrections

    def accept(self, record: CorrectionRecord) -> bool:
        """Keep a correction; return False, changing nothing, if its id is known already."""
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
                adapter_version=record.adapter_version,
                question=_question(record.messages, record.prompt_ids))
            if record.profile:
                # What the robot serves now is where a new profile's own versions begin; anew, if
                # nothing came of what it was corrected before.
                self.execute(
                    'INSERT INTO profiles (profile, fork) VALUES '
                    "(?1, coalesce((SELECT live_version FROM profiles WHERE profile = ''), 0)) "
                    'ON CONFLICT (profile) DO UPDATE SET fork = excluded.fork '
                    'WHERE live_version = 0 AND (fork IS NULL OR NOT EXISTS ('
                    'SELECT 1 FROM corrections AS c WHERE c.profile = ?1 AND c.id <> ?2 '
                    f'AND c.state IN {PENDING_SQL}))', record.profile, record.id)
        return True

    def supersede(self, newer: CorrectionRecord) -> tuple[str, ...]:
        """
        Mark as SUPERSEDED whatever said otherwise about the same prompt in the same profile.

        Returns the ids of those that were pending or learned, oldest first.
        """
        with self.transaction():
            ids = tuple(row['id'] for row in self.rows(
                f'SELECT id FROM corrections WHERE {_OF_SAME_PROMPT} AND id <> ? ORDER BY number',
                *_prompt_of(newer), newer.id))
            self.execute(
                'UPDATE corrections SET state = ?, reason = ? '
                'WHERE id IN (SELECT value FROM json_each(?))',
                int(CorrectionState.SUPERSEDED), f'by correction {newer.id}', as_json(ids))
        return ids

    def newer_than(self, other: CorrectionRecord) -> str:
        """
        Return the id of a correction of the same prompt and profile, received later than another.

        It is pending or learned; '' if there is none. By the clocks of both, for want of
        anything better: the other one comes from another journal.
        """
        row = self.one(
            f'SELECT id FROM corrections WHERE {_OF_SAME_PROMPT} AND received > ? '
            'ORDER BY number DESC', *_prompt_of(other), other.received)
        return '' if row is None else str(row['id'])

    def correction(self, correction_id: str) -> CorrectionRecord | None:
        """Return the correction of that id."""
        row = self.one('SELECT * FROM corrections WHERE id = ?', correction_id)
        return None if row is None else correction_from(row)

    def set_correction(
        self, correction_id: str, state: CorrectionState, reason: str = '',
        adapter_version: int = 0, *, if_pending: bool = False,
    ) -> bool:
        """
        Write what became of a correction; return False if there is none of that id.

        Nor, ``if_pending``, one that is still to be learned.
        """
        condition = f'AND state IN {PENDING_SQL}' if if_pending else ''
        with self.transaction():
            cursor = self.execute(
                'UPDATE corrections SET state = ?, reason = ?, adapter_version = ? '
                f'WHERE id = ? {condition}',
                int(state), reason, adapter_version, correction_id)
        return cursor.rowcount == 1

    def corrections(self, profile: str | None = None) -> tuple[CorrectionRecord, ...]:
        """Return all corrections that are kept, oldest first; None is all profiles."""
        return self._corrections('profile = coalesce(?, profile)', profile)

    def pending(self, profile: str | None = None) -> tuple[CorrectionRecord, ...]:
        """Return what is still to be learned, oldest first; None is all profiles."""
        return self._corrections(
            f'state IN {PENDING_SQL} AND profile = coalesce(?, profile)', profile)

    def learned(self, profile: str) -> tuple[CorrectionRecord, ...]:
        """Return the corrections that are live in the profile's version, oldest first."""
        return self._corrections(
            'state = ? AND profile = ?', int(CorrectionState.LEARNED), profile)

    def held_by(self, version: VersionRecord | None) -> tuple[CorrectionRecord, ...]:
        """
        Return the corrections that a live version was taught; None is the base model.

        Those of the robot's version that a profile has begun from come before its own.
        """
        if version is None:
            return ()
        own = tuple(c for c in self.learned(version.profile)
                    if c.adapter_version <= version.version)
        if not version.profile:
            return own
        row = self.one('SELECT fork FROM profiles WHERE profile = ?', version.profile)
        robots = Lineage(self.versions(''), row['fork'] or 0 if row is not None else 0)
        return *(c for c in self.learned('') if robots.holds(c.adapter_version)), *own

    # Versions

    def next_version(self, profile: str) -> int:
        """
        Reserve and return a version number that this profile never had.

        It stays taken, whether its version is published, rejected or lost in a crash.
        """
        with self.transaction():
            self.execute(
                'INSERT INTO profiles (profile, last_version) VALUES (?, 1) '
                'ON CONFLICT (profile) DO UPDATE SET last_version = last_version + 1', profile)
            row = self.one('SELECT last_version FROM profiles WHERE profile = ?', profile)
            assert row is not None
            return int(row['last_version'])

    def record_version(self, record: VersionRecord) -> None:
        """Record a version without making it live, such as a rejected one."""
        if record.version < 1:
            raise ValueError(f'version {record.version}: 1 is the first after the base model')
        with self.transaction():
            if self.one('SELECT 1 FROM versions WHERE profile = ? AND version = ?',
                         record.profile, record.version) is not None:
                raise ValueError(
                    f'version {record.version} of profile {record.profile!r} is already in the '
                    'journal; take a new number from next_version()')
            self.insert(
                'INSERT', 'versions',
                profile=record.profile, version=record.version, parent=record.parent,
                state=int(record.state), reason=record.reason,
                correction_ids=as_json(record.correction_ids),
                score_before=record.score_before, score_after=record.score_after,
                train_tokens=record.train_tokens, train_seconds=record.train_seconds,
                path=record.path, sha256=record.sha256, created=record.created)
            self.execute(
                'INSERT INTO profiles (profile, last_version) VALUES (?, ?) '
                'ON CONFLICT (profile) DO UPDATE '
                'SET last_version = max(last_version, excluded.last_version)',
                record.profile, record.version)

    def publish(self, record: VersionRecord) -> tuple[str, ...]:
        """
        Record a version, make it live and its corrections LEARNED, all or nothing.

        Returns the ids of the corrections that became LEARNED: one that was superseded
        while it was trained on stays so.
        """
        if record.state is not VersionState.PUBLISHED:
            raise ValueError(f'version {record.version} is {record.state.name}, not PUBLISHED')
        with self.transaction():
            self.record_version(record)
            # Where next_parent() has let its line begin, if nothing was corrected since a rollback.
            self.execute(
                'UPDATE profiles SET live_version = ?1, fork = coalesce(fork, '
                "(SELECT live_version FROM profiles WHERE profile = '' AND ?2 <> ''), 0) "
                'WHERE profile = ?2', record.version, record.profile)
            self.execute(
                'UPDATE versions SET fork = (SELECT fork FROM profiles WHERE profile = ?1) '
                'WHERE profile = ?1 AND version = ?2', record.profile, record.version)
            learned = tuple(row['id'] for row in self.rows(
                f'SELECT id FROM corrections WHERE state IN {PENDING_SQL} '
                'AND id IN (SELECT value FROM json_each(?)) ORDER BY number',
                as_json(record.correction_ids)))
            for correction_id in learned:
                self.set_correction(
                    correction_id, CorrectionState.LEARNED, adapter_version=record.version)
        return learned

    def live(self, profile: str) -> VersionRecord | None:
        """Return the version that the profile serves; None is the base model."""
        return next((record for record in self.lives() if record.profile == profile), None)

    def next_parent(self, profile: str) -> VersionRecord | None:
        """
        Return what the profile's next version starts from; None is the base model.

        That is its live version; for a profile that has none, the robot's version that was
        live when it was first corrected.
        """
        row = self.one(
            "SELECT versions.* FROM profiles JOIN versions ON versions.profile = '' "
            'AND version = coalesce(profiles.fork, (SELECT live_version FROM profiles '
            "WHERE profile = '')) WHERE profiles.profile = ? AND live_version = 0", profile)
        return self.live(profile) if row is None else version_from(row)

    def lives(self) -> tuple[VersionRecord, ...]:
        """Return the live version of each profile that has one."""
        return tuple(map(version_from, self.rows(
            'SELECT versions.* FROM versions JOIN profiles USING (profile) '
            'WHERE version = live_version ORDER BY profile')))

    def versions(self, profile: str | None = None) -> tuple[VersionRecord, ...]:
        """Return all recorded versions, oldest first; None is all profiles."""
        return tuple(map(version_from, self.rows(
            'SELECT * FROM versions WHERE profile = coalesce(?, profile) '
            'ORDER BY profile, version', profile)))

    def _corrections(self, where: str, *values: object) -> tuple[CorrectionRecord, ...]:
        return tuple(map(correction_from, self.rows(
            f'SELECT * FROM corrections WHERE {where} ORDER BY number', *values)))


def _question(messages: Messages, prompt_ids: Sequence[int]) -> str:
    """Return a short key, the same for prompts that end in the same question."""
    asked = [message['content'] for message in messages if message['role'] == 'user']
    text = ' '.join(asked[-1].casefold().split()) if asked else as_json(prompt_ids)
    return hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()


def _prompt_of(record: CorrectionRecord) -> tuple[str, str, str]:
    return (record.profile, _question(record.messages, record.prompt_ids),
            as_json(record.prompt_ids))


def as_json(value: object) -> str:
    """Return the text in which lists are kept."""
    return json.dumps(value, separators=(',', ':'))


def _columns(row: sqlite3.Row) -> dict[str, Any]:
    """Return the fields of the record that the row was made of."""
    values = dict(row)
    for name in values.keys() & {'prompt_ids', 'messages', 'output_ids', 'correction_ids'}:
        values[name] = tuple(json.loads(values[name]))
    for name in values.keys() & {'number', 'question', 'fork'}:
        del values[name]
    return values


def _answer(row: sqlite3.Row) -> AnswerRecord:
    values = _columns(row)
    return AnswerRecord(**values | {'no_learn': bool(values['no_learn'])})


def correction_from(row: sqlite3.Row) -> CorrectionRecord:
    """Return the correction of a row."""
    values = _columns(row)
    return CorrectionRecord(**values | {'state': CorrectionState(values['state'])})


def version_from(row: sqlite3.Row) -> VersionRecord:
    """Return the version of a row."""
    values = _columns(row)
    for name in ('score_before', 'score_after'):
        # SQLite keeps NaN as NULL.
        values[name] = math.nan if values[name] is None else values[name]
    return VersionRecord(**values | {'state': VersionState(values['state'])})
