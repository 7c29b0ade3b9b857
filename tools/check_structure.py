#!/usr/bin/env python3
# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Check the structure of the code that ruff and mypy do not look at.

Prints one line per finding, `path:line: what is wrong: what to do`, and exits with 1 if
there is any. The rules: all modules lie in rooms; no import circle, also none through
TYPE_CHECKING or functions; imports follow the table "Rooms" of docs/architecture.md;
functions of at most 80 lines and files of at most 500, tests' files included; no function is
assigned to another object's attribute; SQL only in mace_ros/store; the hops of the two walks
of docs/architecture.md exist and lead from one to the next, over at most 26 files each; the
Python files that README, CONTRIBUTING and docs name exist.
Tests read at most 20 private attributes of other classes, and patch at most 20.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
import sys

from structure_code import (
    foreign_callbacks,
    long_files,
    long_functions,
    patches,
    private_patches,
    private_reads,
    raw_sql,
)
from structure_imports import circles, layering, loose_modules, PAGE, wrong_layers
from structure_pages import missing_paths
from structure_sources import Finding, PACKAGE, sources
from structure_walks import walks

MAX_IN_TESTS = 20
MAX_WALK_FILES = 26
NO_LIMIT = sys.maxsize
LIMITS = {       # of each figure: how many findings are allowed
    'modules at the root': 0,
    'import circles': 0,
    'imports against the layering': 0,
    'rooms that the page lacks': 0,
    'functions above 80 lines': 0,
    'files above 500 lines': 0,
    'test files above 500 lines': 0,
    'callbacks assigned to other objects': 0,
    'SQL outside the store': 0,
    'private attributes read in tests': MAX_IN_TESTS,
    'private attributes patched in tests': MAX_IN_TESTS,
    'patches in tests, private or not': NO_LIMIT,
    'paths in the docs that lead to no file': 0,
    'hops of the walks that are not true': 0,
    'files on the way of a query': MAX_WALK_FILES,
    'files on the way of a correction': MAX_WALK_FILES,
}


def findings(root: Path) -> Iterator[Finding]:
    """Apply all rules to a repository; raises ValueError if its page has no table of rooms."""
    package, tests = sources(root, PACKAGE), sources(root, 'test')
    yield from loose_modules(package)
    yield from circles(package)
    yield from wrong_layers(package, layering(root))
    yield from long_functions(package)
    yield from long_files(package, 'files above 500 lines')
    yield from long_files(tests, 'test files above 500 lines')
    yield from foreign_callbacks(package)
    yield from raw_sql(package)
    yield from private_reads(tests)
    yield from private_patches(tests)
    yield from patches(tests)
    yield from missing_paths(root)
    yield from walks((root / PAGE).read_text(encoding='utf-8'), package)


def main() -> int:
    """Check the tree; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--root', type=Path, default=Path(__file__).resolve().parent.parent,
                        help='the repository (default: the one that this file lies in)')
    parser.add_argument('--counts', action='store_true', help='print the figure of each rule')
    parser.add_argument('-v', '--verbose', action='store_true',
                        help='print findings within the limits, too')
    args = parser.parse_args()
    try:
        found = sorted(findings(args.root), key=lambda f: (f.path, f.line))
    except (OSError, SyntaxError, ValueError) as error:
        print(f'check_structure: {error}', file=sys.stderr)
        return 2
    counts = Counter(finding.rule for finding in found)
    for finding in found:
        if args.verbose or counts[finding.rule] > LIMITS[finding.rule]:
            print(finding)
    if args.counts:
        for rule, limit in LIMITS.items():
            at_most = '' if limit == NO_LIMIT else f'   at most {limit}'
            print(f'{rule:36} {counts[rule]:4}{at_most}')
    return int(any(counts[rule] > limit for rule, limit in LIMITS.items()))


if __name__ == '__main__':
    sys.exit(main())
