# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Corrections that are deleted: their questions get the base model's answers after a restart."""

from __future__ import annotations

from collections.abc import Sequence

from bench.edits.edit_set import Edit
from bench.edits.robot import Robot
from bench.edits.sequential import ask_all, learn_one, Row, sample


def measure(robot: Robot, edits: Sequence[Edit]) -> list[Row]:
    """Teach the edits, delete every other one of them; return a sample of each."""
    rows = []
    for edit in edits:
        asked = {'prompt': edit.prompt, 'rephrase': edit.rephrase} if edit.rephrase else {
            'prompt': edit.prompt}
        before = robot.ask([*asked.values()])
        row = sample(edit, {}) | {
            f'{column}_before': reply.text for column, reply in zip(asked, before, strict=True)}
        learn_one(robot, edit, row, '')
        [reply] = robot.ask([edit.prompt])
        row['now'] = reply.text
        rows.append(row)
    live = [row for row in rows if row['correction_id'] and row['state'] == 'LEARNED']
    deleted = [row['correction_id'] for row in live[::2]]
    robot.forget(deleted)
    for row in rows:
        row['deleted'] = row['correction_id'] in deleted
        row['near_miss'] = ''
    ask_all(robot, rows, 'end')
    return rows
