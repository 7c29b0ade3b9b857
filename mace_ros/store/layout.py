# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Location of the storage folder, and the names of the files in it."""

from __future__ import annotations

import os
from pathlib import Path
import re

JOURNAL = 'journal.sqlite'
MODEL = 'model.txt'         # describes the base model, whose token ids and layers the rest uses
# The files of a version, under PEFT's names.
WEIGHTS = 'adapter_model.safetensors'
CONFIG = 'adapter_config.json'


def default_folder(node: str) -> Path:
    """Return the default storage folder of a node, by its full name."""
    home = Path(os.environ.get('ROS_HOME') or '~/.ros').expanduser()
    return home / 'mace_ros' / node.strip('/').replace('/', '__')


def model_note(kind: str, *, layers: int, width: int, vocabulary: int) -> str:
    """Return the description of a base model that the file :data:`MODEL` holds."""
    return f'{kind}, {layers} layers of {width}, vocabulary of {vocabulary}'


def vocabulary_of(note: str) -> int | None:
    """Return the number of token ids from a :func:`model_note`; None if it does not say."""
    found = re.search(r'vocabulary of (\d+)$', note)
    return int(found[1]) if found else None
