# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Edits that come at the same moment: seconds until all of them are live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from bench.edits.edit_set import Edit
from bench.edits.edited_model import EditedModel
from bench.edits.sequential import ask_all, near_answers, Row, sample


def measure(model: EditedModel, edits: Sequence[Edit]) -> list[Row]:
    """Teach all edits at once; return a sample of each."""
    before = near_answers(model, edits)
    rows = [sample(edit, before) for edit in edits]
    for row, learned in zip(rows, model.learn(edits), strict=True):
        row |= asdict(learned)
    ask_all(model, rows, 'end')
    return rows
