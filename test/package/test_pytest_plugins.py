# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The suite starts where a sourced ROS distribution brings pytest plugins of its own."""

from __future__ import annotations

import os
from pathlib import Path
import subprocess
import sys

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Entry points of launch_testing, launch_testing_ros and launch_pytest.
PLUGINS = ('launch_testing', 'launch_ros', 'launch_pytest')


@pytest.fixture
def distribution(tmp_path: Path) -> Path:
    """Return a folder of Python packages whose pytest plugins fail when they are imported."""
    info = tmp_path / 'ros_distribution-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: ros-distribution\nVersion: 1.0\n')
    (info / 'entry_points.txt').write_text('[pytest11]\n' + ''.join(
        f'{name} = failing_{name}\n' for name in PLUGINS))
    for name in PLUGINS:
        (tmp_path / f'failing_{name}.py').write_text(f'raise ImportError({name!r})\n')
    return tmp_path


def collect(distribution: Path, configuration: str) -> subprocess.CompletedProcess[str]:
    (distribution / 'test_something.py').write_text('def test_something(): pass\n')
    paths = [str(distribution), *filter(None, [os.environ.get('PYTHONPATH')])]
    return subprocess.run(
        [sys.executable, '-m', 'pytest', '--collect-only', '-q', '-c', configuration,
         str(distribution)], cwd=ROOT, capture_output=True, text=True, timeout=200,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(paths), 'PYTEST_ADDOPTS': ''})


def test_plugins_of_launch_are_not_loaded(distribution: Path) -> None:
    done = collect(distribution, 'pyproject.toml')
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_our_configuration_they_end_the_run(distribution: Path) -> None:
    done = collect(distribution, os.devnull)
    assert done.returncode != 0 and 'ImportError: launch_' in done.stderr
