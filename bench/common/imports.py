# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The files of the repository that a program runs: its modules, and those they import or start."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def files_of(program: str, root: Path) -> set[Path]:
    """
    Return the files that ``python -m program`` in ``root`` may run, relative to ``root``.

    A module is followed wherever it is named: in an import, or in a string, as in
    ``[sys.executable, '-m', 'mace_ros.ros.node']``.
    """
    found = set[Path]()
    waiting = [program, f'{program}.__main__']
    while waiting:
        for path in _files(waiting.pop(), root) - found:
            found.add(path)
            waiting += _named_modules(ast.parse((root / path).read_text()))
    return found


def _files(module: str, root: Path) -> set[Path]:
    """Return the files that importing a module runs: its own and those of its packages."""
    path = Path(*module.split('.'))
    candidates = {path.with_suffix('.py'), *(p / '__init__.py' for p in (path, *path.parents))}
    return {candidate for candidate in candidates if (root / candidate).is_file()}


def _named_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            # What is imported may be a module itself.
            yield from (f'{node.module}.{alias.name}' for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and all(
                map(str.isidentifier, node.value.split('.'))):
            yield node.value
