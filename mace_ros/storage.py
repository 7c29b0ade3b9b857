# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Where a node keeps what it learns, and what the files there are called."""

from __future__ import annotations

import os
from pathlib import Path

JOURNAL = 'journal.sqlite'
MODEL = 'model.txt'         # the base model, without which the rest means nothing
# Of a version, as PEFT calls them.
WEIGHTS = 'adapter_model.safetensors'
CONFIG = 'adapter_config.json'


def default_folder(node: str) -> Path:
    """Return the storage folder of a node, by its full name, that was given none."""
    home = Path(os.environ.get('ROS_HOME') or '~/.ros').expanduser()
    return home / 'mace_ros' / node.strip('/').replace('/', '__')
