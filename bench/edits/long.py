# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Many edits in a row, in as many sittings as it takes.

The robot keeps its folder between them, and the samples are lines of a file beside it, so that a
run can be stopped at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import json
from pathlib import Path
import time
from typing import Any

from bench.edits.edit_set import Edit
from bench.edits.edited_model import EditedModel
from bench.edits.sequential import ask_all, learn_one, Row, sample, told
from bench.edits.unrelated import Unrelated


class SampleFile:
    """Samples as lines of JSON: first what identifies the run, then one line per sample."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """Read the file or begin it; ends the program if it belongs to another run."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            self._append(identity)
        found, *self.rows = map(json.loads, path.read_text().splitlines())
        if found != identity:
            raise SystemExit(f'{path} holds another run: continue that one, or name another '
                             f'folder with --keep\nthat run: {found}\nthis run: {identity}')

    def of(self, kind: str) -> list[Row]:
        """Return the samples of a kind, in order."""
        return [row for row in self.rows if row['sample'] == kind]

    def add(self, kind: str, row: Row) -> Row:
        """Append a sample; return it."""
        self.rows.append({'sample': kind, **row})
        self._append(self.rows[-1])
        return row

    def _append(self, row: Row) -> None:
        with self._path.open('a') as file:
            file.write(json.dumps(row) + '\n')


def measure(load: Callable[[], EditedModel], samples: SampleFile, edits: Sequence[Edit],
            unrelated: Sequence[Unrelated], *, minutes: float, say: Callable[[str], None],
            ) -> tuple[list[Row], list[Row]]:
    """
    Go on where the last sitting stopped, for ``minutes`` at most (0: no limit).

    Returns the samples of edits and unrelated questions; those of an unfinished run lack the
    answers in the end.
    """
    until = time.monotonic() + minutes * 60.0 if minutes else float('inf')
    model = load()
    try:
        for _ in _remaining(model, samples, edits, unrelated, say):
            if time.monotonic() >= until:
                say('the sitting ends; start again to go on')
                break
    finally:
        model.close()
    ends = {row['number']: row for row in samples.of('end')}
    rows = [row | ends.get(row['number'], {}) for row in samples.of('edit')]
    finished = {row['question']: row for row in samples.of('unrelated')}
    others = [row | finished.get(row['question'], {}) for row in samples.of('before')]
    return rows, others


def _remaining(model: EditedModel, samples: SampleFile, edits: Sequence[Edit],
               unrelated: Sequence[Unrelated], say: Callable[[str], None]) -> Iterator[None]:
    """Take the steps that are missing; yields after each of them."""
    for kind, question in unrelated[len(samples.of('before')):]:
        [reply] = model.ask([question])
        samples.add('before', {'kind': kind, 'question': question, 'before': reply.text})
        yield
    first_of = 'restart' if samples.of('edit') else 'new robot'
    for number in range(len(samples.of('edit')), len(edits)):
        row = sample(edits[number], {}) | {'number': number}
        learned = learn_one(model, edits[number], row, first_of)
        first_of = first_of if learned.seconds is None else ''
        [reply] = model.ask([edits[number].prompt])
        row['now'] = reply.text
        samples.add('edit', row)
        say(f'{number + 1}/{len(edits)} {told(learned)} {row["now"]!r}')
        yield
    for row in samples.of('edit')[len(samples.of('end')):]:
        asked = row | {'near_miss': ''}
        ask_all(model, [asked], 'end')
        samples.add('end', {name: value for name, value in asked.items()
                            if name == 'number' or name.startswith('end')})
        yield
    for row in samples.of('before')[len(samples.of('unrelated')):]:
        [reply] = model.ask([row['question']])
        samples.add('unrelated', {'question': row['question'], 'end': reply.text})
        yield
