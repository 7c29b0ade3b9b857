# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Edits from the files of knowledge-editing benchmarks.

The names of the fields differ between the benchmarks, and between the tools that prepared them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
import json
from pathlib import Path
from typing import Any

PROMPT = ('prompt', 'src', 'update', 'question')
TARGET = ('target_new', 'alt', 'target', 'ans', 'answer')
REPHRASE = ('rephrase_prompt', 'rephrase', 'paraphrase_prompts')
LOCALITY = ('locality_prompt', 'locality', 'loc', 'neighborhood_prompts')
NESTED = ('loc', 'prompt', 'question', 'str')     # of an object where a text is expected

# ZsRE asks Natural Questions for locality. Other sets ask near misses: the same relation of
# another subject.
NATURAL_QUESTION = 'nq question: '


@dataclass(frozen=True)
class Edit:
    """A question, the answer that is to be learned, and questions that test its effect."""

    prompt: str
    target: str
    rephrase: str = ''      # to be answered like the prompt
    near_miss: str = ''     # not to be changed, although it resembles the prompt
    natural: str = ''       # not to be changed, about something else


@dataclass(frozen=True)
class EditSet:
    """The edits of one file, in its order; ``name`` is the part of its name before "_"."""

    name: str
    edits: Sequence[Edit]

    def part(self, offset: int, count: int) -> EditSet:
        """
        Return ``count`` edits with different prompts, from ``offset`` on.

        A near miss that is itself one of the prompts is left out. Raises ``ValueError`` if the
        file has too few edits.
        """
        chosen: dict[str, Edit] = {}
        for edit in self.edits[offset:]:
            if len(chosen) < count:
                chosen.setdefault(edit.prompt, edit)
        if len(chosen) < count:
            raise ValueError(f'{self.name} has only {len(chosen)} edits after the first {offset}')
        return EditSet(self.name, [
            replace(edit, near_miss='') if edit.near_miss in chosen else edit
            for edit in chosen.values()])


def read_edits(path: Path) -> EditSet:
    """Read a file; raises ``ValueError`` if it is not a list of edits."""
    rows = json.loads(path.read_text())
    if not isinstance(rows, list) or not rows:
        raise ValueError(f'{path}: not a list of edits')
    edits = [edit_from(row) for row in rows]
    for number, edit in enumerate(edits):
        if not edit.prompt or not edit.target:
            raise ValueError(f'{path}: edit {number} has no prompt or no new answer, of '
                             f'{", ".join(rows[number])}')
    return EditSet(path.stem.split('_')[0].lower(), edits)


def edit_from(row: Mapping[str, Any]) -> Edit:
    """Return the edit of one row; what the row lacks is empty."""
    if 'requested_rewrite' in row:      # CounterFact as it was first published
        rewrite = row['requested_rewrite']
        row = {**row, **rewrite, 'prompt': rewrite['prompt'].format(rewrite['subject'])}
    locality = _text(row, LOCALITY)
    natural = locality.startswith(NATURAL_QUESTION)
    return Edit(
        _text(row, PROMPT), _text(row, TARGET), _text(row, REPHRASE),
        near_miss='' if natural else locality,
        natural=locality.removeprefix(NATURAL_QUESTION) if natural else '')


def _text(row: Mapping[str, Any], names: Sequence[str]) -> str:
    return next((text for name in names if (text := _first(row.get(name)))), '')


def _first(value: Any) -> str:
    """Return the first text in a value, which may be nested."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, Mapping):
        value = [value[name] for name in NESTED if name in value] or list(value.values())
    if isinstance(value, Sequence):
        return next((text for each in value if (text := _first(each))), '')
    return ''

