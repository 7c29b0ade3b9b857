# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Answers and corrections as the journal records them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mace_ros.cli.journal_admin import opened
from mace_ros.store.journal import Journal
from mace_ros.store.records import AnswerRecord, CorrectionRecord


def answer(query_id: str, question: str = '', **fields: object) -> AnswerRecord:
    """Return an answer to ``question``, by default to a unique one."""
    content = question or f'question {query_id}'
    record = AnswerRecord(
        query_id=query_id, prompt_ids=tuple(content.encode()),
        messages=({'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': content}),
        text=f'answer {query_id}', output_ids=(1, 2, 49151))
    return replace(record, **fields)  # type: ignore[arg-type]


def correction(name: str, question: str = '', **fields: object) -> CorrectionRecord:
    """Return a correction of ``question``, by default of a unique one."""
    content = question or f'question of {name}'
    record = CorrectionRecord(
        id=name, prompt_ids=tuple(content.encode()),
        messages=({'role': 'user', 'content': content},), rejected='wrong', corrected='right')
    return replace(record, **fields)  # type: ignore[arg-type]


def accepting(name: str, question: str = '') -> Callable[[Journal], bool]:
    """Return a function that accepts a correction, for :class:`JournalWriter`."""
    return lambda journal: journal.accept(correction(name, question))


def replayed_and_bad(folder: Path) -> tuple[set[str], set[str]]:
    """Return which answers of a running node may be replayed as right ones, and which were bad."""
    with opened(folder / 'storage') as journal:
        return ({a.query_id for a in journal.replay_candidates('', 1000)},
                {o.query_id for o in journal.answer_outcomes('', 1000) if o.corrected})
