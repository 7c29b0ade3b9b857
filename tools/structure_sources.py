# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Parsed source files, and what the rules of check_structure.py have in common."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
PACKAGE = 'mace_ros'


@dataclass(frozen=True)
class Finding:
    """One violation; ``rule`` is the line of the figures that counts it."""

    rule: str
    path: str
    line: int
    text: str       # what is wrong: what to do

    def __str__(self) -> str:
        return f'{self.path}:{self.line}: {self.text}'


@dataclass(frozen=True)
class Source:
    """A Python file below the repository's root."""

    path: str           # relative to the root, with slashes
    lines: int
    tree: ast.Module

    @property
    def module(self) -> str:
        """Dotted name; a package's ``__init__`` has the package's."""
        parts = self.path.removesuffix('.py').split('/')
        return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


@dataclass(frozen=True)
class Import:
    """One imported name: ``from a.b import c`` is ``a.b.c``."""

    name: str
    line: int


def sources(root: Path, folder: str) -> list[Source]:
    """Parse the Python files of a folder of the repository, in alphabetical order."""
    found = []
    for file in sorted((root / folder).rglob('*.py')):
        text = file.read_text(encoding='utf-8')
        path = file.relative_to(root).as_posix()
        found.append(Source(path, len(text.splitlines()), ast.parse(text, path)))
    return found


def imports(source: Source) -> Iterator[Import]:
    """Yield all that a file imports, also inside functions and under TYPE_CHECKING."""
    package = source.module.split('.')
    if not source.path.endswith('/__init__.py'):
        package.pop()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) + 1 - node.level] if node.level else []
            origin = '.'.join([*base, *([node.module] if node.module else [])])
            yield from (Import(f'{origin}.{alias.name}', node.lineno) for alias in node.names)


def imported_module(name: str, modules: dict[str, Source]) -> str | None:
    """Return the module of the package that an imported name is, or is defined in."""
    if name in modules:
        return name
    parent = name.rpartition('.')[0]
    return parent if parent in modules else None
