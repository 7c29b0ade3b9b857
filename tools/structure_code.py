# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Rules about the code inside a module, and about what tests read and patch."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
import re
from typing import TypeGuard

from structure_sources import Finding, FUNCTIONS, PACKAGE, Source

MAX_FUNCTION_LINES = 80
MAX_FILE_LINES = 500
SQL = re.compile(
    r'\bSELECT\b.+\bFROM\b|\bINSERT\s+(OR\s+\w+\s+)?INTO\b|\bUPDATE\s+\S+\s+SET\b|\bDELETE\s+FROM\b'
    r'|\bCREATE\s+(TEMP\w*\s+|UNIQUE\s+|VIRTUAL\s+)?(TABLE|INDEX|VIEW|TRIGGER)\b'
    r'|\bWHERE\s+\w+|\b(ORDER|GROUP)\s+BY\b|^\s*PRAGMA\s'
    r'|^\s*(?i:select\s.+\sfrom\s|insert\s+into\s|update\s+\S+\s+set\s|delete\s+from\s)', re.DOTALL)
NAMEDTUPLE = {'_asdict', '_field_defaults', '_fields', '_make', '_replace'}


def long_files(files: list[Source], rule: str) -> Iterator[Finding]:
    """Find long files."""
    for source in files:
        if source.lines > MAX_FILE_LINES:
            yield Finding(rule, source.path, 1,
                          f'{source.lines} lines, at most {MAX_FILE_LINES}: split it by idea')


def long_functions(package: list[Source]) -> Iterator[Finding]:
    """Find long functions."""
    for source in package:
        for node in ast.walk(source.tree):
            if isinstance(node, FUNCTIONS):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    yield Finding(
                        'functions above 80 lines', source.path, node.lineno,
                        f'{node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}: split it')


def raw_sql(package: list[Source]) -> Iterator[Finding]:
    """Find SQL in string literals outside the store."""
    for source in package:
        if source.path.startswith(f'{PACKAGE}/store/'):
            continue
        skipped: set[ast.AST] = set()
        for node in ast.walk(source.tree):
            body = getattr(node, 'body', None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
                skipped.add(body[0].value)      # a docstring
            if isinstance(node, ast.JoinedStr):
                skipped.update(node.values)
                text = ' '.join(_text(part) or '?' for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                continue
            if node not in skipped and SQL.search(text):
                yield Finding('SQL outside the store', source.path, node.lineno,
                              f'SQL outside {PACKAGE}/store: make it a method of the journal')


# -- callbacks ---------------------------------------------------------------------------

def foreign_callbacks(package: list[Source]) -> Iterator[Finding]:
    """Find functions that are assigned to attributes of other objects, or over placeholders."""
    known = _Callables(package)
    for source in package:
        for scope, node in _statements(source.tree, ()):
            for target, value in _assigned(node):
                if known.is_callback(value, scope, source):
                    yield Finding(
                        'callbacks assigned to other objects', source.path, node.lineno,
                        f'a function is assigned to {target}: make it a constructor argument')
            if (isinstance(node, ast.AnnAssign) and _is_own(node.target)
                    and 'Callable' in ast.unparse(node.annotation)
                    and (isinstance(node.value, ast.Lambda) or _is_builtin(node.value))):
                yield Finding(
                    'callbacks assigned to other objects', source.path, node.lineno,
                    f'{ast.unparse(node.target)} holds a placeholder: '
                    'make the function a constructor argument')


Scope = tuple[ast.AST, ...]


def _statements(node: ast.AST, scope: Scope) -> Iterator[tuple[Scope, ast.stmt | ast.expr]]:
    """Yield each node with the classes and functions around it, the innermost last."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.expr)):
            yield scope, child
        inner = (*scope, child) if isinstance(child, (ast.ClassDef, *FUNCTIONS)) else scope
        yield from _statements(child, inner)


def _assigned(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield the attributes of other objects that a statement sets, with their values."""
    pairs: list[tuple[ast.expr, ast.expr]] = []
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if (isinstance(target, (ast.Tuple, ast.List))
                    and isinstance(node.value, (ast.Tuple, ast.List))):
                pairs += zip(target.elts, node.value.elts, strict=False)
            else:
                pairs.append((target, node.value))
    elif isinstance(node, ast.AnnAssign) and node.value is not None:
        pairs.append((node.target, node.value))
    elif (isinstance(node, ast.Call) and _called(node) == 'setattr' and len(node.args) == 3
            and ast.unparse(node.args[0]) not in ('self', 'cls')):
        yield ast.unparse(node.args[0]), node.args[2]
    for target, value in pairs:
        if isinstance(target, ast.Attribute) and not _is_own(target):
            yield ast.unparse(target), value


def _is_own(target: ast.AST | None) -> TypeGuard[ast.Attribute]:
    return (isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name)
            and target.value.id in ('self', 'cls'))


def _is_builtin(value: ast.AST | None) -> bool:
    return isinstance(value, ast.Name) and callable(getattr(builtins, value.id, None))


def _is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any('property' in ast.unparse(each) for each in function.decorator_list)


class _Callables:
    """Which expressions are functions, as far as the source alone can tell."""

    def __init__(self, package: list[Source]) -> None:
        methods: set[str] = set()
        data: set[str] = set()        # attributes that are no methods, of whatever class
        self._functions: set[tuple[str, str]] = set()       # (module, name)
        for source in package:
            for scope, node in _statements(source.tree, ()):
                in_class = bool(scope) and isinstance(scope[-1], ast.ClassDef)
                if isinstance(node, FUNCTIONS) and not in_class:
                    self._functions.add((source.module, node.name))
                elif isinstance(node, FUNCTIONS):
                    (data if _is_property(node) else methods).add(node.name)
                elif isinstance(node, ast.AnnAssign) and in_class:
                    data.add(ast.unparse(node.target))
                elif _is_own(node) and isinstance(node.ctx, ast.Store):
                    data.add(node.attr)
        self._methods = methods - data

    def is_callback(self, value: ast.expr, scope: Scope, source: Source) -> bool:
        """Return whether a value is a function, a bound method or a partial call of one."""
        if isinstance(value, ast.IfExp):
            return any(self.is_callback(v, scope, source) for v in (value.body, value.orelse))
        if isinstance(value, ast.BoolOp):
            return any(self.is_callback(v, scope, source) for v in value.values)
        if isinstance(value, ast.Call):
            return _called(value) == 'partial'
        if isinstance(value, ast.Attribute):
            return value.attr in self._methods or (_is_own(value) and any(
                isinstance(node, FUNCTIONS) and node.name == value.attr and not _is_property(node)
                for outer in scope if isinstance(outer, ast.ClassDef) for node in outer.body))
        if isinstance(value, ast.Name):
            return self._names_function(value.id, scope, source)
        return isinstance(value, ast.Lambda)

    def _names_function(self, name: str, scope: Scope, source: Source) -> bool:
        for outer in reversed(scope):
            if isinstance(outer, FUNCTIONS):
                arguments = outer.args
                for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
                    if argument.arg == name:
                        return (argument.annotation is not None
                                and 'Callable' in ast.unparse(argument.annotation))
        if (source.module, name) in self._functions:
            return True
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return (node.module or '', alias.name) in self._functions
        return callable(getattr(builtins, name, None))


# -- tests -------------------------------------------------------------------------------

def private_reads(tests: list[Source]) -> Iterator[Finding]:
    """Find reads of private attributes of what a test file does not define itself."""
    for source in tests:
        own, libraries = _defined(source), _libraries(source)
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                name = node.attr if _is_foreign(node, libraries) else ''
            elif isinstance(node, ast.Call) and _called(node) == 'getattr' and len(node.args) > 1:
                name = _text(node.args[1])
            elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith(PACKAGE):
                name = next((a.name for a in node.names if _is_private(a.name)), '')
            else:
                continue
            if _is_private(name) and name not in own:
                yield Finding('private attributes read in tests', source.path, node.lineno,
                              f'reads {name}: drive public behaviour, or look at status()')


def patches(tests: list[Source]) -> Iterator[Finding]:
    """Find all that a test replaces through ``setattr``, private or not."""
    for source in tests:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and _called(node) == 'setattr' and len(node.args) > 1:
                yield Finding('patches in tests, private or not', source.path, node.lineno,
                              f'patches {ast.unparse(node.args[0])}')


def private_patches(tests: list[Source]) -> Iterator[Finding]:
    """Find private attributes and methods that a test replaces, sets or deletes."""
    for source in tests:
        own, libraries = _defined(source), _libraries(source)
        for node in ast.walk(source.tree):
            name = ''
            if not isinstance(node, (ast.stmt, ast.expr)):
                continue
            if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
                name = node.attr if _is_foreign(node, libraries) else ''
            elif isinstance(node, ast.Call) and _called(node) in (
                    'setattr', 'delattr', 'object', 'patch'):
                name = next((text for text in map(_text, node.args[:2]) if text), '')
            name = name.rpartition('.')[2]
            if _is_private(name) and name not in own:
                yield Finding('private attributes patched in tests', source.path, node.lineno,
                              f'patches {name}: pass a stand-in through the constructor')


def _is_private(name: str) -> bool:
    return name.startswith('_') and not name.endswith('__') and name not in NAMEDTUPLE | {'_'}


def _is_foreign(node: ast.Attribute, libraries: set[str]) -> bool:
    value = node.value
    if isinstance(value, ast.Call):
        return _called(value) != 'super'
    return not (isinstance(value, ast.Name) and value.id in {'self', 'cls'} | libraries)


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func).rpartition('.')[2]


def _text(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ''


def _libraries(source: Source) -> set[str]:
    """Return the names of imported modules that are not of this repository."""
    return {(alias.asname or alias.name).partition('.')[0]
            for node in ast.walk(source.tree) if isinstance(node, ast.Import)
            for alias in node.names if not alias.name.startswith(PACKAGE)}


def _defined(source: Source) -> set[str]:
    """Return the attributes and functions that a file's own code defines."""
    names: set[str] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.ClassDef, *FUNCTIONS)):
            names.add(node.name)
        elif _is_own(node) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names
