# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Print the checks of all benchmarks that have results, failed ones first.

The exit code is 1 if a check fails or if there are no results. ``--markdown`` writes all numbers
into bench/results/REPORT.md, those that README and docs quote into these pages, and draws the
pictures in docs/pictures/, so that none is typed or drawn by hand. ``--stale`` names the results
that an earlier engine gave instead; the exit code is 1 if there are any.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
import sys
from typing import Any

from bench.common.figures import can_draw
from bench.common.pages import pages, updated
from bench.common.recording import FOLDER, QUICK_FOLDER, read
from bench.common.rendering import markdown, text, text_table
from bench.common.stale import stale
from bench.pictures import draw_all

REPORT = FOLDER / 'REPORT.md'


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; return the exit code."""
    parser = argparse.ArgumentParser(prog='python -m bench.report', description=__doc__.strip())
    parser.add_argument('--results', type=Path, default=None, metavar='FOLDER',
                        help='folder of the results (default: bench/results)')
    parser.add_argument('--quick', action='store_true', help='report the quick runs')
    parser.add_argument('--tables', action='store_true', help='print the tables as well')
    parser.add_argument('--markdown', action='store_true',
                        help='write bench/results/REPORT.md, and the figures and pictures of the '
                        'documentation')
    parser.add_argument('--stale', action='store_true',
                        help='only name the results that an earlier engine gave')
    args = parser.parse_args(arguments)
    folder = args.results or (QUICK_FOLDER if args.quick else FOLDER)
    results = read(folder)
    if not results:
        print(f'no results in {folder}: run python -m bench first', file=sys.stderr)
        return 1
    if args.stale:
        lines = list(stale(results))
        print(*lines, sep='\n')
        return 1 if lines else 0
    if args.tables:
        for result in results:
            for table in result['tables']:
                print(f'{result["bench"]}: {table["title"]}\n{text_table(table)}\n')
    print(text(results))
    if args.markdown:
        REPORT.write_text(report(results))
        for page in pages():
            page.write_text(updated(page.read_text(), results))
        if can_draw():
            draw_all(results)
    return 0 if all(c['holds'] for r in results for c in r['checks']) else 1


def report(results: Sequence[dict[str, Any]]) -> str:
    """Return the page with the numbers of all results."""
    return ('# All results\n\n'
            'Generated from the JSON files in `bench/results/` by '
            '`python -m bench.report --markdown`.\n\n' + markdown(results))


if __name__ == '__main__':
    sys.exit(main())
