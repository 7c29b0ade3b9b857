# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Rules about modules: where they lie, and what they import."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
import re

from structure_sources import Finding, imported_module, imports, PACKAGE, Source

PAGE = 'docs/architecture.md'
HEADING = '## Rooms'
ROOM, MAY_IMPORT = 'room', 'may import'       # columns
GENERATED = ('msg', 'srv', 'action')         # rooms that exist only where the package is built


def loose_modules(package: list[Source]) -> Iterator[Finding]:
    """Find modules at the root of the package that are no entry points."""
    for source in package:
        folder, _, name = source.path.rpartition('/')
        if folder == PACKAGE and name not in ('__init__.py', '__main__.py'):
            yield Finding('modules at the root', source.path, 1,
                          f'module at the root of {PACKAGE}/: move it into a room')


# -- circles -----------------------------------------------------------------------------

def circles(package: list[Source]) -> Iterator[Finding]:
    """Find the shortest import circle through each module that is not yet in one."""
    modules = {source.module: source for source in package}
    graph: dict[str, dict[str, int]] = {name: {} for name in modules}
    for name, source in modules.items():
        for each in imports(source):
            target = imported_module(each.name, modules)
            if target is not None and target != name:
                graph[name].setdefault(target, each.line)
    reported: set[str] = set()
    for name in sorted(graph):
        circle = [] if name in reported else _shortest_circle(name, graph)
        if circle:
            reported.update(circle)
            yield Finding('import circles', modules[name].path, graph[name][circle[1]],
                          f'import circle {" -> ".join(circle)}: '
                          'move what both need into a third module')


def _shortest_circle(start: str, graph: dict[str, dict[str, int]]) -> list[str]:
    """Return the modules from ``start`` back to itself; empty if no imports lead there."""
    came_from: dict[str, str] = {}
    queue = deque([start])
    while queue:
        name = queue.popleft()
        for target in graph[name]:
            if target == start:
                path = [start, name]
                while path[-1] != start:
                    path.append(came_from[path[-1]])
                return path[::-1]
            if target not in came_from:
                came_from[target] = name
                queue.append(target)
    return []


# -- layers ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Row:
    """A row of the table: a room or module, and all that it may import from outside."""

    name: str           # dotted, without the package: ``store`` or ``cli.journal_admin``
    allowed: tuple[str, ...]
    line: int


def layering(root: Path) -> list[Row]:
    """Read the table of rooms; raises ValueError if the page has none."""
    rows: list[Row] = []
    columns: list[str] = []
    in_section = False
    for number, line in enumerate((root / PAGE).read_text(encoding='utf-8').splitlines(), 1):
        if line.startswith('## '):
            in_section = line.strip() == HEADING
        if not in_section or not line.startswith('|'):
            continue
        cells = [cell.strip() for cell in line.strip().strip('|').split('|')]
        if not columns:
            columns = cells
            if ROOM not in columns or MAY_IMPORT not in columns:
                break
        elif not set(line) <= set('|-: '):
            allowed = tuple(_dotted(name) for name in _quoted(cells[columns.index(MAY_IMPORT)]))
            rows += [Row(_dotted(name), allowed, number)
                     for name in _quoted(cells[columns.index(ROOM)])]
    if not rows:
        raise ValueError(f'{PAGE}: the section "{HEADING}" has no table with the columns '
                         f'"{ROOM}" and "{MAY_IMPORT}"')
    return rows


def _quoted(cell: str) -> list[str]:
    return re.findall(r'`([^`]+)`', cell)


def _dotted(name: str) -> str:
    name = name.removeprefix(f'{PACKAGE}/').removesuffix('.py').strip('/')
    return name.replace('/', '.').removeprefix(f'{PACKAGE}.')


def _within(name: str, room: str) -> bool:
    return name == room or name.startswith(f'{room}.')


def wrong_layers(package: list[Source], rows: list[Row]) -> Iterator[Finding]:
    """Find imports that the table does not allow, and rows that contradict the tree."""
    modules = {source.module: source for source in package}
    inside = {*GENERATED, *(parent for name in modules for parent in _parents(name))}
    yield from _wrong_rows(rows, inside)
    # A library that some row names is kept to the rows that name it.
    kept = {name for row in rows for name in row.allowed if name not in inside}
    for source in package:
        module = source.module.removeprefix(f'{PACKAGE}.')
        row: Row | None = None
        if source.module == PACKAGE:
            row = Row('', (), 0)        # the package itself imports nothing
        elif source.path.count('/') == 1:
            continue        # an entry point, above all rooms
        else:
            row = max((r for r in rows if _within(module, r.name)),
                      key=lambda r: len(r.name), default=None)
        if row is None:
            yield Finding('rooms that the page lacks', source.path, 1,
                          f'its room is not in the table of {PAGE}: add a row')
            continue
        told: set[str] = set()
        for each in imports(source):
            if _within(each.name, PACKAGE):
                module = imported_module(each.name, modules) or each.name
                target = module.removeprefix(PACKAGE).lstrip('.')
                fits = not target or (row.name != '' and _within(target, row.name))
            else:
                target = next((name for name in kept if _within(each.name, name)), '')
                fits = not target
            if fits or target in told or any(_within(target, name) for name in row.allowed):
                continue
            told.add(target)
            yield Finding('imports against the layering', source.path, each.line,
                          f'{row.name or PACKAGE} may not import {target} ({PAGE}, Rooms): '
                          'move the code, or pass in what it needs')


def _parents(module: str) -> list[str]:
    """Return a module's name and those of its packages, without that of the root."""
    parts = module.split('.')[1:]
    return ['.'.join(parts[:end]) for end in range(1, len(parts) + 1)]


def _wrong_rows(rows: list[Row], inside: set[str]) -> Iterator[Finding]:
    above: list[str] = []
    for row in rows:
        if row.name not in inside:
            yield Finding('rooms that the page lacks', PAGE, row.line,
                          f'{row.name} does not exist: remove the row')
        for name in row.allowed:
            if name in inside and name not in GENERATED and not any(
                    _within(name, room) for room in above):
                yield Finding('imports against the layering', PAGE, row.line,
                              f'{row.name} may import {name}, which has no row above it: '
                              'order the rows from the lowest layer to the highest')
        above.append(row.name)
