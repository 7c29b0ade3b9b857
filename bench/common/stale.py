# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Results that an earlier engine gave: its code has changed since they were recorded."""

from __future__ import annotations

import ast
from collections.abc import Container, Iterable, Iterator, Mapping
from functools import cache
import json
from pathlib import Path
import subprocess
from typing import Any

from bench.common.imports import files_of

ROOT = Path(__file__).parents[2]
ENGINE = 'mace_ros'
NAMED = 3               # files that have changed; others are only counted
# Commits, in full, that change the engine but no figure, each with the reason.
UNAFFECTED = Path('bench/unaffected.json')
EARLIER = 'earlier'     # the system in bench.edits that is meant to be older


def stale(results: Iterable[Mapping[str, Any]], root: Path = ROOT) -> Iterator[str]:
    """
    Yield a line for each commit of each result whose engine differs from the one in ``root``.

    Only those files of the engine count that the benchmark runs, without comments and docstrings,
    and only those changes that ``bench/unaffected.json`` does not list.
    Raises ``CalledProcessError`` if the repository in ``root`` does not have the commit.
    """
    for result in results:
        runs = files_of(f'bench.{result["bench"]}', root)
        for commit in sorted(_commits(result)):
            changed = list(_changed(commit, root, runs))
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


def _changed(commit: str, root: Path, runs: Container[Path]) -> Iterator[str]:
    """Yield the files of the engine that a program runs and that differ from a commit's."""
    path = root / UNAFFECTED
    unaffected = json.loads(path.read_text()) if path.exists() else {}
    for name in _git(root, 'diff', '--no-renames', '--name-only', commit, '--', ENGINE):
        if Path(name) not in runs:
            continue
        now = _code(name, (root / name).read_text()) if (root / name).exists() else ''
        if now != _code_at(commit, name, root) and (
                now != _code_at('HEAD', name, root)     # not committed yet
                or any(later not in unaffected
                       and _code_at(f'{later}^', name, root) != _code_at(later, name, root)
                       for later in _git(root, 'log', '--format=%H', f'{commit}..', '--', name))):
            yield name


@cache
def _code_at(commit: str, name: str, root: Path) -> str:
    """Return the code of a file at a commit; none if it is not there."""
    if not _git(root, 'ls-tree', '--name-only', commit, '--', name):
        return ''
    return _code(name, '\n'.join(_git(root, 'show', f'{commit}:{name}')))


def _code(name: str, text: str) -> str:
    """Return the code of a file, of a Python module without comments and docstrings."""
    if not name.endswith('.py'):
        return text.rstrip('\n')
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = node.body[ast.get_docstring(node) is not None:]
    return ast.dump(tree)


def _git(root: Path, *words: str) -> list[str]:
    return subprocess.run(['git', *words], cwd=root, check=True, text=True,
                          capture_output=True).stdout.splitlines()
