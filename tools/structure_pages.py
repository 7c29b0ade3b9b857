# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The rule for pages: paths of Python files that they name exist."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
import re

from structure_sources import Finding, PACKAGE

PATH = re.compile(r'`([\w/]+\.py)(?::[\w.]+)?`')


def missing_paths(root: Path) -> Iterator[Finding]:
    """Yield paths in code spans of README, CONTRIBUTING and docs that lead to no file."""
    for page in (root / 'README.md', root / 'CONTRIBUTING.md', *sorted(root.glob('docs/**/*.md'))):
        lines = page.read_text(encoding='utf-8').splitlines() if page.is_file() else []
        for number, line in enumerate(lines, 1):
            for path in PATH.findall(line):
                if not any((folder / path).is_file() for folder in (root, root / PACKAGE)):
                    yield Finding(
                        'paths in the docs that lead to no file',
                        page.relative_to(root).as_posix(), number,
                        f'{path} is neither below the root nor below {PACKAGE}/: name the file '
                        'with its folders')
