# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Print every check of every benchmark that left results, what falls short first.

Exits with 1 if anything falls short, or if there are no results. With ``--markdown`` the
numbers go into docs/performance.md, between its two markers: none is typed by hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
import sys
from typing import Any

from bench.results import FOLDER, QUICK_FOLDER, read, Result

DOCUMENT = Path(__file__).parents[1] / 'docs' / 'performance.md'
BEGIN = '<!-- results: python -m bench.report --markdown -->'
END = '<!-- end of results -->'


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; return the exit code."""
    parser = argparse.ArgumentParser(prog='python -m bench.report', description=__doc__.strip())
    parser.add_argument('--results', type=Path, default=None, metavar='FOLDER',
                        help='where the results lie (default: bench/results)')
    parser.add_argument('--quick', action='store_true', help='of the quick runs')
    parser.add_argument('--tables', action='store_true', help='print the tables, too')
    parser.add_argument('--markdown', action='store_true',
                        help='write the numbers into docs/performance.md')
    args = parser.parse_args(arguments)
    folder = args.results or (QUICK_FOLDER if args.quick else FOLDER)
    results = read(folder)
    if not results:
        print(f'no results in {folder}: run python -m bench first', file=sys.stderr)
        return 1
    if args.tables:
        for result in results:
            for table in result['tables']:
                print(f'{result["bench"]}: {table["title"]}\n{text_table(table)}\n')
    print(text(results))
    if args.markdown:
        insert(DOCUMENT, markdown(results))
    return 0 if all(c['holds'] for r in results for c in r['checks']) else 1


def summary(result: Result) -> str:
    """Return the tables and checks of one result as text."""
    data = asdict(result)
    parts = [f'{table["title"]}\n{text_table(table)}\n' for table in data['tables']]
    parts += [f'- {note}' for note in data['notes']]
    return '\n'.join([*parts, '', text([data])])


def text(results: Sequence[dict[str, Any]]) -> str:
    """Return all checks, what falls short first, then what is only reported."""
    rows = [(r['bench'], c) for r in results for c in r['checks']]
    rows.sort(key=lambda row: row[1]['holds'])    # stable: otherwise in their own order
    lines = table_lines(
        [('holds' if c['holds'] else 'FALLS SHORT', bench, c['name'], number(c['value']),
          c['target'], c['note']) for bench, c in rows])
    others = [('reported', r['bench'], x['name'], number(x['value']), x['aim'], x['note'])
              for r in results for x in r['reported']]
    short = sum(not c['holds'] for _, c in rows)
    return '\n'.join([*lines, *([''] if others else []), *table_lines(others), '',
                      f'{len(rows) - short} of {len(rows)} checks hold'])


def text_table(table: dict[str, Any]) -> str:
    """Return a table in columns of text."""
    lines = table_lines([table['columns'], *([number(c) for c in row] for row in table['rows'])])
    return '\n'.join([*lines, *([table['note']] if table['note'] else [])])


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows with their columns aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ['  '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in rows]


def number(value: Any) -> str:
    """Return a cell as text: numbers with three digits, a dash for what is missing."""
    if value is None:
        return '-'
    if isinstance(value, float):
        return f'{value:,.0f}' if abs(value) >= 100 else f'{value:.3g}'
    return str(value)


def markdown(results: Iterable[dict[str, Any]]) -> str:
    """Return everything that the results say, as Markdown."""
    parts = []
    for result in results:
        where, packages = result['machine'], result['machine']['packages']
        device = where['gpu'] or f'{where["cores"]} cores of {where["cpu"]}'
        software = ', '.join([*(f'{k} {v}' for k, v in packages.items()),
                              *(f'{k}={v}' for k, v in where['environment'].items())])
        parts.append(
            f'### `{result["command"]}`\n\n{result["started"][:10]}, commit {where["commit"]}, '
            f'{device} ({", ".join(where["flags"])}), {where["memory_gib"]:g} GiB, Python '
            f'{where["python"]}, {software}; took {result["seconds"] / 60:.0f} minutes; load '
            f'before it {where["load_before"]:g}.\n')
        parts += [f'- {note}' for note in result['notes']]
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


def _markdown_rows(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    return [f'| {" | ".join(columns)} |', '|' + '---|' * len(columns),
            *(f'| {" | ".join(number(c).replace("|", "/") for c in row)} |' for row in rows)]


def insert(document: Path, numbers: str) -> None:
    """Replace what stands between the markers; raises ``ValueError`` if one is missing."""
    before, begin, rest = document.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f'{document} lacks {BEGIN} or {END}')
    document.write_text(f'{before}{begin}\n\n{numbers}\n{end}{after}')


if __name__ == '__main__':
    sys.exit(main())
