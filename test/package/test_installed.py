# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The installed package: messages, modules, programs and shared files.

``colcon test`` runs only this file; the other tests use the sources.
"""

import os
from pathlib import Path
import subprocess
import sys

import pytest
from rclpy.serialization import deserialize_message, serialize_message
from support.installed import PREFIX

from mace_ros import msg

MESSAGES = [name for name in dir(msg) if name[0].isupper()]
PROGRAMS = sorted((PREFIX / 'lib/mace_ros').iterdir())
SAMPLES = {
    'boolean': True, 'float': 0.5, 'int32': -7, 'int64': -(2**40), 'sequence<string>': ['', 'ä'],
    'sequence<int32>': [0, -7], 'sequence<float>': [0.5], 'sequence<uint8>': [0, 200],
    'string': 'ロボット', 'uint8': 200, 'uint32': 2**31, 'uint64': 2**63}
# Of these consist other messages, which alone have a time.
PARTS = {'ChatMessage', 'Choice', 'Logprob', 'TokenLogprobs', 'Tool', 'ToolCall'}


def sample(kind):
    """Return a value of a field's type."""
    if kind in SAMPLES:
        return SAMPLES[kind]
    if kind.startswith('sequence<'):
        return [sample(kind.removeprefix('sequence<').removesuffix('>'))]
    part = getattr(msg, kind.removeprefix('mace_ros/'))
    return part(**{name: sample(each) for name, each in
                   part.get_fields_and_field_types().items() if each != 'std_msgs/Header'})


@pytest.mark.parametrize('name', MESSAGES)
def test_a_message_survives_serialization(name):
    message_type = getattr(msg, name)
    header = message_type.get_fields_and_field_types().get('header')
    assert header == (None if name in PARTS else 'std_msgs/Header')
    message = sample(f'mace_ros/{name}')
    if header:
        message.header.frame_id = 'map'

    assert deserialize_message(serialize_message(message), message_type) == message


def test_every_message_is_installed():
    sources = (PREFIX / 'share/mace_ros/msg').glob('*.msg')

    assert sorted(path.stem for path in sources) == MESSAGES


def test_the_package_is_imported_from_its_prefix(tmp_path):
    code = 'import mace_ros, mace_ros.msg; print(mace_ros.__file__, mace_ros.msg.__file__)'
    found = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, check=True, capture_output=True, text=True)

    for file in found.stdout.split():
        assert Path(file).is_relative_to(PREFIX)


def test_every_module_can_be_imported(tmp_path):
    code = (
        'import importlib.util, pkgutil, mace_ros\n'
        # These need libraries that are extras.
        'optional = {"openai.": "starlette"} | dict.fromkeys(\n'
        '    ("model.layer_kernels", "model.mixed_lora_kernels", "model.paged_kernels"),\n'
        '    "triton")\n'
        'missing = tuple("mace_ros." + module for module, library in optional.items()\n'
        '                if not importlib.util.find_spec(library))\n'
        'for module in pkgutil.walk_packages(mace_ros.__path__, "mace_ros."):\n'
        '    if not module.name.endswith("__main__") and not module.name.startswith(missing):\n'
        '        importlib.import_module(module.name)\n')
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True)


@pytest.mark.parametrize('program', PROGRAMS, ids=lambda program: program.name)
def test_a_program_has_help(program, tmp_path):
    help_ = subprocess.run(
        [program, '--help'], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=200)

    assert 'usage' in help_.stdout.lower()


@pytest.mark.parametrize('file', ['launch/mace.launch.py', 'config/mace.yaml', 'package.xml'])
def test_a_shared_file_is_readable(file):
    assert os.access(PREFIX / 'share/mace_ros' / file, os.R_OK)
