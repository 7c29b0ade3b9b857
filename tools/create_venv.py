# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Create the virtual environment that `make` works in, or say in one line what it lacks.

Usage: python3 tools/create_venv.py FOLDER [--ros-sourced]

The environment sees the system's packages where it needs them: those of a
sourced ROS 2 distribution, or a torch built for the machine's GPU (a Jetson's
vendor ships its own, and PyPI has nothing that replaces it).
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig

OLDEST, NEWEST = (3, 10), (3, 12)


def missing_packages():
    """Return the names, for apt-get, of what a build of the messages lacks."""
    python = 'python{}.{}'.format(*sys.version_info)
    header = os.path.join(sysconfig.get_path('include'), 'Python.h')
    found = {
        'gcc': shutil.which(os.environ.get('CC', 'cc')),
        'g++': shutil.which(os.environ.get('CXX', 'c++')),
        'cmake': shutil.which('cmake'),
        'make': shutil.which('make'),
        f'{python}-dev': os.path.isfile(header),
        f'{python}-venv': importlib.util.find_spec('ensurepip'),
    }
    return [package for package, place in found.items() if not place]


def has_torch_for_gpu():
    """Return whether this interpreter already has a torch built for CUDA."""
    if not importlib.util.find_spec('torch'):
        return False
    # In a process of its own: a broken torch must not end the set-up.
    probe = 'import sys, torch; sys.exit(torch.version.cuda is None)'
    return subprocess.run([sys.executable, '-c', probe], stderr=subprocess.DEVNULL).returncode == 0


def main():
    """Check this machine, then create the environment."""
    parser = argparse.ArgumentParser()
    parser.add_argument('folder')
    parser.add_argument('--ros-sourced', action='store_true')
    args = parser.parse_args()

    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        sys.exit('mace_ros: python3 is {}.{}, and 3.10 to 3.12 is needed: name another with '
                 'make PYTHON=python3.12'.format(*sys.version_info))
    missing = missing_packages()
    if missing:
        sys.exit(f'mace_ros: please run: apt-get install {" ".join(missing)}')

    command = [sys.executable, '-m', 'venv', args.folder]
    if args.ros_sourced or has_torch_for_gpu():
        command.append('--system-site-packages')
    sys.exit(subprocess.run(command).returncode)


if __name__ == '__main__':
    main()
