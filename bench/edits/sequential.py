# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Edits one after the other.

Each is measured just after it was learned, and all are in the end. Before the first one, the model
answers the questions that no edit may change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from bench.edits.edit_set import Edit
from bench.edits.edited_model import EditedModel, Learned
from bench.edits.unrelated import Unrelated

Row = dict[str, Any]


def measure(model: EditedModel, edits: Sequence[Edit], unrelated: Sequence[Unrelated], *,
            at_once: bool, restart_after: int, say: Callable[[str], None],
            ) -> tuple[list[Row], list[Row]]:
    """
    Teach the edits; return a sample of each edit, and of each unrelated question.

    A model that learns all edits ``at_once`` has no answers in between. After ``restart_after``
    edits the model is restarted; 0: never.
    """
    before = near_answers(model, edits)
    questions = [question for _, question in unrelated]
    others = [{'kind': kind, 'question': question, 'before': reply.text}
              for (kind, question), reply in zip(unrelated, model.ask(questions), strict=True)]
    say(f'{len(before) + len(others)} questions answered before the first edit')
    rows = [sample(edit, before) for edit in edits]
    if at_once:
        for row, learned in zip(rows, model.learn(edits), strict=True):
            row |= asdict(learned)
    else:
        first_of = 'new robot'
        for number, (edit, row) in enumerate(zip(edits, rows, strict=True)):
            if number and number == restart_after:
                model.restart()
                first_of = 'restart'
            learned = learn_one(model, edit, row, first_of)
            first_of = first_of if learned.seconds is None else ''
            ask_all(model, [row], 'now')
            say(f'{number + 1}/{len(edits)} {told(learned)} {row["now"]!r}')
    ask_all(model, rows, 'end')
    for row, reply in zip(others, model.ask(questions), strict=True):
        row['end'] = reply.text
    return rows, others


def sample(edit: Edit, before: dict[str, str]) -> Row:
    """Return the sample of an edit that was not learned yet."""
    return {'prompt': edit.prompt, 'target': edit.target, 'rephrase': edit.rephrase,
            'near_miss': edit.near_miss, 'near_before': before.get(edit.near_miss, '')}


def learn_one(model: EditedModel, edit: Edit, row: Row, first_of: str) -> Learned:
    """Teach an edit and complete its sample; ``first_of`` says what it is the first edit of."""
    [learned] = model.learn([edit])
    row |= {'first_of': '' if learned.seconds is None else first_of, **asdict(learned)}
    return learned


def near_answers(model: EditedModel, edits: Sequence[Edit]) -> dict[str, str]:
    """Return the answers to the near misses of edits."""
    questions = [edit.near_miss for edit in edits if edit.near_miss]
    replies = model.ask(questions)
    return {question: reply.text for question, reply in zip(questions, replies, strict=True)}


def ask_all(model: EditedModel, rows: Sequence[Row], when: str) -> None:
    """Ask the questions of edits; ``when`` begins the names of the columns."""
    asked = [(row, question, column) for row in rows for question, column in (
        ('prompt', when), ('rephrase', f'{when}_rephrase'), ('near_miss', f'{when}_near'))
        if row[question]]
    replies = model.ask([row[question] for row, question, _ in asked])
    for (row, _, column), reply in zip(asked, replies, strict=True):
        row |= {column: reply.text, f'{column}_drew_on': reply.drew_on}


def told(learned: Learned) -> str:
    """Return how an edit was learned, as progress."""
    if learned.seconds is None:
        return learned.state
    return (f'{learned.state} after {learned.seconds:.1f} s, {learned.device_s:.1f} device s, '
            f'{learned.tokens:.0f} tokens')
