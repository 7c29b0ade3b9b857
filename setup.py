# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Build for pip: run the package's own CMakeLists.txt and pack what it installs.

``colcon build`` uses CMakeLists.txt directly and never reads this file.
"""

import os
from pathlib import Path
import shlex
import shutil
import subprocess
import sys
from typing import Any
import xml.etree.ElementTree as ElementTree

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NAME = 'mace_ros'
SOURCE = Path(__file__).resolve().parent
PYTHON = f'python{sys.version_info[0]}.{sys.version_info[1]}'
SITE_PACKAGES = f'lib/{PYTHON}/site-packages'
DIST_PACKAGES = f'local/lib/{PYTHON}/dist-packages'  # Humble's, on Ubuntu


def version() -> str:
    """Return the version that package.xml names."""
    return ElementTree.parse(SOURCE / 'package.xml').findtext('version')


def console_scripts() -> list[str]:
    """Return an entry point for each program of cmake/executables.txt."""
    lines = (SOURCE / 'cmake/executables.txt').read_text().splitlines()
    programs = [line.split() for line in lines if line and not line.startswith('#')]
    return [f'mace_{name.removeprefix("mace_")} = {module}:main' for name, module in programs]


def ros_prefixes() -> list[str]:
    """Return the folders that hold ROS 2: a sourced distribution's, and this environment."""
    prefixes = [p for p in os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep) if p]
    if sys.prefix not in prefixes:
        prefixes.append(sys.prefix)
    if not any(Path(p, 'share/rosidl_default_generators').is_dir() for p in prefixes):
        raise SystemExit(
            f'{NAME}: no ROS 2 in {os.pathsep.join(prefixes)}: source a distribution, '
            'or first run pip install -r requirements-ros.txt')
    return prefixes


def run(*command: str | Path, **options: Any) -> None:
    """Run a command that says itself what is wrong if it fails."""
    if subprocess.run(command, **options).returncode:
        raise SystemExit(f'{NAME}: failed: {shlex.join(map(str, command))}')


class CMakeBuild(build_ext):
    """Configures, builds and installs the package below build/, then packs the result."""

    def run(self) -> None:
        """Build, and hand modules and data files to the other setuptools commands."""
        cmake = shutil.which('cmake')
        if cmake is None:
            raise SystemExit(f'{NAME}: cmake is needed to build the messages')
        folder = Path(self.build_temp).resolve()
        build, stage, record = folder / 'cmake', folder / 'stage', folder / 'configured'

        prefixes = ros_prefixes()
        # An isolated build replaces PYTHONPATH, but the message generators are
        # Python too and lie below the same prefixes.
        env = {k: v for k, v in os.environ.items() if k != 'PYTHONNOUSERSITE'}
        env['PYTHONPATH'] = os.pathsep.join(
            str(Path(p, packages)) for p in prefixes for packages in (SITE_PACKAGES, DIST_PACKAGES))
        env['AMENT_PREFIX_PATH'] = os.pathsep.join(prefixes)

        configure = [
            cmake, '-S', SOURCE, '-B', build, '--log-level=WARNING', '--no-warn-unused-cli',
            f'-DCMAKE_INSTALL_PREFIX={sys.prefix}',
            f'-DCMAKE_PREFIX_PATH={";".join(prefixes)}',
            # Beside the messages' own libraries lie those of the wheels.
            '-DCMAKE_INSTALL_RPATH=$ORIGIN;$ORIGIN/../../..',
            '-DCMAKE_BUILD_TYPE=Release',
            '-DCMAKE_TARGET_MESSAGES=OFF',
            '-DBUILD_TESTING=OFF',
            '-DUNITY_MESSAGES=ON',
            f'-DPYTHON_INSTALL_DIR={SITE_PACKAGES}',
            f'-DPython3_EXECUTABLE={sys.executable}',
            f'-DPYTHON_EXECUTABLE={sys.executable}',  # read by Humble's generators
        ]
        # A cache made for another interpreter or distribution would be reused silently.
        wanted = '\n'.join(map(str, configure))
        if not record.is_file() or record.read_text() != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            run(*configure, env=env)
            record.write_text(wanted)

        run(cmake, '--build', build, '--parallel', str(os.cpu_count() or 1), env=env)
        shutil.rmtree(stage, ignore_errors=True)
        run(cmake, '--install', build, '--prefix', stage, env=env, stdout=subprocess.DEVNULL)
        self._pack(stage)

    def _pack(self, stage: Path) -> None:
        """Sort what is below stage into modules and files that keep their place."""
        modules = stage / SITE_PACKAGES / NAME
        target = Path(self.build_lib, NAME)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(modules, target, ignore=shutil.ignore_patterns('__pycache__', '*.c'))

        data: dict[str, list[str]] = {}
        for path in sorted(stage.rglob('*')):
            place = path.relative_to(stage)
            if path.is_file() and not place.is_relative_to(SITE_PACKAGES):
                data.setdefault(str(place.parent), []).append(os.path.relpath(path, SOURCE))
        self.distribution.data_files = sorted(data.items())

    def get_outputs(self) -> list[str]:
        """Return nothing: run() knows the outputs only afterwards."""
        return []


setup(
    version=version(),
    packages=[],
    # Says that the package is not pure Python; CMakeBuild does the work.
    ext_modules=[Extension(f'{NAME}.msg', sources=[])],
    cmdclass={'build_ext': CMakeBuild},
    entry_points={'console_scripts': console_scripts()},
    zip_safe=False,
)
