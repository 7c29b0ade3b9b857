# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Results that an earlier engine gave: its code has changed since they were recorded."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
import subprocess
from typing import Any

from bench.common.imports import files_of

ROOT = Path(__file__).parents[2]
ENGINE = 'mace_ros'
NAMED = 3               # files that have changed; others are only counted
EARLIER = 'earlier'     # the system in bench.edits that is meant to be older


def stale(results: Iterable[Mapping[str, Any]], root: Path = ROOT) -> Iterator[str]:
    """
    Yield a line for each commit of each result whose engine differs from the one in ``root``.

    Only those files of the engine count that the benchmark runs, without comments and docstrings.
    Raises ``CalledProcessError`` if the repository in ``root`` does not have the commit.
    """
    for result in results:
        runs = files_of(f'bench.{result["bench"]}', root)
        for commit in sorted(_commits(result)):
            changed = [name for name in _changed(commit, root) if Path(name) in runs]
            if changed:
                more = f' and {len(changed) - NAMED} more' if len(changed) > NAMED else ''
                yield (f'{result["bench"]} was recorded at {commit}; '
                       f'changed since: {", ".join(changed[:NAMED])}{more}')


def _commits(result: Mapping[str, Any]) -> set[str]:
    """Return the commits that gave the samples of a result."""
    # Other parts are what the samples were taken under.
    parts = {name: rows for name, rows in result['samples'].items() if isinstance(rows, list)}
    found = {
        result['machine']['commit'],
        *(run['commit'] for name, run in result.get('earlier', {}).items() if name in parts),
        *(row['commit'] for rows in parts.values() for row in rows
          if isinstance(row, dict) and 'commit' in row and row.get('system') != EARLIER)}
    # What was not committed yet came with the commit that followed.
    return {commit.removesuffix(' and changes') for commit in found}


def _changed(commit: str, root: Path) -> Iterator[str]:
    """Yield the files of the engine that differ from those of a commit."""
    for line in _git(root, 'diff', '--no-renames', '--name-status', commit, '--', ENGINE):
        status, name = line.split('\t')
        if status != 'M' or not name.endswith('.py') or _code((root / name).read_text()) != _code(
                '\n'.join(_git(root, 'show', f'{commit}:{name}'))):
            yield name


def _code(text: str) -> str:
    """Return the code of a module without comments and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = node.body[ast.get_docstring(node) is not None:]
    return ast.dump(tree)


def _git(root: Path, *words: str) -> list[str]:
    return subprocess.run(['git', *words], cwd=root, check=True, text=True,
                          capture_output=True).stdout.splitlines()
