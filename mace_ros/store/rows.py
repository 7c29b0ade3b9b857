# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Rows of the journal's tables as fields of its records."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

from mace_ros.store.records import PENDING

# Constants, so that they can stand in the text of a statement.
PENDING_SQL = f'({", ".join(str(int(state)) for state in PENDING)})'

_LISTS = {'prompt_ids', 'messages', 'output_ids', 'correction_ids', 'tools'}
_NOT_IN_RECORDS = {'number', 'question'}


def record_fields(row: sqlite3.Row) -> dict[str, Any]:
    """Return the fields of the record that a row was written from."""
    values = {name: value for name, value in dict(row).items() if name not in _NOT_IN_RECORDS}
    for name in values.keys() & _LISTS:
        values[name] = tuple(json.loads(values[name]))
    return values
