# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Where a node keeps what it learns, and what the files there are called."""

from __future__ import annotations

import os
from pathlib import Path
import re

JOURNAL = 'journal.sqlite'
MODEL = 'model.txt'         # the base model, without which the rest means nothing
# Of a version, as PEFT calls them.
WEIGHTS = 'adapter_model.safetensors'
CONFIG = 'adapter_config.json'


def default_folder(node: str) -> Path:
    """Return the storage folder of a node, by its full name, that was given none."""
    home = Path(os.environ.get('ROS_HOME') or '~/.ros').expanduser()
    return home / 'mace_ros' / node.strip('/').replace('/', '__')


def model_note(kind: str, *, layers: int, width: int, vocabulary: int) -> str:
    """Return what the file :data:`MODEL` says about a base model."""
    return f'{kind}, {layers} layers of {width}, vocabulary of {vocabulary}'


def vocabulary_of(note: str) -> int | None:
    """Return how many token ids the base model of a note has; None if that is not said."""
    found = re.search(r'vocabulary of (\d+)$', note)
    return int(found[1]) if found else None
