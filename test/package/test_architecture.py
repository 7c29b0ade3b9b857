# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
tools/check_structure.py finds each kind of violation, and none in this repository.

``pytest test/package/test_architecture.py -k this_repository`` checks the repository only.
"""

from __future__ import annotations

from pathlib import Path
import subprocess
import sys

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / 'tools/check_structure.py'

PAGE = """\
## Rooms

| room | holds | may import |
|---|---|---|
| `api/` | data | |
| `model/` | tensors | `torch` |
| `store/` | the disk | `api`, `sqlite3` |
| `engine/` | the loop | `api`, `store.journal`, `model`, `torch`, `time` |
| `engine/plain.py` | arithmetic | `api` |
| `ros/` | the node | `msg`, `api`, `engine` |

## Other tables

| room | may import |
|---|---|
| `api/` | `torch` |

## The way of a query

1. `mace_ros/ros/node.py:Node.on_query` hands it to the engine
2. `mace_ros/engine/engine.py:Engine.submit` takes it
3. `mace_ros/api/events.py:Query`

## The way of a correction

1. `mace_ros/ros/node.py:Node.on_query`
"""
GOOD = {
    'docs/architecture.md': PAGE,
    'mace_ros/__init__.py': "__version__ = '1'\n",
    'mace_ros/__main__.py': 'from mace_ros.ros import node\n',
    'mace_ros/api/events.py': 'class Query:\n    pass\n',
    'mace_ros/model/tensors.py': 'import torch.nn\n',
    'mace_ros/store/journal.py': (
        'import sqlite3\n\nfrom mace_ros.api.events import Query\n\n'
        "ROWS = 'SELECT * FROM answers'\n"),
    'mace_ros/engine/engine.py': (
        'from mace_ros import __version__\nfrom mace_ros.api.events import Query\n'
        'from mace_ros.store.journal import ROWS\n\n\n'
        'class Engine:\n    def submit(self, query: Query) -> None:\n'
        '        self._query = query\n'),
    'mace_ros/engine/plain.py': 'import math\n',
    'mace_ros/ros/node.py': (
        'import mace_ros.msg as msg\nfrom mace_ros.engine.engine import Engine\n\n\n'
        'class Node:\n    def on_query(self, message: msg.Query) -> None:\n'
        '        self.engine.submit(message)\n'),
    'test/test_engine.py': 'def test_it(engine):\n    assert engine.status()._asdict()\n',
}


def tree(folder: Path, **changes: str) -> Path:
    """Write a small repository that keeps all rules but for some files, named as their paths."""
    for path, text in {**GOOD, **changes}.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def check(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOL, '--root', root, *options], capture_output=True, text=True)


def test_this_repository_keeps_the_rules() -> None:
    result = check(ROOT, '--counts')
    assert result.returncode == 0, f'{result.stdout}{result.stderr}'


def test_a_tree_that_keeps_the_rules_passes(tmp_path: Path) -> None:
    result = check(tree(tmp_path))
    assert (result.returncode, result.stdout, result.stderr) == (0, '', '')


IN_ENGINE = 'mace_ros/engine/other.py'
WALK = PAGE.index('1. `mace_ros/ros/node.py')
BAD = {
    'a module at the root': (
        {'mace_ros/loose.py': ''},
        'mace_ros/loose.py:1: module at the root of mace_ros/'),

    'an import circle': (
        {'mace_ros/engine/a.py': 'from mace_ros.engine import b\n',
         'mace_ros/engine/b.py': 'import mace_ros.engine.c\n',
         'mace_ros/engine/c.py': '\nfrom mace_ros.engine.a import x\n'},
        'mace_ros/engine/a.py:1: import circle mace_ros.engine.a -> mace_ros.engine.b -> '
        'mace_ros.engine.c -> mace_ros.engine.a:'),
    'an import circle of types only': (
        {'mace_ros/engine/a.py': 'import mace_ros.engine.b\n',
         'mace_ros/engine/b.py': (
             'if TYPE_CHECKING:\n    from mace_ros.engine.a import A\n')},
        'mace_ros/engine/a.py:1: import circle'),
    'an import circle inside a function': (
        {'mace_ros/engine/a.py': 'import mace_ros.engine.b\n',
         'mace_ros/engine/b.py': 'def f():\n    from .a import A\n'},
        'mace_ros/engine/a.py:1: import circle'),

    'a room of a higher layer': (
        {'mace_ros/api/other.py': 'from mace_ros.engine.engine import Engine\n'},
        'mace_ros/api/other.py:1: api may not import engine.engine'),
    'another module of a room than the one allowed': (
        {'mace_ros/store/files.py': '', IN_ENGINE: 'from mace_ros.store.files import save\n'},
        f'{IN_ENGINE}:1: engine may not import store.files'),
    'a library of other rooms': (
        {'mace_ros/ros/other.py': 'def f():\n    from torch import nn\n'},
        'mace_ros/ros/other.py:2: ros may not import torch'),
    'a module that is stricter than its room': (
        {'mace_ros/engine/plain.py': 'import time\n'},
        'mace_ros/engine/plain.py:1: engine.plain may not import time'),
    'a module that is stricter than its room and imports from it': (
        {'mace_ros/engine/plain.py': 'from .engine import Engine\n'},
        'mace_ros/engine/plain.py:1: engine.plain may not import engine.engine'),
    'generated messages': (
        {IN_ENGINE: 'from mace_ros.msg import Query\n'},
        f'{IN_ENGINE}:1: engine may not import msg'),
    'imports of the package itself': (
        {'mace_ros/__init__.py': 'from mace_ros.api.events import Query\n'},
        'mace_ros/__init__.py:1: mace_ros may not import api.events'),
    'a room that the page lacks': (
        {'mace_ros/attic/old.py': ''},
        'mace_ros/attic/old.py:1: its room is not in the table'),
    'a room that does not exist': (
        {'docs/architecture.md': PAGE.replace('| `ros/`', '| `cellar/` | wine | |\n| `ros/`')},
        'docs/architecture.md:10: cellar does not exist'),
    'a row that names a room below it': (
        {'docs/architecture.md': PAGE.replace('`api`, `sqlite3`', '`api`, `ros`, `sqlite3`')},
        'docs/architecture.md:7: store may import ros, which has no row above it'),

    'a long function': (
        {IN_ENGINE: 'def f():\n' + 80 * '    pass\n'},
        f'{IN_ENGINE}:1: f has 81 lines, at most 80'),
    'a long method': (
        {IN_ENGINE: 'class A:\n    async def f(self):\n' + 80 * '        pass\n'},
        f'{IN_ENGINE}:2: f has 81 lines'),
    'a long file': (
        {IN_ENGINE: 501 * '\n'},
        f'{IN_ENGINE}:1: 501 lines, at most 500'),
    'a long test file': (
        {'test/engine/test_engine.py': 501 * '\n'},
        'test/engine/test_engine.py:1: 501 lines, at most 500'),

    'SQL': (
        {IN_ENGINE: "x = ('SELECT * '\n     'FROM answers')\n"}, f'{IN_ENGINE}:1: SQL outside'),
    'SQL in small letters': (
        {IN_ENGINE: "x = 'insert into answers values (?)'\n"}, f'{IN_ENGINE}:1: SQL outside'),
    'SQL in a formatted string': (
        {IN_ENGINE: "x = f'DELETE FROM {table}'\n"}, f'{IN_ENGINE}:1: SQL outside'),
    'a condition in SQL': (
        {IN_ENGINE: "x = query + ' WHERE number = ?'\n"}, f'{IN_ENGINE}:1: SQL outside'),

    'a path in the docs that leads to no file': (
        {'README.md': 'See `engine/engine.py`\nand `engine/motor.py`.\n'},
        'README.md:2: engine/motor.py is neither below the root nor below mace_ros/'),
    'a file that the docs name without its folder': (
        {'docs/learning.md': 'See `engine.py`.\n'},
        'docs/learning.md:1: engine.py is neither below the root nor below mace_ros/'),

    'a hop that does not exist': (
        {'docs/architecture.md': PAGE.replace('Engine.submit', 'Engine.take')},
        f'docs/architecture.md:{PAGE[:WALK].count(chr(10)) + 2}: '
        'mace_ros/engine/engine.py:Engine.take does not exist'),
    'a hop in a file that does not exist': (
        {'docs/architecture.md': PAGE.replace('engine/engine.py:', 'engine/motor.py:')},
        'mace_ros/engine/motor.py:Engine.submit does not exist'),
    'a hop that the others do not lead to': (
        {'docs/architecture.md': PAGE.replace('events.py:Query', 'other.py:Lost'),
         'mace_ros/api/other.py': 'class Lost:\n    pass\n'},
        'mace_ros/api/other.py:Lost is named by no hop before it'),
    'a walk without hops': (
        {'docs/architecture.md': PAGE[:PAGE.rindex('1. ')]},
        'docs/architecture.md:1: section "the way of a correction" has no hops'),
    'a walk through many files': (
        {**{f'mace_ros/api/m{i}.py': f'class M{i}:\n    pass\n' for i in range(26)},
         'docs/architecture.md': PAGE + ''.join(
             f'{i}. `mace_ros/api/m{i}.py:M{i}`\n' for i in range(26)),
         'mace_ros/ros/node.py': GOOD['mace_ros/ros/node.py'] + ''.join(
             f'        M{i}()\n' for i in range(26))},
        'the way of a correction passes mace_ros/api/m25.py'),
}


@pytest.mark.parametrize('case', BAD)
def test_a_violation_is_found(case: str, tmp_path: Path) -> None:
    changes, finding = BAD[case]
    result = check(tree(tmp_path, **changes))
    assert finding in result.stdout
    assert result.returncode == 1
    for line in result.stdout.splitlines():     # the violation, and the advice
        assert len(line.split(': ')) >= 3


CALLBACKS = {
    'a lambda': 'engine.learner.step_s = lambda tokens: 0.0',
    'a lambda in an attribute of an attribute': 'self.learner.step_s = lambda tokens: 0.0',
    'a lambda, with its type': 'engine.step_s: object = lambda tokens: 0.0',
    'a lambda in a choice': 'engine.step_s = (lambda x: x) if fast else None',
    'a lambda behind an or': 'engine.step_s = step_s or (lambda x: x)',
    'a lambda beside a number': 'engine.rate, engine.step_s = 1, lambda x: x',
    'a lambda by name': "setattr(engine, 'step_s', lambda x: x)",
    'a function of the module': 'engine.step_s = module_function',
    'a function of another module': 'engine.step_s = imported_function',
    'a function of the function': 'engine.step_s = inner',
    'a function that was passed in': 'engine.step_s = passed',
    'a bound method': 'engine.step_s = self.method',
    'a bound method of another object': 'engine.step_s = other.method',
    'part of a call': 'engine.step_s = partial(module_function, 1)',
    'a type as a placeholder': 'engine.step_s = float',
    'a placeholder of its own': 'self.step_s: Callable[[int], float] = lambda tokens: 0.0',
    'a type as a placeholder of its own': 'self.step_s: Callable[[int], float] = float',
}
NO_CALLBACKS = [
    'self.step_s = lambda tokens: 0.0', 'engine.step_s = passed_number', 'engine.rate = other.rate',
    'engine.rate = self.method()', 'engine.step_s = None', 'engine.rate = self.size',
    "setattr(engine, 'rate', 1.0)", 'self.step_s: Callable[[int], float] = passed']
MODULE = """\
from mace_ros.api.functions import imported_function

def module_function(x):
    return x

class A:
    def f(self, engine, other, passed: Callable[[int], float], passed_number: float, fast, step_s):
        def inner():
            pass
        STATEMENT

    def method(self):
        pass

    @property
    def size(self):
        return 1
"""


@pytest.mark.parametrize('case', CALLBACKS)
def test_a_function_in_another_object_is_found(case: str, tmp_path: Path) -> None:
    result = check(tree(tmp_path, **{
        'mace_ros/api/functions.py': 'def imported_function(x):\n    return x\n',
        IN_ENGINE: MODULE.replace('STATEMENT', CALLBACKS[case])}))
    assert result.returncode == 1
    assert result.stdout.startswith(f'{IN_ENGINE}:10: ')
    assert 'constructor argument' in result.stdout


def test_data_in_another_object_is_allowed(tmp_path: Path) -> None:
    statements = '\n        '.join(NO_CALLBACKS)
    result = check(tree(tmp_path, **{
        'mace_ros/api/functions.py': 'def imported_function(x):\n    return x\n',
        IN_ENGINE: MODULE.replace('STATEMENT', statements)}))
    assert result.stdout == ''


# Each line is one read or one patch; twenty are allowed, and so each file has 21 of it.
READS = ['engine._state', 'engine.learner._job', "getattr(engine, '_state')", 'engine.f()._state',
         'engine._state.waiting']
PATCHES = ['engine._state = 1', 'del engine._state', "monkeypatch.setattr(engine, '_state', 1)",
           "monkeypatch.setattr('mace_ros.engine.engine._state', 1)",
           "patch.object(engine, '_state')", "setattr(engine, '_state', 1)", 'engine._state += 1',
           "monkeypatch.delattr(engine, '_state')"]
OWN = ['self._mine', 'engine._asdict()', 'engine.__dict__', 'os._exit(0)', 'other._mine',
       "monkeypatch.setattr(engine, 'state', 1)", 'super()._state', 'self._mine = 1', '_ = 1']


def uses(statement: str) -> str:
    return ('import os\n\nclass A:\n    def f(self, engine, other):\n        self._mine = 1\n'
            + 21 * f'        {statement}\n')


@pytest.mark.parametrize('statement', READS + PATCHES)
def test_private_names_in_tests_are_counted(statement: str, tmp_path: Path) -> None:
    result = check(tree(tmp_path, **{'test/test_engine.py': uses(statement)}), '--counts')
    kind = 'read' if statement in READS else 'patched'
    assert f'private attributes {kind} in tests' in result.stdout
    assert result.returncode == 1
    assert f' {_figure(result.stdout, f"private attributes {kind} in tests")} ' == ' 21 '
    assert 'test/test_engine.py:6: ' in result.stdout
    assert 'test/test_engine.py:26: ' in result.stdout


@pytest.mark.parametrize('statement', OWN)
def test_own_names_and_public_ones_are_not_counted(statement: str, tmp_path: Path) -> None:
    assert check(tree(tmp_path, **{'test/test_engine.py': uses(statement)})).stdout == ''


def test_twenty_private_names_are_allowed(tmp_path: Path) -> None:
    root = tree(tmp_path, **{
        'test/test_engine.py': 'def test_it(engine):\n' + 20 * '    engine._state\n'})
    assert check(root).stdout == ''
    verbose = check(root, '-v')
    assert verbose.returncode == 0
    assert verbose.stdout.count('reads _state') == 20


def test_a_page_without_a_table_is_an_error(tmp_path: Path) -> None:
    result = check(tree(tmp_path, **{'docs/architecture.md': '## Rooms\n'}))
    assert result.returncode == 2
    assert 'no table' in result.stderr


def _figure(counts: str, name: str) -> int:
    return next(int(line.removeprefix(name).split()[0])
                for line in counts.splitlines() if line.startswith(name))
