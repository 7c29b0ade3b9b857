# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Results as text for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bench.common.results import Result


def summary(result: Result, origins: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """Return the tables and checks of one result as text; ``origins`` are of earlier samples."""
    data = asdict(result)
    parts = [f'{table["title"]}\n{text_table(table)}\n' for table in data['tables']]
    parts += [f'- {note}' for note in (*earlier(origins or {}), *data['notes'])]
    return '\n'.join([*parts, '', text([data])])


def text(results: Sequence[dict[str, Any]]) -> str:
    """Return all checks, failed ones first, then the numbers without a target."""
    rows = [(r['bench'], c) for r in results for c in r['checks']]
    rows.sort(key=lambda row: row[1]['holds'])    # stable: results keep their order
    lines = table_lines(
        [('holds' if c['holds'] else 'FALLS SHORT', bench, c['name'], number(c['value']),
          c['target'], c['note']) for bench, c in rows])
    others = [('reported', r['bench'], x['name'], number(x['value']), x['aim'], x['note'])
              for r in results for x in r['reported']]
    short = sum(not c['holds'] for _, c in rows)
    return '\n'.join([*lines, *([''] if others else []), *table_lines(others), '',
                      f'{len(rows) - short} of {len(rows)} checks hold'])


def text_table(table: dict[str, Any]) -> str:
    """Return a table as aligned text."""
    lines = table_lines([table['columns'], *([number(c) for c in row] for row in table['rows'])])
    return '\n'.join([*lines, *([table['note']] if table['note'] else [])])


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of text with aligned columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ['  '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in rows]


def number(value: Any) -> str:
    """Return a cell as text: numbers with three digits, a dash for None."""
    if value is None:
        return '-'
    if isinstance(value, float):
        return f'{value:,.0f}' if abs(value) >= 100 else f'{value:.3g}'
    return str(value)


def markdown(results: Iterable[dict[str, Any]]) -> str:
    """Return all results as Markdown."""
    parts = []
    for result in results:
        where, packages = result['machine'], result['machine']['packages']
        software = ', '.join([*(f'{k} {v}' for k, v in packages.items()),
                              *(f'{k}={v}' for k, v in where['environment'].items())])
        parts.append(
            f'## `{result["command"]}`\n\n{result["started"][:10]}, commit {where["commit"]}, '
            f'{device(where)} ({", ".join(where["flags"])}), {where["memory_gib"]:g} GiB, Python '
            f'{where["python"]}, {software}; took {result["seconds"] / 60:.0f} minutes; load '
            f'before it {where["load_before"]:g}.\n')
        parts += [f'- {note}' for note in (*earlier(result.get('earlier', {})), *result['notes'])]
        for table in result['tables']:
            parts.append(f'\n**{table["title"]}**\n')
            parts += _markdown_rows(table['columns'], table['rows'])
            if table['note']:
                parts.append(f'\n{table["note"]}')
        if result['checks']:
            parts.append('\n**Checks**\n')
            parts += _markdown_rows(
                ('', 'check', 'value', 'target', 'how'),
                [('✓' if c['holds'] else '✗', c['name'], c['value'], c['target'], c['note'])
                 for c in sorted(result['checks'], key=lambda c: c['holds'])])
        if result['reported']:
            parts.append('\n**Reported**\n')
            parts += _markdown_rows(
                ('number', 'value', 'aim', 'how'),
                [(r['name'], r['value'], r['aim'], r['note']) for r in result['reported']])
        parts.append('')
    return '\n'.join(parts)


def device(machine: Mapping[str, Any]) -> str:
    """Return the name of the device that computes."""
    return str(machine['gpu'] or f'{machine["cores"]} cores of {machine["cpu"]}')


def earlier(origins: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a note for each earlier run that samples are of."""
    notes = []
    for origin in sorted({tuple(each.items()) for each in origins.values()}, key=str):
        run = dict(origin)
        names = ', '.join(f'`{name}`' for name, each in origins.items() if each == run)
        notes.append(f'Samples of an earlier run, {run["started"][:10]}, commit {run["commit"]}, '
                     f'{device(run)}: {names}.')
    return notes


def _markdown_rows(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    return [f'| {" | ".join(columns)} |', '|' + '---|' * len(columns),
            *(f'| {" | ".join(number(c).replace("|", "/") for c in row)} |' for row in rows)]
