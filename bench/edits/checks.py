# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What the benchmark must show, and the tables with all systems."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from bench.common.results import Check, check, Reported, Table
from bench.edits.figures import Figures, NAN, Rows
from bench.edits.scope_plot import table
from bench.edits.scoring import is_right
from bench.edits.systems import EARLIER, MACE

# Its paraphrases are preceded by sentences about something else.
NOISY_WORDINGS = 'counterfact'
LAST = 100      # edits at the beginning and at the end of a long run that are compared
COLUMNS = ('right now', 'right', 'paraphrase now', 'paraphrase', 'near now', 'near', 'unrelated',
           'first s', 'restart s', 'median s', 'p95 s', 'device s', 'tokens')


def checks(samples: Mapping[str, Any]) -> list[Check]:
    """Return the checks of all parts that have samples."""
    return [*_sequential_checks(samples), *_burst_checks(samples), *_long_checks(samples),
            *_deletion_checks(samples)]


def reported(samples: Mapping[str, Any]) -> list[Reported]:
    """Return numbers without a target that explain the checks."""
    return [Reported(f'{name}: unrelated answers kept, {kind}', found.kept(kind),
                     note=f'{sum(row["kind"] == kind for row in found.unrelated)} questions')
            for name, found in _of_mace(samples, 'edits', 'unrelated')
            for kind in dict.fromkeys(row['kind'] for row in found.unrelated)]


def tables(samples: Mapping[str, Any]) -> list[Table]:
    """Return the table with a row for each edit set and system."""
    rows = [[name, system, *_cells(found)]
            for name, system, found in grouped(samples, 'edits', 'unrelated')]
    found = [Table(
        'Edits, one after the other', ['set', 'system', *COLUMNS], rows,
        'right, paraphrase: answered as corrected (now: just after each edit; else in the end); '
        'near, unrelated: same bytes as before the first edit; device s, tokens: per edit')
    ] if rows else []
    if samples.get('scope'):
        found.append(table(samples['scope']))
    if samples.get('runs'):
        columns = ['set', 'system', 'part', 'recorded', 'commit', 'cpu']
        found.append(Table('Runs', columns, [
            [run.get(name) for name in columns] for run in samples['runs']]))
    return found


def grouped(samples: Mapping[str, Any], edits: str,
            unrelated: str = '') -> Iterator[tuple[str, str, Figures]]:
    """Yield edit set, system and figures of the samples under two names."""
    def rows_of(kind: str, pair: tuple[str, str]) -> Rows:
        return [row for row in samples.get(kind, ()) if (row['set'], row['system']) == pair]

    for pair in dict.fromkeys((row['set'], row['system']) for row in samples.get(edits, ())):
        yield (*pair, Figures(rows_of(edits, pair), rows_of(unrelated, pair)))


def _of_mace(samples: Mapping[str, Any], edits: str,
             unrelated: str = '') -> Iterator[tuple[str, Figures]]:
    for name, system, found in grouped(samples, edits, unrelated):
        if system == MACE:
            yield name, found


def _cells(found: Figures) -> Iterable[float | None]:
    values = (
        found.right('now'), found.right('end'), found.rephrased('now'), found.rephrased('end'),
        found.near_kept('now'), found.near_kept('end'), found.kept(), found.first_s('new robot'),
        found.first_s('restart'), found.median_s, found.p95_s, found.per_edit('device_s'),
        found.per_edit('tokens'))
    return (None if value != value else value for value in values)


def _sequential_checks(samples: Mapping[str, Any]) -> Iterator[Check]:
    earlier = {name: found for name, system, found in grouped(samples, 'edits', 'unrelated')
               if system == EARLIER and _same_cpu(samples, name)}
    for name, found in _of_mace(samples, 'edits', 'unrelated'):
        count = f'{len(found.rows)} edits, one after the other'
        yield check(f'{name}: right in the end', found.right('end'), '>= 0.97', count)
        yield check(f'{name}: paraphrases right in the end', found.rephrased('end'),
                    '>= 0.6' if name == NOISY_WORDINGS else '>= 0.75')
        yield check(f'{name}: unrelated questions with the same answer', found.kept(), '>= 1',
                    f'byte for byte; {len(found.unrelated)} questions')
        if found.near_kept('end') == found.near_kept('end') and name != NOISY_WORDINGS:
            yield check(f'{name}: near misses with the same answer', found.near_kept('end'),
                        '>= 0.85', 'byte for byte')
        firsts = (f'{found.first_s("new robot"):.3g} s for the first one of a new robot, '
                  f'{found.first_s("restart"):.3g} s for the first one after a restart')
        yield check(f'{name}: median s until a correction is live', found.median_s, '<= 4', firsts)
        yield check(f'{name}: p95 of it', found.p95_s, '<= 10')
        yield _earlier_check(name, found, earlier.get(name))
        right, named = found.explained
        yield check(f'{name}: answers in scope that name their correction',
                    right / named if named else NAN, '>= 0.95', f'{right} of {named}')


def _earlier_check(name: str, found: Figures, before: Figures | None) -> Check:
    title = f'{name}: device s of a correction, over those of the earlier commit'
    if before is None:
        return check(title, None, '<= 0.4')
    count = len(before.rows)
    now = Figures(found.rows[:count], ()).per_edit('device_s')
    then = before.per_edit('device_s')
    return check(title, now / then, '<= 0.4',
                 f'{now:.3g} s and {then:.3g} s; the first {count} edits')


def _same_cpu(samples: Mapping[str, Any], name: str) -> bool:
    """Whether the robots of both commits ran on the same CPU, so that seconds compare."""
    return len({run['cpu'] for run in samples.get('runs', ()) if run['set'] == name
                and run['part'] == 'edits' and run['system'] in (MACE, EARLIER)}) <= 1


def _burst_checks(samples: Mapping[str, Any]) -> Iterator[Check]:
    for name, found in _of_mace(samples, 'burst'):
        yield check(f'{name}: s until all of a burst are live',
                    max(found.seconds, default=NAN), '<= 60',
                    f'{len(found.rows)} at once, {len(found.live)} of them learned; '
                    f'{found.right("end"):.0%} then answered as corrected')


def _long_checks(samples: Mapping[str, Any]) -> Iterator[Check]:
    for name, found in _of_mace(samples, 'long', 'long_unrelated'):
        done = sum('end' in row for row in found.rows)
        if done < len(found.rows):
            continue        # more sittings are to come
        yield check(f'{name}: right after a long run', found.right('end'), '>= 0.92',
                    f'{done} edits in a row')
        yield check(f'{name}: unrelated questions with the same answer after a long run',
                    found.kept(), '>= 1', f'byte for byte; {len(found.unrelated)} questions')
        count = min(LAST, done // 2)
        first, last = (sum(Figures(rows, ()).seconds)
                       for rows in (found.rows[:count], found.rows[-count:]))
        yield check(f'{name}: s per correction at the end of a long run, over its beginning',
                    last / first if first else NAN, '<= 1.5',
                    f'{first / max(count, 1):.3g} s and {last / max(count, 1):.3g} s, the mean of '
                    f'{count} each')


def _deletion_checks(samples: Mapping[str, Any]) -> Iterator[Check]:
    for name, found in _of_mace(samples, 'deletion'):
        deleted = [row for row in found.rows if row['deleted']]
        columns = [(row, column) for row in deleted for column in ('prompt', 'rephrase')
                   if row[column]]
        same = [row['end' if column == 'prompt' else 'end_rephrase'] == row[f'{column}_before']
                for row, column in columns]
        yield check(f'{name}: deleted corrections with the answer of the base model',
                    sum(same) / len(same) if same else NAN, '>= 1',
                    f'{len(deleted)} deleted, prompts and paraphrases')
        kept = [is_right(row['end'], row['target']) for row in found.rows
                if not row['deleted'] and is_right(row['now'], row['target'])]
        yield check(f'{name}: corrections still right that were not deleted',
                    sum(kept) / len(kept) if kept else NAN, '>= 1', f'of {len(kept)}')
