# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The prefix in which the package under test is installed."""

from pathlib import Path

from mace_ros import msg

PREFIX = next(
    folder for folder in Path(msg.__file__).parents
    if (folder / 'share/mace_ros/package.xml').is_file())
