# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Rules about the two walks of docs/architecture.md.

A walk is a section whose numbered lines each name a hop, ``1. `file.py:Class.method` ...``:
the functions that a query's or a correction's text passes, in order.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
import re

from structure_imports import PAGE
from structure_sources import Finding, FUNCTIONS, Source

WALKS = ('the way of a query', 'the way of a correction')
HOP = re.compile(r'\s*\d+\. `([^`:]+\.py):([\w.]+)`')
UNTRUE = 'hops of the walks that are not true'


@dataclass(frozen=True)
class Hop:
    """A function on the way; ``node`` is its definition."""

    path: str
    name: str
    line: int       # of the page
    node: ast.AST
    file: ast.Module


def walks(page: str, package: list[Source]) -> Iterator[Finding]:
    """Check both walks; yield also one finding for each file on the way, to be counted."""
    files = {source.path: source.tree for source in package}
    for walk in WALKS:
        hops: list[Hop] = []
        lines = list(_section(page, walk))
        if not lines:
            yield Finding(UNTRUE, PAGE, 1, f'section "{walk}" has no hops: list them as '
                          '1. `mace_ros/ros/node.py:MaceNode._on_query`')
        for line, path, name in lines:
            node = _find(files[path], name) if path in files else None
            if node is None:
                yield Finding(UNTRUE, PAGE, line,
                              f'{path}:{name} does not exist: name what took its place')
                continue
            if path not in {hop.path for hop in hops}:
                yield Finding(f'files on {walk}', PAGE, line, f'{walk} passes {path}: '
                              'let it pass fewer files')
            hops.append(Hop(path, name, line, node, files[path]))
        for index, hop in enumerate(hops[1:], 1):
            if not _linked(hop, hops[:index]):
                yield Finding(
                    UNTRUE, PAGE, hop.line,
                    f'{hop.path}:{hop.name} is named by no hop before it, and does not name '
                    f'{hops[index - 1].name}: add the hops between them')


def _section(page: str, title: str) -> Iterator[tuple[int, str, str]]:
    inside = False
    for number, line in enumerate(page.splitlines(), 1):
        if line.startswith('#'):
            inside = line.strip('# ').lower() == title
        elif inside and (found := HOP.match(line)):
            yield number, found[1], found[2]


def _find(tree: ast.Module, name: str) -> ast.AST | None:
    """Return the definition of a dotted name."""
    node: ast.AST = tree
    for part in name.split('.'):
        found = [child for child in ast.iter_child_nodes(node)
                 if isinstance(child, (ast.ClassDef, *FUNCTIONS)) and child.name == part]
        if not found:
            return None
        node = found[0]
    return node


def _linked(hop: Hop, before: list[Hop]) -> bool:
    """
    Return whether a hop before uses this one, or this one takes what the last one left.

    A function's name has to be in the other one itself. A class's may be anywhere in the
    other's file: what holds an object of it often got it through its constructor.
    """
    return any(_uses(earlier, hop) for earlier in before) or _uses(hop, before[-1])


def _uses(user: Hop, used: Hop) -> bool:
    *owner, name = used.name.split('.')
    return name in _names(user.node) or bool(
        set(owner or [name]) & _names(user.file))


def _names(node: ast.AST) -> set[str]:
    names: set[str] = set()
    for each in ast.walk(node):
        if isinstance(each, ast.Name):
            names.add(each.id)
        elif isinstance(each, ast.Attribute):
            names.add(each.attr)
        elif isinstance(each, ast.alias):
            names.add(each.name)
    return names
