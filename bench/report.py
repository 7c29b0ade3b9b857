# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Print the checks of all benchmarks that have results, failed ones first.

The exit code is 1 if a check fails or if there are no results. ``--markdown`` writes the
numbers into docs/performance.md, between its two markers, so that none is typed by hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
import sys

from bench.common.recording import FOLDER, QUICK_FOLDER, read
from bench.common.rendering import markdown, text, text_table

DOCUMENT = Path(__file__).parents[1] / 'docs' / 'performance.md'
BEGIN = '<!-- results: python -m bench.report --markdown -->'
END = '<!-- end of results -->'


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; return the exit code."""
    parser = argparse.ArgumentParser(prog='python -m bench.report', description=__doc__.strip())
    parser.add_argument('--results', type=Path, default=None, metavar='FOLDER',
                        help='folder of the results (default: bench/results)')
    parser.add_argument('--quick', action='store_true', help='report the quick runs')
    parser.add_argument('--tables', action='store_true', help='print the tables as well')
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


def insert(document: Path, numbers: str) -> None:
    """Replace the text between the markers; raises ``ValueError`` if a marker is missing."""
    before, begin, rest = document.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f'{document} lacks {BEGIN} or {END}')
    document.write_text(f'{before}{begin}\n\n{numbers}\n{end}{after}')


if __name__ == '__main__':
    sys.exit(main())
